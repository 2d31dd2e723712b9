//! What comes back from a call, as middleware sees it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;

use crate::codec::Codec;
use crate::error::{Code, EndOfCall, Error};
use crate::event::Published;
use crate::frame::Entries;

/// What came back from a call: the method's result, or the method's own error. Cloning is cheap.
///
/// ```
/// use hopline::{Error, Invocation, Middleware, Next, Reply};
///
/// /// Prints the size of what comes back.
/// struct Sizes;
///
/// impl Middleware for Sizes {
///     async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
///         let reply = next.run(call).await?;
///         println!("{} bytes from {:?}", reply.payload().len(), reply.instance());
///         Ok(reply)
///     }
/// }
/// ```
#[derive(Clone)]
pub struct Reply {
    pub(crate) codec: Codec,
    pub(crate) payload: Bytes,
    pub(crate) own_error: bool,
    pub(crate) instance: Option<Arc<str>>,
    pub(crate) handler_time: Option<Duration>,
    pub(crate) metadata: Entries,
    /// For an event that a client publishes: who has got it.
    pub(crate) published: Published,
}

impl Reply {
    /// A result, for middleware that answers in place of the method. `codec` must be the codec of the call.
    ///
    /// ```
    /// use hopline::{Error, Invocation, Middleware, Next, Reply};
    ///
    /// /// Answers `ping` itself, wherever it is added.
    /// struct Pong;
    ///
    /// impl Middleware for Pong {
    ///     async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
    ///         match call.method() {
    ///             "ping" => Reply::result(call.codec(), &"pong"),
    ///             _ => next.run(call).await,
    ///         }
    ///     }
    /// }
    /// ```
    ///
    /// # Errors
    /// [`Error::Codec`] if the result cannot be encoded.
    pub fn result<T: Serialize + ?Sized>(codec: Codec, result: &T) -> Result<Self, Error> {
        Ok(Self { payload: codec.encode(&result)?.into(), ..Self::empty(codec) })
    }

    /// An error of the method's own type, for middleware that answers in place of the method. `codec` must be the codec
    /// of the call.
    ///
    /// # Errors
    /// [`Error::Codec`] if the error cannot be encoded.
    pub fn own_error<E: Serialize + ?Sized>(codec: Codec, error: &E) -> Result<Self, Error> {
        Ok(Self { own_error: true, ..Self::result(codec, error)? })
    }

    /// The reply of something that has no result, such as a oneway call.
    pub(crate) fn empty(codec: Codec) -> Self {
        Self {
            codec,
            payload: Bytes::new(),
            own_error: false,
            instance: None,
            handler_time: None,
            metadata: Entries::default(),
            published: Published::ToAll,
        }
    }

    /// Whether the method returned its own error. The payload is then that error.
    #[must_use]
    pub fn is_own_error(&self) -> bool {
        self.own_error
    }

    /// The codec of the payload.
    #[must_use]
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// The result or the method's own error, encoded with the codec and not compressed. Empty after a oneway call, a
    /// broadcast or an event on a client.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// On a client, the instance that replied, if one did.
    #[must_use]
    pub fn instance(&self) -> Option<&str> {
        self.instance.as_deref()
    }

    /// On a client, how long the handler ran, as the server measured it.
    #[must_use]
    pub fn handler_time(&self) -> Option<Duration> {
        self.handler_time
    }

    /// The metadata of the reply under `name`. Middleware on the server has set it.
    #[must_use]
    pub fn metadata(&self, name: &str) -> Option<&str> {
        self.metadata.get(name)
    }

    /// All metadata of the reply, as names and texts in the order in which they were set.
    pub fn metadata_entries(&self) -> impl Iterator<Item = (&str, &str)> {
        self.metadata.iter()
    }

    /// Sets metadata of the reply, in place of an earlier value under `name`. On a server it is sent to the client. It
    /// has the same limits as [`Call::metadata`](crate::Call::metadata).
    pub fn set_metadata(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.metadata.set(name.into(), value.into());
    }
}

impl From<&Result<Reply, Error>> for EndOfCall {
    fn from(outcome: &Result<Reply, Error>) -> Self {
        match outcome {
            Ok(reply) if reply.own_error => Self::ServiceError,
            Ok(_) => Self::Coded(Code::Ok),
            Err(error) => error.into(),
        }
    }
}

impl fmt::Debug for Reply {
    /// Without what may be secret: payload and metadata.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reply")
            .field("codec", &self.codec)
            .field("own_error", &self.own_error)
            .field("size", &self.payload.len())
            .field("instance", &self.instance)
            .field("handler_time", &self.handler_time)
            .finish_non_exhaustive()
    }
}
