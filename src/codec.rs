//! Codecs: how arguments and results become the bytes of a payload.
//!
//! The client's calls write arguments and read results with a [`Codec`]; a server reads the arguments and answers with
//! the same codec. What is common to all codecs is here: nesting is limited, and trailing bytes are refused.

mod arguments;
mod raw;
mod readable;

use std::cell::Cell;
use std::marker::PhantomData;

use serde::de::{DeserializeOwned, DeserializeSeed, IgnoredAny};
use serde::{Deserializer, Serialize};
use serde_path_to_error::Track;

pub use self::arguments::Arguments;
use self::arguments::Array;
pub(crate) use self::arguments::Misfit;
use self::readable::HumanReadable;

/// How deep values may nest in a payload that is read. A value that nests much deeper would overflow the stack. This is
/// the limit of the libraries for CBOR and JSON; the other codecs are held to the same.
const MAX_DEPTH: usize = 127;

/// How a payload is written. The client chooses with [`ClientBuilder::codec`](crate::ClientBuilder::codec), and the
/// server answers with the same codec. Default: [`Codec::Cbor`].
///
/// ```
/// use hopline::{Client, Codec};
///
/// # async fn example() -> Result<(), hopline::Error> {
/// let client = Client::builder().codec(Codec::MessagePack).connect("memory://").await?;
/// // A call may say otherwise.
/// let total: u64 = client.call("shop", "total", ()).codec(Codec::Json).await?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
#[repr(u8)]
#[non_exhaustive]
pub enum Codec {
    /// The payload is the bytes themselves. For methods that take one argument of bytes or text, or none, and return
    /// bytes or text, or nothing.
    Raw = 0,
    /// [CBOR](https://www.rfc-editor.org/rfc/rfc8949): compact, and it carries the names of fields.
    #[default]
    Cbor = 1,
    /// JSON: for people who read messages, and for clients that have nothing else.
    Json = 2,
    /// [MessagePack](https://msgpack.org). Structs are maps, with the names of their fields.
    MessagePack = 3,
}

/// Arguments could not be written, or a result could not be read. The text says which codec and why.
///
/// ```
/// use hopline::{Client, Error};
///
/// # async fn example(client: Client) {
/// // The result of this method is a text.
/// match client.call::<u64>("demo", "whoami", ()).await {
///     Err(Error::UnreadableReply(why)) => eprintln!("another result than expected: {why}"),
///     outcome => println!("{outcome:?}"),
/// }
/// # }
/// ```
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct CodecError(pub(crate) String);

impl Codec {
    pub(crate) const ALL: [Self; 4] = [Self::Raw, Self::Cbor, Self::Json, Self::MessagePack];

    /// The codec with this number in a frame.
    pub(crate) fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|codec| *codec as u8 == number)
    }

    /// The name in the description of the wire and in error messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw bytes",
            Self::Cbor => "CBOR",
            Self::Json => "JSON",
            Self::MessagePack => "MessagePack",
        }
    }

    /// Writes `value` into a new payload.
    pub(crate) fn encode<T: Serialize>(self, value: &T) -> Result<Vec<u8>, CodecError> {
        let mut payload = Vec::new();
        self.write(value, &mut payload)?;
        Ok(payload)
    }

    /// Appends `value` to `payload`. If that fails, `payload` may hold a part of it.
    pub(crate) fn write<T: Serialize>(self, value: &T, payload: &mut Vec<u8>) -> Result<(), CodecError> {
        let written = match self {
            Self::Raw => raw::to_vec(value).map(|bytes| payload.extend(bytes)).map_err(|error| error.to_string()),
            Self::Cbor => serde_cbor::to_writer(payload, &HumanReadable(value)).map_err(|error| error.to_string()),
            Self::Json => serde_json::to_writer(payload, value).map_err(|error| error.to_string()),
            Self::MessagePack => {
                let mut writer = rmp_serde::Serializer::new(payload).with_struct_map().with_human_readable();
                value.serialize(&mut writer).map_err(|error| error.to_string())
            }
        };
        written.map_err(|why| CodecError(format!("cannot be written as {}: {why}", self.name())))
    }

    /// Reads a whole payload as one value.
    ///
    /// If that fails, the payload is read once more, only to find the place that does not fit: the error names it, such as
    /// `items[2].price`.
    pub(crate) fn decode<T: DeserializeOwned>(self, payload: &[u8]) -> Result<T, CodecError> {
        self.read(payload, PhantomData).map_err(|why| {
            let mut track = Track::new();
            let again = self.read(payload, Tracked::<T>(&mut track, PhantomData));
            // It displays the whole value as a dot.
            let place = Some(track.path().to_string()).filter(|place| again.is_err() && place != ".");
            CodecError(self.unread(&place.map_or(why.clone(), |place| format!("{place}: {why}"))))
        })
    }

    /// Reads a method's arguments from a payload.
    ///
    /// If that fails, the payload is read once more, only to count what is in it. So the error can tell apart a wrong
    /// number of arguments, which usually means another version of the method, from an argument of a wrong type.
    pub(crate) fn arguments<A: Arguments>(self, payload: &[u8]) -> Result<A, Misfit> {
        let misses = Cell::new(false);
        self.array(payload, Array::new(&misses)).map_err(|why| {
            let all = self.array(payload, Array::<Vec<IgnoredAny>>::new(&Cell::default()));
            match (A::COUNT, all.map(|all| all.len())) {
                (Some(takes), Ok(got)) if got > takes || misses.get() => Misfit::Count { takes, got },
                _ => Misfit::Other(self.unread(&why)),
            }
        })
    }

    /// Reads the array of arguments. Raw bytes are an array of one element, or of none.
    fn array<A: Arguments>(self, payload: &[u8], array: Array<'_, A>) -> Result<A, String> {
        match self {
            Self::Raw => array.deserialize(raw::RawArguments(payload, A::COUNT)).map_err(|error| error.to_string()),
            _ => self.read(payload, array),
        }
    }

    /// The sentence for a payload that cannot be read.
    fn unread(self, why: &str) -> String {
        format!("cannot be read as {}: {why}", self.name())
    }

    /// Reads one value, to the end of the payload: bytes after it are an error.
    fn read<'de, S: DeserializeSeed<'de>>(self, mut payload: &'de [u8], seed: S) -> Result<S::Value, String> {
        match self {
            Self::Raw => seed.deserialize(raw::Reader(payload)).map_err(|error| error.to_string()),
            // The library limits the depth by itself.
            Self::Cbor => {
                let mut reader = serde_cbor::Deserializer::from_slice(payload);
                let value = seed.deserialize(HumanReadable(&mut reader)).map_err(|error| error.to_string())?;
                reader.end().map(|()| value).map_err(|error| error.to_string())
            }
            // The library's own limit does not hold for values that the type ignores.
            Self::Json if is_too_deep(payload) => Err(format!("nested deeper than {MAX_DEPTH} levels")),
            Self::Json => {
                let mut reader = serde_json::Deserializer::from_slice(payload);
                let value = seed.deserialize(&mut reader).map_err(|error| error.to_string())?;
                reader.end().map(|()| value).map_err(|error| error.to_string())
            }
            Self::MessagePack => {
                let mut reader = rmp_serde::Deserializer::new(&mut payload).with_human_readable();
                reader.set_max_depth(MAX_DEPTH + 1);
                let value = seed.deserialize(&mut reader).map_err(|error| error.to_string())?;
                match payload.len() {
                    0 => Ok(value),
                    rest => Err(format!("{rest} bytes after the value")),
                }
            }
        }
    }
}

/// Reads a value, and keeps track of the place that is read.
struct Tracked<'a, T>(&'a mut Track, PhantomData<T>);

impl<'de, T: DeserializeOwned> DeserializeSeed<'de> for Tracked<'_, T> {
    type Value = T;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<T, D::Error> {
        T::deserialize(serde_path_to_error::Deserializer::new(deserializer, self.0))
    }
}

/// Whether JSON nests deeper than [`MAX_DEPTH`]. For text that is not JSON the result means nothing.
fn is_too_deep(json: &[u8]) -> bool {
    let opens = |byte: &u8| matches!(byte, b'[' | b'{');
    // Counting brackets is fast. In most payloads there are so few that the second look is not needed.
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
    use serde_bytes::ByteBuf;

    pub(super) const STRUCTURED: [Codec; 3] = [Codec::Cbor, Codec::Json, Codec::MessagePack];

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
            let back: (u64, i64, Vec<Shape>, Shape) = codec.arguments(&payload).expect("reads");
            assert_eq!(back, arguments, "{codec:?}");
        }
    }

    #[test]
    fn no_arguments_are_an_empty_array() {
        assert_eq!(Codec::Json.encode::<[(); 0]>(&[]), Ok(b"[]".to_vec()));
        for codec in STRUCTURED {
            let payload = codec.encode::<[(); 0]>(&[]).expect("writes");
            assert_eq!(codec.arguments::<[(); 0]>(&payload), Ok([]));
        }
    }

    /// What the macro's documentation and that of the wire say of the types that do not travel.
    #[test]
    fn what_any_serde_type_leaves_out() {
        use std::collections::HashMap;
        for codec in STRUCTURED {
            let back = |payload: Vec<u8>| codec.decode::<Option<Option<u8>>>(&payload);
            assert_eq!(back(codec.encode(&Some(None::<u8>)).expect("writes")), Ok(None), "{codec:?}");
            let unit = codec.encode(&Some(())).expect("writes");
            assert_eq!(codec.decode::<Option<()>>(&unit), Ok(None), "{codec:?}");
            let null = codec.encode(&Some(serde_json::Value::Null)).expect("writes");
            assert_eq!(codec.decode::<Option<serde_json::Value>>(&null), Ok(None), "{codec:?}");
        }
        let huge = |codec: Codec| codec.encode(&u128::MAX).and_then(|payload| codec.decode::<u128>(&payload));
        let fits = STRUCTURED.map(|codec| huge(codec) == Ok(u128::MAX));
        assert_eq!(fits, [false, true, true], "CBOR, JSON, MessagePack");
        for codec in STRUCTURED {
            let small = codec.encode(&u128::from(u64::MAX)).expect("writes");
            assert_eq!(codec.decode(&small), Ok(u128::from(u64::MAX)), "{codec:?}");
        }
        let nan = |codec: Codec| codec.encode(&f64::NAN).and_then(|payload| codec.decode::<f64>(&payload));
        assert_eq!(STRUCTURED.map(|codec| nan(codec).is_ok()), [true, false, true]);
        let by_pair = HashMap::from([((1_u8, 2_u8), 3_u8)]);
        assert_eq!(STRUCTURED.map(|codec| codec.encode(&by_pair).is_ok()), [true, false, true]);
        let by_number = HashMap::from([(1_u64, 2_u8)]);
        for codec in STRUCTURED {
            let payload = codec.encode(&by_number).expect("writes");
            assert_eq!(codec.decode(&payload).as_ref(), Ok(&by_number), "{codec:?}");
        }
    }

    #[test]
    fn the_place_that_does_not_fit_is_named() {
        #[derive(Debug, Deserialize)]
        #[expect(dead_code, reason = "it is only read")]
        struct Item {
            price: u64,
        }
        #[derive(Debug, Deserialize)]
        #[expect(dead_code, reason = "it is only read")]
        struct Cart {
            items: Vec<Item>,
            shape: Option<Shape>,
        }
        let read = |codec: Codec, cart: serde_json::Value| {
            let payload = codec.encode(&cart).expect("writes");
            codec.decode::<Cart>(&payload).expect_err("it does not fit").to_string()
        };
        for codec in STRUCTURED {
            let wrong = read(codec, serde_json::json!({ "items": [{ "price": 1 }, { "price": "x" }] }));
            assert!(wrong.starts_with(&format!("cannot be read as {}: items[1].price: ", codec.name())), "{wrong}");
            let missing = read(codec, serde_json::json!({ "items": [{ "price": 1 }, {}] }));
            assert!(missing.contains(": items[1]: missing field `price`"), "{missing}");
            let wrong = read(codec, serde_json::json!({ "items": [], "shape": { "Circle": { "radius": [] } } }));
            assert!(wrong.contains(": shape.Circle.radius: "), "{wrong}");
            let whole = read(codec, serde_json::json!(7));
            assert!(whole.contains(&format!("as {}: invalid type", codec.name())), "{whole}");
        }
        let after = Codec::Json.decode::<u64>(b"7 8").expect_err("there is more").to_string();
        assert!(after.starts_with("cannot be read as JSON: trailing"), "{after}");
    }

    #[test]
    fn raw_bytes_carry_bytes_and_nothing_else() {
        let payload = Codec::Raw.encode(&(ByteBuf::from(vec![0, 255]),)).expect("one argument of bytes");
        assert_eq!(payload, [0, 255]);
        assert_eq!(Codec::Raw.arguments::<(ByteBuf,)>(&payload), Ok((ByteBuf::from(vec![0, 255]),)));
        assert_eq!(Codec::Raw.arguments::<(Vec<u8>,)>(&payload), Ok((vec![0, 255],)));
        assert_eq!(Codec::Raw.arguments::<(String,)>(b"hi"), Ok(("hi".to_owned(),)));
        assert_eq!(Codec::Raw.encode(&()), Ok(Vec::new()));
        assert_eq!(Codec::Raw.encode(&vec![1_u8, 2]), Ok(vec![1, 2]));
        let error = Codec::Raw.encode(&(1_u64, 2_u64)).expect_err("numbers are not bytes");
        assert!(error.to_string().contains("raw bytes"), "{error}");
        Codec::Raw.arguments::<(u64,)>(b"12345678").expect_err("bytes are not a number");
        Codec::Raw.arguments::<(String,)>(&[0xff]).expect_err("not UTF-8");
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
