//! Payloads: arguments and results as raw bytes, CBOR, JSON or MessagePack.

mod raw;

use serde::Serialize;
use serde::de::DeserializeOwned;

/// How deep values may nest in a payload that is read: a much deeper one would overflow the stack. What the libraries of
/// CBOR and JSON read, and all are held to.
const MAX_DEPTH: usize = 127;

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
            // Its depth is limited by itself.
            Self::Cbor => serde_cbor::from_slice(payload).map_err(|error| error.to_string()),
            // Its own limit is not that of what the type ignores.
            Self::Json if is_too_deep(payload) => Err(format!("nested deeper than {MAX_DEPTH} levels")),
            Self::Json => serde_json::from_slice(payload).map_err(|error| error.to_string()),
            Self::MessagePack => decode_message_pack(payload),
        };
        read.map_err(|why| CodecError(format!("cannot be read as {}: {why}", self.name())))
    }
}

fn decode_message_pack<T: DeserializeOwned>(mut payload: &[u8]) -> Result<T, String> {
    let mut reader = rmp_serde::Deserializer::new(&mut payload);
    reader.set_max_depth(MAX_DEPTH + 1);
    let value = T::deserialize(&mut reader).map_err(|error| error.to_string())?;
    match payload.len() {
        0 => Ok(value),
        rest => Err(format!("{rest} bytes after the value")),
    }
}

/// Whether JSON nests deeper than is read. Of what is no JSON it may say either.
fn is_too_deep(json: &[u8]) -> bool {
    let opens = |byte: &u8| matches!(byte, b'[' | b'{');
    // A first look, at many bytes at a time, spares the others in most cases.
    if json.iter().filter(|byte| opens(byte)).count() <= MAX_DEPTH {
        return false;
    }
    let (mut depth, mut in_text) = (0_usize, false);
    let mut bytes = json.iter();
    while let Some(byte) = bytes.next() {
        match byte {
            b'\\' if in_text => drop(bytes.next()),
            b'"' => in_text = !in_text,
            _ if in_text => {}
            byte if opens(byte) => depth += 1,
            b']' | b'}' => depth = depth.saturating_sub(1),
            _ => {}
        }
        if depth > MAX_DEPTH {
            return true;
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde::de::IgnoredAny;
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

    /// An array in an array, and so on, in each codec and in each of its forms.
    fn nested(depth: usize) -> Vec<(Codec, Vec<u8>)> {
        let arrays = |codec, open: &[u8], end: &[u8]| (codec, [open.repeat(depth - 1).as_slice(), end].concat());
        let both = |codec, open: &[u8], close: &[u8]| (codec, [open.repeat(depth), close.repeat(depth)].concat());
        vec![
            both(Codec::Json, b"[", b"]"),
            (
                Codec::Json,
                [br#"{"a":"#.repeat(depth - 1).as_slice(), b"{}", b"}".repeat(depth - 1).as_slice()].concat(),
            ),
            arrays(Codec::Cbor, &[0x81], &[0x80]),
            arrays(Codec::Cbor, &[0xa1, 0x61, b'a'], &[0xa0]),
            both(Codec::Cbor, &[0x9f], &[0xff]),
            arrays(Codec::MessagePack, &[0x91], &[0x90]),
            arrays(Codec::MessagePack, &[0x81, 0xa1, b'a'], &[0x80]),
            arrays(Codec::MessagePack, &[0xdd, 0, 0, 0, 1], &[0x90]),
        ]
    }

    #[test]
    fn values_are_read_down_to_the_deepest_level_and_refused_below_it_whether_they_are_looked_at_or_not() {
        for (codec, payload) in nested(MAX_DEPTH) {
            codec.decode::<serde_json::Value>(&payload).expect("deep enough");
            codec.decode::<IgnoredAny>(&payload).expect("deep enough");
        }
        for depth in [MAX_DEPTH + 1, 10_000, 1_000_000] {
            for (codec, payload) in nested(depth) {
                let looked_at = codec.decode::<serde_json::Value>(&payload).expect_err("too deep");
                let ignored = codec.decode::<IgnoredAny>(&payload).expect_err("too deep");
                for error in [looked_at, ignored] {
                    let why = error.to_string().to_lowercase();
                    assert!(
                        ["recursion limit", "depth limit", "nested deeper"].iter().any(|text| why.contains(text)),
                        "{why}"
                    );
                }
            }
        }
        Codec::Cbor.decode::<serde_json::Value>(&[0xc1].repeat(10_000)).expect_err("tags in tags");
        Codec::Raw.decode::<IgnoredAny>(&[b'['; 10_000]).expect("bytes do not nest");
    }

    #[test]
    fn brackets_in_a_text_are_no_nesting() {
        let text = format!("\\\"{}", "[{".repeat(1000));
        for value in [vec![text; 3], vec![String::new(); 3]] {
            let payload = Codec::Json.encode(&value).expect("writes");
            assert_eq!(Codec::Json.decode::<Vec<String>>(&payload), Ok(value));
        }
        let flat = Codec::Json.encode(&vec![[(); 0]; 1000]).expect("writes");
        Codec::Json.decode::<Vec<[(); 0]>>(&flat).expect("many, side by side");
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
