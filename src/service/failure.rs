//! The errors that a method can return.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::codec::{Codec, CodecError};
use crate::error::{CallError, Code, Error, Fault};

/// The error that a method returns: a type of its own, or a [`Fault`].
///
/// A type of the method's own is any type with serde's `Serialize` and `Deserialize` and with `Debug`. It reaches the
/// caller as [`CallError::Service`]. A [`Fault`] reaches the caller as [`Error::Fault`]. The trait cannot be
/// implemented by hand.
///
/// ```
/// use hopline::{Call, CallError, Error, Failure, Fault};
///
/// # async fn example(plain: Call<u8>, own: Call<u8, String>) {
/// let _: Result<u8, Error> = plain.await;
/// let _: Result<u8, CallError<String>> = own.await;
/// # }
/// /// Works for calls of methods with and without an error of their own.
/// async fn or_zero<E: Failure>(call: Call<u8, E>) -> u8 {
///     match call.await.map_err(Into::<CallError<E>>::into) {
///         Ok(number) => number,
///         Err(error) => {
///             println!("{}", error.code());
///             0
///         }
///     }
/// }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not an error that a method can return",
    label = "not a `Fault`, and not `Serialize`, `Deserialize` and `Debug`",
    note = "derive `Debug`, `serde::Serialize` and `serde::Deserialize` for an error type of your own, or return `hopline::Fault`"
)]
pub trait Failure: Sized {
    /// The error that a call of the method fails with: [`CallError<Self>`](CallError), or plain [`Error`] for a
    /// [`Fault`].
    type Error: From<Error> + Into<CallError<Self>> + fmt::Debug;

    #[doc(hidden)]
    fn into_failure(self, codec: Codec) -> Result<Vec<u8>, Failed>;

    #[doc(hidden)]
    fn read(codec: Codec, payload: &[u8]) -> Self::Error;
}

/// What the handler of an event returns: nothing, or a `Result` whose error says that the event was not handled.
///
/// The error is any that a method can return: see [`Failure`]. In a [group](crate::Subscription::shared) an event that was
/// not handled is tried again. Without one, the error is logged. The trait cannot be implemented by hand.
///
/// ```
/// use hopline::{Context, EventResult};
///
/// fn heard<R: EventResult>(_: &impl Fn(Context, u64) -> R) {}
/// heard(&|_, order| println!("order {order}"));
/// heard(&|_, order| if order == 0 { Err("there is no order 0".to_owned()) } else { Ok(()) });
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not what the handler of an event can return",
    label = "not `()`, and not `Result<(), E>` with an error that a method can return"
)]
pub trait EventResult: sealed::Sealed + Send + 'static {
    #[doc(hidden)]
    type Error: Failure + Send + 'static;

    #[doc(hidden)]
    fn into_result(self) -> Result<(), Self::Error>;
}

impl EventResult for () {
    type Error = Fault;

    fn into_result(self) -> Result<(), Fault> {
        Ok(())
    }
}

impl<E: Failure + Send + 'static> EventResult for Result<(), E> {
    type Error = E;

    fn into_result(self) -> Self {
        self
    }
}

mod sealed {
    pub trait Sealed {}

    impl Sealed for () {}

    impl<E> Sealed for Result<(), E> {}
}

/// Why an error is not sent as the method's own error.
#[doc(hidden)]
#[derive(Debug)]
pub enum Failed {
    /// It is a fault.
    Fault(Fault),
    /// It cannot be encoded.
    Codec(CodecError),
}

#[diagnostic::do_not_recommend]
impl<E: Serialize + for<'de> Deserialize<'de> + fmt::Debug> Failure for E {
    type Error = CallError<E>;

    fn into_failure(self, codec: Codec) -> Result<Vec<u8>, Failed> {
        codec.encode(&self).map_err(Failed::Codec)
    }

    fn read(codec: Codec, payload: &[u8]) -> CallError<E> {
        match codec.decode(payload) {
            Ok(error) => CallError::Service(error),
            Err(error) => Error::UnreadableReply(CodecError(format!("the service's error {}", error.0))).into(),
        }
    }
}

impl Failure for Fault {
    type Error = Error;

    fn into_failure(mut self, _: Codec) -> Result<Vec<u8>, Failed> {
        if self.code == Code::Ok {
            self.code = Code::Internal;
            self.message = format!("the method failed with a fault of code OK, which says nothing: {}", self.message);
        }
        Err(Failed::Fault(self))
    }

    fn read(_: Codec, _: &[u8]) -> Error {
        Error::Fault(Self::new(
            Code::Unknown,
            "the method returned an error of its own: name its type with `.fails_with()` to read it",
        ))
    }
}
