//! Payloads: arguments and results as raw bytes, CBOR, JSON or MessagePack.

mod raw;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// How deep values may nest in a payload that is read: a deeper one would overflow the stack.
const MAX_DEPTH: usize = 128;

/// How a payload is written. The client chooses; the server answers in kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
#[repr(u8)]
pub enum Codec {
    /// The bytes themselves: for a method with one argument of bytes, or none, and a result of bytes, or none.
    Raw = 0,
    /// [RFC 8949](https://www.rfc-editor.org/rfc/rfc8949): compact and self-describing.
    #[default]
    Cbor = 1,
    /// For people and for clients that have nothing else.
    Json = 2,
    /// [MessagePack](https://msgpack.org), structs as maps.
    MessagePack = 3,
}

/// Arguments that cannot be written, or a result that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct CodecError(pub(crate) String);

impl Codec {
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        [Self::Raw, Self::Cbor, Self::Json, Self::MessagePack].into_iter().find(|codec| *codec as u8 == number)
    }

    /// The name, as in the wire's description.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw bytes",
            Self::Cbor => "CBOR",
            Self::Json => "JSON",
            Self::MessagePack => "MessagePack",
        }
    }

    pub(crate) fn encode<T: Serialize>(self, value: &T) -> Result<Vec<u8>, CodecError> {
        let mut payload = Vec::new();
        self.write(value, &mut payload)?;
        Ok(payload)
    }

    /// Appends `value` to `payload`.
    pub(crate) fn write<T: Serialize>(self, value: &T, payload: &mut Vec<u8>) -> Result<(), CodecError> {
        let written = match self {
            Self::Raw => raw::to_vec(value).map(|bytes| payload.extend(bytes)).map_err(|error| error.to_string()),
            Self::Cbor => serde_cbor::to_writer(payload, value).map_err(|error| error.to_string()),
            Self::Json => serde_json::to_writer(payload, value).map_err(|error| error.to_string()),
            Self::MessagePack => rmp_serde::encode::write_named(payload, value).map_err(|error| error.to_string()),
        };
        written.map_err(|why| CodecError(format!("cannot be written as {}: {why}", self.name())))
    }

    pub(crate) fn decode<T: DeserializeOwned>(self, payload: &[u8]) -> Result<T, CodecError> {
        let read = match self {
            Self::Raw => raw::from_slice(payload).map_err(|error| error.to_string()),
            // Its depth is limited to 128 by itself, as JSON's is.
            Self::Cbor => serde_cbor::from_slice(payload).map_err(|error| error.to_string()),
            Self::Json => serde_json::from_slice(payload).map_err(|error| error.to_string()),
            Self::MessagePack => decode_message_pack(payload),
        };
        read.map_err(|why| CodecError(format!("cannot be read as {}: {why}", self.name())))
    }
}

fn decode_message_pack<T: DeserializeOwned>(mut payload: &[u8]) -> Result<T, String> {
    let mut reader = rmp_serde::Deserializer::new(&mut payload);
    reader.set_max_depth(MAX_DEPTH);
    let value = T::deserialize(&mut reader).map_err(|error| error.to_string())?;
    match payload.len() {
        0 => Ok(value),
        rest => Err(format!("{rest} bytes after the value")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_bytes::ByteBuf;

    const STRUCTURED: [Codec; 3] = [Codec::Cbor, Codec::Json, Codec::MessagePack];

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    enum Shape {
        Point,
        Circle { radius: f64 },
        Label(String, Vec<Option<i64>>),
    }

    #[test]
    fn arguments_come_back_in_every_codec() {
        let arguments = (
            1_u64,
            -2_i64,
            vec![Shape::Point, Shape::Circle { radius: 0.5 }],
            Shape::Label("é".into(), vec![None, Some(1)]),
        );
        for codec in STRUCTURED {
            let payload = codec.encode(&arguments).expect("writes");
            let back: (u64, i64, Vec<Shape>, Shape) = codec.decode(&payload).expect("reads");
            assert_eq!(back, arguments, "{codec:?}");
        }
    }

    #[test]
    fn no_arguments_are_an_empty_array() {
        assert_eq!(Codec::Json.encode::<[(); 0]>(&[]), Ok(b"[]".to_vec()));
        for codec in STRUCTURED {
            let payload = codec.encode::<[(); 0]>(&[]).expect("writes");
            codec.decode::<[(); 0]>(&payload).expect("reads");
        }
    }

    #[test]
    fn too_few_and_too_many_arguments_are_refused() {
        for codec in STRUCTURED {
            let one = codec.encode(&(1,)).expect("writes");
            let three = codec.encode(&(1, 2, 3)).expect("writes");
            codec.decode::<(i64, i64)>(&one).expect_err("one is too few");
            codec.decode::<(i64, i64)>(&three).expect_err("three are too many");
            codec.decode::<[(); 0]>(&one).expect_err("one where none is expected");
        }
    }

    #[test]
    fn raw_bytes_carry_bytes_and_nothing_else() {
        let payload = Codec::Raw.encode(&(ByteBuf::from(vec![0, 255]),)).expect("one argument of bytes");
        assert_eq!(payload, [0, 255]);
        assert_eq!(Codec::Raw.decode::<(ByteBuf,)>(&payload), Ok((ByteBuf::from(vec![0, 255]),)));
        assert_eq!(Codec::Raw.decode::<(Vec<u8>,)>(&payload), Ok((vec![0, 255],)));
        assert_eq!(Codec::Raw.decode::<(String,)>(b"hi"), Ok(("hi".to_owned(),)));
        assert_eq!(Codec::Raw.encode(&()), Ok(Vec::new()));
        assert_eq!(Codec::Raw.encode(&vec![1_u8, 2]), Ok(vec![1, 2]));
        let error = Codec::Raw.encode(&(1_u64, 2_u64)).expect_err("numbers are not bytes");
        assert!(error.to_string().contains("raw bytes"), "{error}");
        Codec::Raw.decode::<(u64,)>(b"12345678").expect_err("bytes are not a number");
        Codec::Raw.decode::<(String,)>(&[0xff]).expect_err("not UTF-8");
    }

    #[test]
    fn a_nested_bomb_is_refused_before_it_overflows_the_stack() {
        let deep = 100_000;
        let json = [b"[".repeat(deep), b"]".repeat(deep)].concat();
        Codec::Json.decode::<serde_json::Value>(&json).expect_err("too deep");
        Codec::Cbor.decode::<serde_json::Value>(&[0x81].repeat(deep)).expect_err("too deep");
        Codec::MessagePack.decode::<serde_json::Value>(&[0x91].repeat(deep)).expect_err("too deep");
    }

    #[test]
    fn an_absurd_length_allocates_nothing() {
        // An array, and a byte string, that claim 2^60 elements.
        Codec::Cbor.decode::<Vec<u64>>(&[0x9b, 0x10, 0, 0, 0, 0, 0, 0, 0]).expect_err("truncated");
        Codec::Cbor.decode::<ByteBuf>(&[0x5b, 0x10, 0, 0, 0, 0, 0, 0, 0]).expect_err("truncated");
        Codec::MessagePack.decode::<Vec<u64>>(&[0xdd, 0xff, 0xff, 0xff, 0xff]).expect_err("truncated");
        Codec::MessagePack.decode::<ByteBuf>(&[0xc6, 0xff, 0xff, 0xff, 0xff]).expect_err("truncated");
    }
}
