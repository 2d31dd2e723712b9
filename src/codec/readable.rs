//! Makes CBOR write and read values in serde's form for people, so that a value has one form in all codecs.
//!
//! Types such as `IpAddr` have two forms in serde: text in formats for people, such as JSON, and bytes in other
//! formats. But serde's tagged, untagged and flattened types can read only the text, even where the bytes were written.
//! So a format that says that it is not for people is wrapped into one that says that it is.

use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, EnumAccess, MapAccess, SeqAccess, VariantAccess, Visitor};
use serde::ser::{self, Serialize, Serializer};

/// Wraps a serializer or a deserializer, and everything that is passed through it: values, parts, visitors and seeds.
pub(super) struct HumanReadable<T>(pub(super) T);

impl<T: Serialize + ?Sized> Serialize for HumanReadable<&T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.serialize(HumanReadable(serializer))
    }
}

macro_rules! write_scalars {
    ($($method:ident $type:ty),*) => {
        $(fn $method(self, value: $type) -> Result<S::Ok, S::Error> { self.0.$method(value) })*
    };
}

impl<S: Serializer> Serializer for HumanReadable<S> {
    type Ok = S::Ok;
    type Error = S::Error;
    type SerializeSeq = HumanReadable<S::SerializeSeq>;
    type SerializeTuple = HumanReadable<S::SerializeTuple>;
    type SerializeTupleStruct = HumanReadable<S::SerializeTupleStruct>;
    type SerializeTupleVariant = HumanReadable<S::SerializeTupleVariant>;
    type SerializeMap = HumanReadable<S::SerializeMap>;
    type SerializeStruct = HumanReadable<S::SerializeStruct>;
    type SerializeStructVariant = HumanReadable<S::SerializeStructVariant>;

    fn is_human_readable(&self) -> bool {
        true
    }

    write_scalars!(
        serialize_bool bool, serialize_i8 i8, serialize_i16 i16, serialize_i32 i32, serialize_i64 i64, serialize_i128 i128,
        serialize_u8 u8, serialize_u16 u16, serialize_u32 u32, serialize_u64 u64, serialize_u128 u128, serialize_f32 f32,
        serialize_f64 f64, serialize_char char, serialize_str &str, serialize_bytes &[u8], serialize_unit_struct &'static str
    );

    fn serialize_none(self) -> Result<S::Ok, S::Error> {
        self.0.serialize_none()
    }

    fn serialize_some<T: Serialize + ?Sized>(self, value: &T) -> Result<S::Ok, S::Error> {
        self.0.serialize_some(&HumanReadable(value))
    }

    fn serialize_unit(self) -> Result<S::Ok, S::Error> {
        self.0.serialize_unit()
    }

    fn serialize_unit_variant(self, name: &'static str, i: u32, variant: &'static str) -> Result<S::Ok, S::Error> {
        self.0.serialize_unit_variant(name, i, variant)
    }

    fn serialize_newtype_struct<T>(self, name: &'static str, value: &T) -> Result<S::Ok, S::Error>
    where
        T: Serialize + ?Sized,
    {
        self.0.serialize_newtype_struct(name, &HumanReadable(value))
    }

    fn serialize_newtype_variant<T: Serialize + ?Sized>(
        self,
        name: &'static str,
        i: u32,
        variant: &'static str,
        value: &T,
    ) -> Result<S::Ok, S::Error> {
        self.0.serialize_newtype_variant(name, i, variant, &HumanReadable(value))
    }

    fn serialize_seq(self, length: Option<usize>) -> Result<Self::SerializeSeq, S::Error> {
        self.0.serialize_seq(length).map(HumanReadable)
    }

    fn serialize_tuple(self, length: usize) -> Result<Self::SerializeTuple, S::Error> {
        self.0.serialize_tuple(length).map(HumanReadable)
    }

    fn serialize_tuple_struct(self, name: &'static str, n: usize) -> Result<Self::SerializeTupleStruct, S::Error> {
        self.0.serialize_tuple_struct(name, n).map(HumanReadable)
    }

    fn serialize_tuple_variant(
        self,
        name: &'static str,
        i: u32,
        variant: &'static str,
        length: usize,
    ) -> Result<Self::SerializeTupleVariant, S::Error> {
        self.0.serialize_tuple_variant(name, i, variant, length).map(HumanReadable)
    }

    fn serialize_map(self, length: Option<usize>) -> Result<Self::SerializeMap, S::Error> {
        self.0.serialize_map(length).map(HumanReadable)
    }

    fn serialize_struct(self, name: &'static str, length: usize) -> Result<Self::SerializeStruct, S::Error> {
        self.0.serialize_struct(name, length).map(HumanReadable)
    }

    fn serialize_struct_variant(
        self,
        name: &'static str,
        i: u32,
        variant: &'static str,
        length: usize,
    ) -> Result<Self::SerializeStructVariant, S::Error> {
        self.0.serialize_struct_variant(name, i, variant, length).map(HumanReadable)
    }

    fn collect_str<T: fmt::Display + ?Sized>(self, value: &T) -> Result<S::Ok, S::Error> {
        self.0.collect_str(value)
    }
}

/// The writers for the parts of a value with several parts.
macro_rules! write_parts {
    ($($trait:ident $method:ident($($key:ident: $type:ty)?)),*) => {
        $(impl<S: ser::$trait> ser::$trait for HumanReadable<S> {
            type Ok = S::Ok;
            type Error = S::Error;

            fn $method<T: Serialize + ?Sized>(&mut self, $($key: $type,)? value: &T) -> Result<(), S::Error> {
                self.0.$method($($key,)? &HumanReadable(value))
            }

            fn end(self) -> Result<S::Ok, S::Error> {
                self.0.end()
            }
        })*
    };
}

write_parts!(
    SerializeSeq serialize_element(), SerializeTuple serialize_element(), SerializeTupleStruct serialize_field(),
    SerializeTupleVariant serialize_field(), SerializeStruct serialize_field(key: &'static str),
    SerializeStructVariant serialize_field(key: &'static str)
);

impl<S: ser::SerializeMap> ser::SerializeMap for HumanReadable<S> {
    type Ok = S::Ok;
    type Error = S::Error;

    fn serialize_key<T: Serialize + ?Sized>(&mut self, key: &T) -> Result<(), S::Error> {
        self.0.serialize_key(&HumanReadable(key))
    }

    fn serialize_value<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), S::Error> {
        self.0.serialize_value(&HumanReadable(value))
    }

    fn end(self) -> Result<S::Ok, S::Error> {
        self.0.end()
    }
}

macro_rules! read {
    ($($method:ident($($name:ident: $type:ty),*)),* $(,)?) => {
        $(fn $method<V: Visitor<'de>>(self, $($name: $type,)* visitor: V) -> Result<V::Value, D::Error> {
            self.0.$method($($name,)* HumanReadable(visitor))
        })*
    };
}

impl<'de, D: Deserializer<'de>> Deserializer<'de> for HumanReadable<D> {
    type Error = D::Error;

    fn is_human_readable(&self) -> bool {
        true
    }

    read!(
        deserialize_any(), deserialize_bool(), deserialize_i8(), deserialize_i16(), deserialize_i32(), deserialize_i64(),
        deserialize_i128(), deserialize_u8(), deserialize_u16(), deserialize_u32(), deserialize_u64(), deserialize_u128(),
        deserialize_f32(), deserialize_f64(), deserialize_char(), deserialize_str(), deserialize_string(),
        deserialize_bytes(), deserialize_byte_buf(), deserialize_option(), deserialize_unit(), deserialize_seq(),
        deserialize_map(), deserialize_identifier(), deserialize_ignored_any(), deserialize_tuple(length: usize),
        deserialize_unit_struct(name: &'static str), deserialize_newtype_struct(name: &'static str),
        deserialize_tuple_struct(name: &'static str, length: usize),
        deserialize_struct(name: &'static str, fields: &'static [&'static str]),
        deserialize_enum(name: &'static str, variants: &'static [&'static str]),
    );
}

macro_rules! visit_scalars {
    ($($method:ident $type:ty),*) => {
        $(fn $method<E: de::Error>(self, value: $type) -> Result<V::Value, E> { self.0.$method(value) })*
    };
}

impl<'de, V: Visitor<'de>> Visitor<'de> for HumanReadable<V> {
    type Value = V::Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.expecting(f)
    }

    visit_scalars!(
        visit_bool bool, visit_i8 i8, visit_i16 i16, visit_i32 i32, visit_i64 i64, visit_i128 i128, visit_u8 u8,
        visit_u16 u16, visit_u32 u32, visit_u64 u64, visit_u128 u128, visit_f32 f32, visit_f64 f64, visit_char char,
        visit_str &str, visit_borrowed_str &'de str, visit_string String, visit_bytes &[u8],
        visit_borrowed_bytes &'de [u8], visit_byte_buf Vec<u8>
    );

    fn visit_none<E: de::Error>(self) -> Result<V::Value, E> {
        self.0.visit_none()
    }

    fn visit_unit<E: de::Error>(self) -> Result<V::Value, E> {
        self.0.visit_unit()
    }

    fn visit_some<D: Deserializer<'de>>(self, deserializer: D) -> Result<V::Value, D::Error> {
        self.0.visit_some(HumanReadable(deserializer))
    }

    fn visit_newtype_struct<D: Deserializer<'de>>(self, deserializer: D) -> Result<V::Value, D::Error> {
        self.0.visit_newtype_struct(HumanReadable(deserializer))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, elements: A) -> Result<V::Value, A::Error> {
        self.0.visit_seq(HumanReadable(elements))
    }

    fn visit_map<A: MapAccess<'de>>(self, entries: A) -> Result<V::Value, A::Error> {
        self.0.visit_map(HumanReadable(entries))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, variant: A) -> Result<V::Value, A::Error> {
        self.0.visit_enum(HumanReadable(variant))
    }
}

impl<'de, S: DeserializeSeed<'de>> DeserializeSeed<'de> for HumanReadable<S> {
    type Value = S::Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<S::Value, D::Error> {
        self.0.deserialize(HumanReadable(deserializer))
    }
}

impl<'de, A: SeqAccess<'de>> SeqAccess<'de> for HumanReadable<A> {
    type Error = A::Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, A::Error> {
        self.0.next_element_seed(HumanReadable(seed))
    }

    fn size_hint(&self) -> Option<usize> {
        self.0.size_hint()
    }
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for HumanReadable<A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, A::Error> {
        self.0.next_key_seed(HumanReadable(seed))
    }

    fn next_value_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<T::Value, A::Error> {
        self.0.next_value_seed(HumanReadable(seed))
    }

    fn size_hint(&self) -> Option<usize> {
        self.0.size_hint()
    }
}

impl<'de, A: EnumAccess<'de>> EnumAccess<'de> for HumanReadable<A> {
    type Error = A::Error;
    type Variant = HumanReadable<A::Variant>;

    fn variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<(T::Value, Self::Variant), A::Error> {
        self.0.variant_seed(HumanReadable(seed)).map(|(value, variant)| (value, HumanReadable(variant)))
    }
}

impl<'de, A: VariantAccess<'de>> VariantAccess<'de> for HumanReadable<A> {
    type Error = A::Error;

    fn unit_variant(self) -> Result<(), A::Error> {
        self.0.unit_variant()
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, seed: T) -> Result<T::Value, A::Error> {
        self.0.newtype_variant_seed(HumanReadable(seed))
    }

    fn tuple_variant<V: Visitor<'de>>(self, length: usize, visitor: V) -> Result<V::Value, A::Error> {
        self.0.tuple_variant(length, HumanReadable(visitor))
    }

    fn struct_variant<V: Visitor<'de>>(
        self,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, A::Error> {
        self.0.struct_variant(fields, HumanReadable(visitor))
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use crate::codec::tests::STRUCTURED;

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(tag = "kind")]
    enum Peer {
        Host { address: std::net::IpAddr, via: Vec<Option<std::net::SocketAddr>> },
        Moved(Moved),
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Moved {
        to: std::net::IpAddr,
        #[serde(flatten)]
        more: std::collections::BTreeMap<String, std::net::Ipv6Addr>,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    #[serde(untagged)]
    enum Either {
        Number(u64),
        Address(std::net::IpAddr),
    }

    #[test]
    fn what_serde_writes_for_people_is_the_same_text_in_every_codec() {
        let address = |text: &str| text.parse().expect("an address");
        let peers = [
            Peer::Host { address: address("10.0.0.1"), via: vec![None, Some("[::1]:5".parse().expect("an address"))] },
            Peer::Moved(Moved {
                to: address("::1"),
                more: [("also".to_owned(), std::net::Ipv6Addr::LOCALHOST)].into(),
            }),
        ];
        let either = [Either::Number(1), Either::Address(address("::1"))];
        let mixed = (peers, either, std::collections::HashMap::from([(address("::1"), address("10.0.0.1"))]));
        let shown = serde_json::to_value(&mixed).expect("writes");
        for codec in STRUCTURED {
            let payload = codec.encode(&mixed).expect("writes");
            assert_eq!(codec.arguments(&payload).as_ref(), Ok(&mixed), "{codec:?}");
            assert_eq!(codec.decode::<serde_json::Value>(&payload).as_ref(), Ok(&shown), "{codec:?}");
        }
    }
}
