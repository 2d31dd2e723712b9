//! Remote procedure calls over RabbitMQ.

pub mod blocking;
mod call;
mod client;
mod codec;
mod context;
mod error;
mod frame;
mod registry;
mod server;
mod service;
#[doc(hidden)]
pub mod topology;
#[doc(hidden)]
pub mod transport;

pub use hopline_macros::service;

pub use call::{Broadcast, BroadcastReply, Call, Oneway, Pending, Reply};
pub use client::{Client, ClientBuilder};
pub use codec::{Codec, CodecError};
pub use context::Context;
pub use error::{Code, Error, Fault};
pub use registry::{Instance, InstanceStats, MethodInfo};
pub use server::{Running, Server, ServerBuilder};
pub use service::{Dispatch, Failure, Method, Service};
