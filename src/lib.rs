//! Remote procedure calls over RabbitMQ: typed request/reply, oneway, broadcast and events between services that share
//! a broker.
//!
//! A trait is the contract. [`#[hopline::service]`](service) makes of it a server, to be given an implementation, and a
//! client, whose methods return [`Call`]s:
//!
//! ```
//! use hopline::{Client, Error, Server};
//!
//! #[hopline::service]
//! pub trait Calculator {
//!     async fn add(&self, a: i64, b: i64) -> i64;
//! }
//!
//! struct Calc;
//!
//! impl Calculator for Calc {
//!     async fn add(&self, a: i64, b: i64) -> i64 {
//!         a + b
//!     }
//! }
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Error> {
//! let server = Server::connect("memory://").await?.serve(CalculatorServer::new(Calc)).start().await?;
//! let client = Client::connect("memory://").await?;
//! assert_eq!(CalculatorClient::new(&client).add(2, 3).await?, 5);
//! server.drain().await;
//! # Ok(()) }
//! ```
//!
//! The nouns:
//!
//! - A **service trait**, or a [`Service`] put together from [`Method`]s by hand.
//! - [`Server`]: connects, serves services and [subscriptions](Server::subscribe), drains.
//! - [`Client`]: connects, makes calls, [publishes](Client::publish) events.
//! - [`Call`]: one invocation as a value: awaited, [started](Call::start), with a [callback](Call::then),
//!   [sent](Call::send) oneway, or made to [all](Call::all) instances. Its options are on it, not on the client.
//! - [`DeadLetters`]: what could not be run, for an operator.
//! - [`Context`]: what a handler may know of the call it handles.
//! - [`Error`]: what went wrong, in few variants. A method with an error type of its own fails with a [`CallError`], which is
//!   that error or an [`Error`].
//!
//! One URL picks the broker: `amqp://user:password@host:port/vhost` is RabbitMQ, and `memory://` or `memory://name` one
//! in the process, which means the same, needs nothing, and ends with its last connection. `amqps://` asks for the cargo
//! feature `tls`, which also has `Tls`: a CA and a certificate of one's own.
//!
//! Everything here runs on tokio; a program that is not async has [`blocking::wait`].
//!
//! Spans and events go to [`tracing`](https://docs.rs/tracing). lapin, which speaks AMQP here, logs every returned
//! message in full at `WARN`, such as each call that nobody serves, and some ends of connections at `ERROR`, wanted ones
//! among them. All that matters of it comes back as an error or is logged here: filter with `lapin=off`.
//!
//! # Testing
//!
//! Tests of services and their callers need no RabbitMQ. Give each a broker of its own, [`testing::broker`]: on `memory://`,
//! which is one broker for the whole process, tests that run side by side answer each other's calls.

#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

// In the order in which a call meets them.
mod call;
mod client;
mod server;
mod service;
mod context;
mod registry;
mod state;
mod dead;
mod error;
mod codec;
mod compression;
mod lanes;
mod outbox;
mod waiting;
mod window;
mod clock;
mod pace;
mod frame;
mod middleware;
mod panics;
mod route;
#[doc(hidden)]
pub mod topology;
#[doc(hidden)]
pub mod transport;
#[cfg(feature = "bench")]
#[doc(hidden)]
pub mod bench;
pub mod blocking;
pub mod testing;
#[cfg(doctest)]
mod guide;

pub use hopline_macros::service;

pub use call::{Answered, Broadcast, BroadcastReply, Call, Oneway, Pending};
pub use client::{Absent, Client, ClientBuilder, Coalesce, Published, Traffic, WhenFull};
pub use codec::{Arguments, Codec, CodecError};
pub use compression::Compression;
pub use context::Context;
pub use dead::{
    DeadLetter, DeadLetters, DeadLettersBuilder, EarlierDeath, Fate, Handled, LetterKind, Listed, WhichLetters,
};
pub use error::{CallError, Code, Error, Fault, Unanswered};
pub use middleware::{Finished, Invocation, Middleware, Next, Reply, Style};
pub use registry::{Instance, InstanceStats, MethodInfo};
pub use server::{Caller, Running, Server, ServerBuilder};
pub use service::{Dispatch, Failure, IntoService, Method, Service};
pub use state::State;
#[cfg(feature = "tls")]
pub use transport::Tls;
