//! What came back of a call, as middleware sees it.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;

use crate::codec::Codec;
use crate::error::Error;
use crate::frame::Entries;

/// What came back: the method's result, or the error that the method itself returned. Cloning is cheap.
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
    /// Of an event, whether a subscriber has missed it.
    pub(crate) missed: bool,
}

impl Reply {
    /// A result that a middleware answers with, in place of the method. The codec is that of the call.
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
    /// [`Error::Codec`] for what cannot be written.
    pub fn result<T: Serialize + ?Sized>(codec: Codec, result: &T) -> Result<Self, Error> {
        Ok(Self { payload: codec.encode(&result)?.into(), ..Self::empty(codec) })
    }

    /// An error of the method's own type that a middleware answers with, in place of the method.
    ///
    /// # Errors
    /// [`Error::Codec`] for what cannot be written.
    pub fn own_error<E: Serialize + ?Sized>(codec: Codec, error: &E) -> Result<Self, Error> {
        Ok(Self { own_error: true, ..Self::result(codec, error)? })
    }

    /// That something was done which has no result.
    pub(crate) fn empty(codec: Codec) -> Self {
        Self {
            codec,
            payload: Bytes::new(),
            own_error: false,
            instance: None,
            handler_time: None,
            metadata: Entries::default(),
            missed: false,
        }
    }

    /// Whether the method returned its own error, which is then the payload.
    #[must_use]
    pub fn is_own_error(&self) -> bool {
        self.own_error
    }

    /// How the payload is written.
    #[must_use]
    pub fn codec(&self) -> Codec {
        self.codec
    }

    /// The result, or the method's own error, as the codec writes it, never compressed. Empty where there is none: after a oneway
    /// call, a broadcast or an event on a client.
    #[must_use]
    pub fn payload(&self) -> &[u8] {
        &self.payload
    }

    /// On a client, the instance that answered, if one did.
    #[must_use]
    pub fn instance(&self) -> Option<&str> {
        self.instance.as_deref()
    }

    /// On a client, how long the handler ran, as the server says.
    #[must_use]
    pub fn handler_time(&self) -> Option<Duration> {
        self.handler_time
    }

    /// What the reply says under `name`, set by a middleware of the server.
    #[must_use]
    pub fn metadata(&self, name: &str) -> Option<&str> {
        self.metadata.get(name)
    }

    /// All that the reply says, names and texts in the order in which they were set.
    pub fn metadata_entries(&self) -> impl Iterator<Item = (&str, &str)> {
        self.metadata.iter()
    }

    /// Lets the reply say this under `name`, instead of what it said there. On a server it goes to the client, within the
    /// bounds of [`Call::metadata`](crate::Call::metadata).
    pub fn set_metadata(&mut self, name: impl Into<String>, value: impl Into<String>) {
        self.metadata.set(name.into(), value.into());
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
