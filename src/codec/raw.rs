//! Raw bytes as a codec: a value of bytes or text is its own payload, and every other value is refused.
//!
//! It is written as a serde format, so that the rest of the library need not know it from the others.

use serde::de::value::SeqDeserializer;
use serde::de::{self, Deserializer, IntoDeserializer, Visitor};
use serde::ser::{self, Impossible, Serialize, Serializer};

/// Serde's own simple error, which holds a sentence.
type Error = de::value::Error;

/// Writes a value: bytes, text, nothing, or a tuple with one of these.
pub(super) fn to_vec<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, Error> {
    value.serialize(RawWriter)
}

/// The error for every value that is not bytes.
fn refused<T>() -> Result<T, Error> {
    Err(ser::Error::custom("raw bytes carry one value of bytes: choose CBOR, JSON or MessagePack"))
}

/// Writes one value.
struct RawWriter;

/// The bytes of a `Vec<u8>`, which serde writes one by one.
struct Bytes(Vec<u8>);

impl ser::SerializeSeq for Bytes {
    type Ok = Vec<u8>;
    type Error = Error;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        self.0.push(value.serialize(Byte)?);
        Ok(())
    }

    fn end(self) -> Result<Vec<u8>, Error> {
        Ok(self.0)
    }
}

/// The elements of a tuple of arguments: none, or one of bytes.
struct RawElements(Option<Vec<u8>>);

impl ser::SerializeTuple for RawElements {
    type Ok = Vec<u8>;
    type Error = Error;

    fn serialize_element<T: Serialize + ?Sized>(&mut self, value: &T) -> Result<(), Error> {
        if self.0.is_some() {
            return refused();
        }
        self.0 = Some(value.serialize(RawWriter)?);
        Ok(())
    }

    fn end(self) -> Result<Vec<u8>, Error> {
        Ok(self.0.unwrap_or_default())
    }
}

macro_rules! refuse_scalars {
    ($($method:ident $type:ty),*) => {
        $(fn $method(self, _: $type) -> Result<Self::Ok, Error> { refused() })*
    };
}

macro_rules! refuse_compounds {
    () => {
        type SerializeTupleStruct = Impossible<Self::Ok, Error>;
        type SerializeTupleVariant = Impossible<Self::Ok, Error>;
        type SerializeMap = Impossible<Self::Ok, Error>;
        type SerializeStruct = Impossible<Self::Ok, Error>;
        type SerializeStructVariant = Impossible<Self::Ok, Error>;

        fn serialize_unit_struct(self, _: &'static str) -> Result<Self::Ok, Error> {
            refused()
        }
        fn serialize_unit_variant(self, _: &'static str, _: u32, _: &'static str) -> Result<Self::Ok, Error> {
            refused()
        }
        fn serialize_newtype_variant<T: Serialize + ?Sized>(
            self,
            _: &'static str,
            _: u32,
            _: &'static str,
            _: &T,
        ) -> Result<Self::Ok, Error> {
            refused()
        }
        fn serialize_none(self) -> Result<Self::Ok, Error> {
            refused()
        }
        fn serialize_some<T: Serialize + ?Sized>(self, _: &T) -> Result<Self::Ok, Error> {
            refused()
        }
        fn serialize_newtype_struct<T: Serialize + ?Sized>(
            self,
            _: &'static str,
            value: &T,
        ) -> Result<Self::Ok, Error> {
            value.serialize(self)
        }
        fn serialize_tuple_struct(self, _: &'static str, _: usize) -> Result<Self::SerializeTupleStruct, Error> {
            refused()
        }
        fn serialize_tuple_variant(
            self,
            _: &'static str,
            _: u32,
            _: &'static str,
            _: usize,
        ) -> Result<Self::SerializeTupleVariant, Error> {
            refused()
        }
        fn serialize_map(self, _: Option<usize>) -> Result<Self::SerializeMap, Error> {
            refused()
        }
        fn serialize_struct(self, _: &'static str, _: usize) -> Result<Self::SerializeStruct, Error> {
            refused()
        }
        fn serialize_struct_variant(
            self,
            _: &'static str,
            _: u32,
            _: &'static str,
            _: usize,
        ) -> Result<Self::SerializeStructVariant, Error> {
            refused()
        }
    };
}

impl Serializer for RawWriter {
    type Ok = Vec<u8>;
    type Error = Error;
    type SerializeSeq = Bytes;
    type SerializeTuple = RawElements;

    refuse_scalars!(
        serialize_bool bool, serialize_i8 i8, serialize_i16 i16, serialize_i32 i32, serialize_i64 i64, serialize_u8 u8,
        serialize_u16 u16, serialize_u32 u32, serialize_u64 u64, serialize_f32 f32, serialize_f64 f64, serialize_char char
    );
    refuse_compounds!();

    fn serialize_bytes(self, bytes: &[u8]) -> Result<Vec<u8>, Error> {
        Ok(bytes.to_vec())
    }

    fn serialize_str(self, text: &str) -> Result<Vec<u8>, Error> {
        Ok(text.as_bytes().to_vec())
    }

    fn serialize_unit(self) -> Result<Vec<u8>, Error> {
        Ok(Vec::new())
    }

    fn serialize_seq(self, length: Option<usize>) -> Result<Bytes, Error> {
        Ok(Bytes(Vec::with_capacity(length.unwrap_or(0))))
    }

    fn serialize_tuple(self, _: usize) -> Result<RawElements, Error> {
        Ok(RawElements(None))
    }
}

/// Writes one byte of a `Vec<u8>`.
struct Byte;

impl Serializer for Byte {
    type Ok = u8;
    type Error = Error;
    type SerializeSeq = Impossible<u8, Error>;
    type SerializeTuple = Impossible<u8, Error>;

    refuse_scalars!(
        serialize_bool bool, serialize_i8 i8, serialize_i16 i16, serialize_i32 i32, serialize_i64 i64, serialize_u16 u16,
        serialize_u32 u32, serialize_u64 u64, serialize_f32 f32, serialize_f64 f64, serialize_char char,
        serialize_bytes &[u8], serialize_str &str
    );
    refuse_compounds!();

    fn serialize_u8(self, byte: u8) -> Result<u8, Error> {
        Ok(byte)
    }

    fn serialize_unit(self) -> Result<u8, Error> {
        refused()
    }

    fn serialize_seq(self, _: Option<usize>) -> Result<Self::SerializeSeq, Error> {
        refused()
    }

    fn serialize_tuple(self, _: usize) -> Result<Self::SerializeTuple, Error> {
        refused()
    }
}

/// Reads one value from all bytes of a payload.
pub(super) struct Reader<'a>(pub(super) &'a [u8]);

impl<'de> Deserializer<'de> for Reader<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_borrowed_bytes(self.0)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        match std::str::from_utf8(self.0) {
            Ok(text) => visitor.visit_borrowed_str(text),
            Err(error) => Err(de::Error::custom(error)),
        }
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        self.deserialize_str(visitor)
    }

    /// An optional argument is absent if there are no bytes.
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.0.is_empty() { visitor.visit_none() } else { visitor.visit_some(self) }
    }

    fn deserialize_unit<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        if self.0.is_empty() { visitor.visit_unit() } else { visitor.visit_borrowed_bytes(self.0) }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(SeqDeserializer::new(self.0.iter().copied()))
    }

    fn deserialize_tuple<V: Visitor<'de>>(self, length: usize, visitor: V) -> Result<V::Value, Error> {
        match length {
            0 if self.0.is_empty() => visitor.visit_seq(SeqDeserializer::new(std::iter::empty::<Reader<'de>>())),
            1 => visitor.visit_seq(SeqDeserializer::new(std::iter::once(self))),
            _ => refused(),
        }
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_newtype_struct(self)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char bytes byte_buf unit_struct tuple_struct map
        struct enum identifier ignored_any
    }
}

impl<'de> IntoDeserializer<'de, Error> for Reader<'de> {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

/// Reads the arguments of a method that takes this many: all bytes are one argument. If the method takes none, there
/// must be no bytes.
pub(super) struct RawArguments<'a>(pub(super) &'a [u8], pub(super) Option<usize>);

impl<'de> Deserializer<'de> for RawArguments<'de> {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        let argument = Some(Reader(self.0)).filter(|_| self.1 != Some(0) || !self.0.is_empty());
        let mut array = SeqDeserializer::new(argument.into_iter());
        let arguments = visitor.visit_seq(&mut array)?;
        array.end().map(|()| arguments)
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf option unit unit_struct
        newtype_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}
