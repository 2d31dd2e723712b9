//! Reading a method's arguments from one array. Optional arguments at its end may be missing.
//!
//! So a method can get one more argument, and callers that do not know it yet are answered as before.

use std::cell::Cell;
use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapDeserializer;
use serde::de::{self, DeserializeOwned, DeserializeSeed, Deserializer, SeqAccess, Visitor};

/// The arguments of a method, as a handler takes them: a tuple of up to 16 types that serde can read. A method without
/// arguments takes `[(); 0]`. Arrays and `Vec`s of one type work as well.
///
/// A caller may leave out arguments at the end. They are then read as absent, if their type is an `Option`, or a struct
/// in which every field is an `Option` or has `#[serde(default)]`. So a method can get one more argument of such a
/// type, and callers that do not know it yet are answered as before.
///
/// ```
/// use hopline::{Context, Fault, Method, Service};
///
/// let join = |_: Context, (words, separator): (Vec<String>, Option<String>)| async move {
///     Ok::<_, Fault>(words.join(separator.as_deref().unwrap_or(", ")))
/// };
/// let service = Service::new("text", 1).method(Method::new("join"), join);
/// # let _ = service;
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a tuple of arguments",
    label = "a handler takes all arguments as one tuple",
    note = "write `(a,): (i64,)` for one argument, `(a, b): (i64, String)` for two, and `_: [(); 0]` for none"
)]
pub trait Arguments: Sized {
    /// The number of arguments, if it is fixed.
    #[doc(hidden)]
    const COUNT: Option<usize>;

    /// Reads one argument after the other.
    #[doc(hidden)]
    fn read<'de, S: SeqAccess<'de>>(elements: &mut Elements<S>) -> Result<Self, S::Error>;
}

macro_rules! tuples {
    ($($first:ident $($other:ident)*;)*) => {$(
        impl<$first: DeserializeOwned, $($other: DeserializeOwned),*> Arguments for ($first, $($other),*) {
            const COUNT: Option<usize> = Some([stringify!($first), $(stringify!($other)),*].len());

            fn read<'de, S: SeqAccess<'de>>(elements: &mut Elements<S>) -> Result<Self, S::Error> {
                Ok((elements.next::<$first>()?, $(elements.next::<$other>()?),*))
            }
        }
    )*};
}

tuples! {
    A; A B; A B C; A B C D; A B C D E; A B C D E F; A B C D E F G; A B C D E F G H; A B C D E F G H I; A B C D E F G H I J;
    A B C D E F G H I J K; A B C D E F G H I J K L; A B C D E F G H I J K L M; A B C D E F G H I J K L M N;
    A B C D E F G H I J K L M N O; A B C D E F G H I J K L M N O P;
}

impl Arguments for () {
    const COUNT: Option<usize> = Some(0);

    fn read<'de, S: SeqAccess<'de>>(_: &mut Elements<S>) -> Result<Self, S::Error> {
        Ok(())
    }
}

impl<T: DeserializeOwned, const N: usize> Arguments for [T; N] {
    const COUNT: Option<usize> = Some(N);

    fn read<'de, S: SeqAccess<'de>>(elements: &mut Elements<S>) -> Result<Self, S::Error> {
        let read: Vec<T> = (0..N).map(|_| elements.next()).collect::<Result<_, _>>()?;
        read.try_into().map_err(|_| de::Error::custom("another number of elements than there are"))
    }
}

impl<T: DeserializeOwned> Arguments for Vec<T> {
    const COUNT: Option<usize> = None;

    fn read<'de, S: SeqAccess<'de>>(elements: &mut Elements<S>) -> Result<Self, S::Error> {
        std::iter::from_fn(|| elements.array.next_element().transpose()).collect()
    }
}

/// Why a payload does not fit the arguments of a method.
#[derive(Debug, PartialEq)]
pub(crate) enum Misfit {
    /// The method takes another number of arguments than the payload has.
    Count { takes: usize, got: usize },
    /// Anything else, as a sentence.
    Other(String),
}

/// Reads the array of arguments. It is a seed, since serde passes no state to `Deserialize`.
pub(super) struct Array<'a, A> {
    /// Is set if an argument is missing that is not optional. The errors of the codecs are only text, so they cannot
    /// tell that.
    misses: &'a Cell<bool>,
    arguments: PhantomData<A>,
}

impl<'a, A: Arguments> Array<'a, A> {
    /// A seed that reports a missing argument in `misses`.
    pub(super) fn new(misses: &'a Cell<bool>) -> Self {
        Self { misses, arguments: PhantomData }
    }
}

impl<'de, A: Arguments> DeserializeSeed<'de> for Array<'_, A> {
    type Value = A;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<A, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de, A: Arguments> Visitor<'de> for Array<'_, A> {
    type Value = A;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an array of arguments")
    }

    fn visit_seq<S: SeqAccess<'de>>(self, array: S) -> Result<A, S::Error> {
        let mut elements = Elements { array, misses: false };
        let arguments = A::read(&mut elements);
        self.misses.set(elements.misses);
        arguments
    }

    /// A null instead of an array means no arguments: serde writes `()` so.
    fn visit_unit<E: de::Error>(self) -> Result<A, E> {
        self.visit_seq(de::value::SeqDeserializer::new(std::iter::empty::<()>()))
    }
}

/// The elements of the array, one after the other.
#[derive(Debug)]
pub struct Elements<S> {
    array: S,
    /// Whether an argument was missing that is not optional.
    misses: bool,
}

impl<'de, S: SeqAccess<'de>> Elements<S> {
    /// The next argument. If the array has ended, an argument that may be absent is absent, and any other is an error.
    fn next<T: DeserializeOwned>(&mut self) -> Result<T, S::Error> {
        if let Some(argument) = self.array.next_element()? {
            return Ok(argument);
        }
        let absent = T::deserialize(Missing(PhantomData));
        self.misses |= absent.is_err();
        absent
    }
}

/// Stands for an argument that was not sent. A type that can be absent reads from it; every other gets an error.
struct Missing<E>(PhantomData<E>);

impl<'de, E: de::Error> Deserializer<'de> for Missing<E> {
    type Error = E;

    fn deserialize_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, E> {
        Err(de::Error::custom("an argument is missing"))
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, E> {
        visitor.visit_none()
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, E> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, E> {
        visitor.visit_map(MapDeserializer::new(std::iter::empty::<((), ())>()))
    }

    serde::forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple
        tuple_struct map enum identifier ignored_any
    }
}

#[cfg(test)]
mod tests {
    use serde::{Deserialize, Serialize};

    use super::*;
    use crate::codec::Codec;
    use crate::codec::tests::STRUCTURED;

    #[test]
    fn too_few_and_too_many_arguments_are_counted() {
        let misfit = |takes, got| Misfit::Count { takes, got };
        for codec in STRUCTURED {
            let one = codec.encode(&(1,)).expect("writes");
            let three = codec.encode(&(1, vec![[2]], "3")).expect("writes");
            assert_eq!(codec.arguments::<(i64, i64)>(&one), Err(misfit(2, 1)), "{codec:?}");
            assert_eq!(codec.arguments::<(i64, Vec<[i64; 1]>)>(&three), Err(misfit(2, 3)), "{codec:?}");
            assert_eq!(codec.arguments::<(String, u8)>(&three), Err(misfit(2, 3)), "whatever they are: {codec:?}");
            assert_eq!(codec.arguments::<[(); 0]>(&one), Err(misfit(0, 1)), "{codec:?}");
            assert_eq!(codec.arguments::<()>(&three), Err(misfit(0, 3)), "{codec:?}");
            assert_eq!(codec.arguments::<[i64; 2]>(&one), Err(misfit(2, 1)), "{codec:?}");
            assert_eq!(codec.arguments::<Vec<i64>>(&one), Ok(vec![1]), "{codec:?}");
            let other = codec.arguments::<(i64, i64)>(&codec.encode(&(1, "two")).expect("writes"));
            assert!(matches!(&other, Err(Misfit::Other(_))), "{other:?}");
            let other = codec.arguments::<(String, Option<u8>)>(&one);
            assert!(matches!(&other, Err(Misfit::Other(_))), "none has to be there that is not: {other:?}");
            let other = codec.arguments::<(i64,)>(&codec.encode(&"one").expect("writes"));
            assert!(matches!(&other, Err(Misfit::Other(why)) if why.contains("an array of arguments")), "{other:?}");
        }
        // CBOR of a length that is told at its end, and with an end that is missing.
        assert_eq!(Codec::Cbor.arguments::<(i64, Option<i64>)>(&[0x9f, 1, 0xff]), Ok((1, None)));
        assert_eq!(Codec::Cbor.arguments::<(i64,)>(&[0x9f, 1, 2, 0xff]), Err(misfit(1, 2)));
        assert!(matches!(Codec::Cbor.arguments::<(i64, Option<i64>)>(&[0x9f, 1]), Err(Misfit::Other(_))));
        assert!(matches!(Codec::Cbor.arguments::<(i64, Option<i64>)>(&[0x82, 1]), Err(Misfit::Other(_))));
        assert!(matches!(Codec::Json.arguments::<(i64, Option<i64>)>(b"[1"), Err(Misfit::Other(_))));
        assert!(matches!(Codec::Json.arguments::<(i64, Option<i64>)>(b"[1,]"), Err(Misfit::Other(_))));
        assert!(matches!(Codec::Json.arguments::<(i64,)>(b"[1] 2"), Err(Misfit::Other(_))));
        assert!(matches!(Codec::MessagePack.arguments::<(i64, Option<i64>)>(&[0x92, 1]), Err(Misfit::Other(_))));
        let raw = |payload| Codec::Raw.arguments::<[(); 0]>(payload);
        assert_eq!((raw(b""), raw(b"x")), (Ok([]), Err(misfit(0, 1))));
        assert_eq!(Codec::Raw.arguments::<(String, String)>(b"x"), Err(misfit(2, 1)));
    }

    #[derive(Debug, Default, PartialEq, Serialize, Deserialize)]
    struct Page {
        #[serde(default)]
        from: u64,
        size: Option<u64>,
    }

    #[derive(Debug, PartialEq, Serialize, Deserialize)]
    struct Wrapped(Option<u64>);

    #[test]
    fn missing_arguments_that_may_be_absent_are() {
        for codec in STRUCTURED {
            let one = codec.encode(&(1,)).expect("writes");
            assert_eq!(codec.arguments(&one), Ok((1_u64, None::<String>)), "{codec:?}");
            let absent = (1_u64, Page::default(), Wrapped(None), None::<Vec<u8>>);
            assert_eq!(codec.arguments(&one), Ok(absent), "{codec:?}");
            let two = codec.encode(&(1, Page { from: 2, size: Some(3) })).expect("writes");
            assert_eq!(codec.arguments(&two), Ok((1_u64, Some(Page { from: 2, size: Some(3) }), None::<u8>)));
            // One that has to be there stands behind one that need not.
            let misfit = Misfit::Count { takes: 3, got: 1 };
            assert_eq!(codec.arguments::<(u64, Option<u64>, u64)>(&one), Err(misfit), "{codec:?}");
            let nothing = codec.encode(&()).expect("writes");
            assert_eq!(codec.arguments::<[(); 0]>(&nothing), Ok([]), "{codec:?}");
            assert_eq!(codec.arguments::<(Option<u64>,)>(&nothing), Ok((None,)), "{codec:?}");
        }
        assert_eq!(Codec::Raw.arguments(b"x"), Ok(("x".to_owned(), None::<u64>)));
        assert_eq!(Codec::Raw.arguments::<(Option<String>,)>(b""), Ok((None,)));
        assert_eq!(Codec::Raw.arguments(b"x"), Ok((Some("x".to_owned()),)));
    }

    #[test]
    fn arguments_that_are_left_out_cannot_make_up_a_struct() {
        #[derive(Debug, PartialEq, Deserialize)]
        struct Order {
            id: u64,
        }
        for codec in STRUCTURED {
            let none = codec.encode::<[(); 0]>(&[]).expect("writes");
            assert_eq!(codec.arguments::<(Order,)>(&none), Err(Misfit::Count { takes: 1, got: 0 }), "{codec:?}");
        }
    }
}
