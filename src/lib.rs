//! Remote procedure calls over RabbitMQ: typed calls, oneway calls, broadcasts and events between services that share a
//! broker.
//!
//! This page is a tour. After it you know the five types that matter: [`Server`], [`Client`], [`Call`], [`Context`] and
//! [`Error`]. The guide, in `docs/guide` of the repository, goes on from there, a chapter for each task.
//!
//! # The contract is a trait
//!
//! [`#[hopline::service]`](service) reads a trait, and writes two types for it: `CalculatorServer`, which is given an
//! implementation, and `CalculatorClient`, which makes calls.
//!
//! ```
//! use hopline::{Client, Context, Error, Server};
//!
//! #[hopline::service]
//! pub trait Calculator {
//!     async fn add(&self, a: i64, b: i64) -> i64;
//!     /// With a `Context`, the method learns about the call. No argument is sent for it.
//!     async fn whoami(&self, ctx: &Context) -> String;
//!     /// Nobody waits for a oneway call. The broker keeps it until some instance has run it.
//!     #[rpc(oneway)]
//!     async fn log(&self, line: String);
//! }
//!
//! struct Calc;
//!
//! impl Calculator for Calc {
//!     async fn add(&self, a: i64, b: i64) -> i64 {
//!         a + b
//!     }
//!     async fn whoami(&self, ctx: &Context) -> String {
//!         ctx.instance().to_owned()
//!     }
//!     async fn log(&self, line: String) {
//!         println!("{line}");
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
//! # `Server` serves
//!
//! A [`Server`] connects and serves any number of services. Start several, in as many processes as you like: they share the
//! calls. One that is told to end [drains](Running::drain): it finishes what runs, and gives back the rest, so no call is
//! lost.
//!
//! ```no_run
//! # use hopline::{Error, Server, Service};
//! # async fn main_of_it(calculator: Service) -> Result<(), Error> {
//! // HOPLINE_URL=amqp://user:password@broker.example.com
//! Server::connect_env().await?.serve(calculator).run_until_signal().await
//! # }
//! ```
//!
//! [`ServerBuilder`] has settings. [`Running`] is a server that serves: [`Running::state`] tells whether all is well. A
//! [`Service`] can also be put together by hand, from [`Method`]s.
//!
//! # `Client` makes calls, and a `Call` is a value
//!
//! A [`Client`] holds one connection, which all its clones share. What it makes is a [`Call`]: nothing is sent before you
//! say how you want to wait. Options such as [`timeout`](Call::timeout) are on the call.
//!
//! ```
//! # use std::time::Duration;
//! # use futures::StreamExt;
//! # use hopline::{Client, Context, Error, Server};
//! # #[hopline::service]
//! # pub trait Calculator {
//! #     async fn add(&self, a: i64, b: i64) -> i64;
//! #     async fn whoami(&self, ctx: &Context) -> String;
//! #     #[rpc(oneway)]
//! #     async fn log(&self, line: String);
//! # }
//! # struct Calc;
//! # impl Calculator for Calc {
//! #     async fn add(&self, a: i64, b: i64) -> i64 { a + b }
//! #     async fn whoami(&self, ctx: &Context) -> String { ctx.instance().to_owned() }
//! #     async fn log(&self, _: String) {}
//! # }
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Error> {
//! # let url = hopline::testing::broker();
//! # let server = Server::connect(&url).await?.serve(CalculatorServer::new(Calc)).start().await?;
//! # let client = Client::connect(&url).await?;
//! let calc = CalculatorClient::new(&client);
//!
//! // Wait for the result.
//! let five = calc.add(2, 3).timeout(Duration::from_secs(2)).await?;
//! // Send it now, and collect the result later.
//! let pending = calc.add(five, 3).start().await?;
//! assert_eq!(pending.await?, 8);
//! // Have a function called with the outcome.
//! calc.add(2, 3).then(|outcome| println!("{outcome:?}"));
//! // Oneway: this returns when the broker has it.
//! calc.log("hello".into()).send().await?;
//! // Broadcast: ask all instances, and take what comes within the time.
//! for reply in calc.whoami().all().gather(Duration::from_millis(200)).await? {
//!     println!("{} says {:?}", reply.instance, reply.outcome);
//! }
//! // Without a trait.
//! let seven: i64 = client.call("calculator", "add", (3, 4)).await?;
//! # assert_eq!(seven, 7);
//! // An event goes to everybody who subscribes to it, and to nobody if there is none.
//! client.publish("sum.done", &seven).await?;
//! # server.drain().await;
//! # Ok(()) }
//! ```
//!
//! A call that is dropped is cancelled, and so is its handler. [`Server::subscribe`] handles events; in a
//! [group](Subscription::shared) the broker keeps them, and each is handled by one instance. [`ClientBuilder`] has settings.
//!
//! # `Context` is what a handler knows of its call
//!
//! How much time is left, who calls, which attempt it is, what the caller sent beside the arguments: [`Context`] tells. A call
//! that a handler makes takes over deadline and trace by itself.
//!
//! # Around calls
//!
//! A [`Middleware`] goes around every call of a client, a service or a server: an access log, tokens, a retry. What each call of
//! a client is to carry, [`ClientBuilder::metadata`] adds.
//!
//! # `Error` says what went wrong, and whether it may have run
//!
//! [`Error`] has a variant for each thing a caller can do something about, and reads as a sentence. A method that is declared
//! `-> Result<T, E>` fails with [`CallError<E>`](CallError), which is its own error or an [`Error`].
//!
//! ```
//! # use hopline::{Client, Error};
//! # async fn example(client: Client) -> Result<i64, Error> {
//! match client.call::<i64>("calculator", "add", (2, 3)).await {
//!     // Nobody serves it: is a server running, and on the same namespace?
//!     Err(Error::NoService { .. }) => Ok(0),
//!     // It has not run, so it can be tried again.
//!     Err(error) if !error.may_have_run() => client.call("calculator", "add", (2, 3)).await,
//!     outcome => outcome,
//! }
//! # }
//! ```
//!
//! # Where it connects
//!
//! The address picks the broker: `amqp://user:password@host:port/vhost` is RabbitMQ, and `memory://` is a broker in this
//! process, which means the same and needs nothing. `amqps://` takes the cargo feature `tls`, which also has `Tls`: a CA and a
//! certificate of your own. [`ClientBuilder::connect`] has all of what an address may say, and [`environment`] the variables
//! that say it for you. A connection that is lost is made again, for as long as it takes.
//!
//! Everything runs on tokio. A program that is not async has [`blocking::wait`].
//!
//! # Testing
//!
//! Tests need no RabbitMQ. Give each a broker of its own, [`testing::broker`]: on `memory://`, which is one broker for the
//! whole process, tests that run side by side answer each other's calls. A [`testing::Fake`] takes the place of a service that
//! a test does not have.
//!
//! # Without Rust types
//!
//! With the cargo feature `schema`, a service tells what its methods take and return, as JSON Schema, and the module
//! `dynamic` calls them with JSON values, which are checked before they are sent.
//!
//! # Metrics
//!
//! With the cargo feature `metrics`, the module `metrics` tells what clients and servers have counted, as text for Prometheus.
//!
//! # For operators
//!
//! A oneway call that fails in every attempt is kept: [`DeadLetters`] shows it, has it run again, or drops it. [`Groups`]
//! tells which groups of subscribers there are and how far each is behind, and removes those that nobody needs any more. So
//! does the command `hopline`, of the crate `hopline-cli`.
//!
//! Spans and events go to [`tracing`](https://docs.rs/tracing). lapin, which speaks AMQP here, logs every returned message in
//! full at `WARN`, such as each call that nobody serves, and some ends of connections at `ERROR`, wanted ones among them. What
//! matters of it comes back as an error or is logged here: filter with `lapin=off`.

#![cfg_attr(not(test), warn(clippy::print_stdout, clippy::print_stderr))]

// In the order in which a call meets them.
mod call;
mod client;
mod server;
mod service;
mod context;
mod event;
mod registry;
mod route;
mod rules;
mod document;
mod state;
mod subscription;
mod settings;
mod dead;
mod groups;
mod error;
mod codec;
mod compression;
mod headers;
mod limits;
mod map;
mod outgoing;
mod outcome_span;
mod clock;
#[cfg(feature = "metrics")]
mod counting;
mod pace;
mod frame;
mod middleware;
mod panics;
mod exchanges;
#[doc(hidden)]
pub mod topology;
#[doc(hidden)]
pub mod transport;
#[cfg(feature = "bench")]
#[doc(hidden)]
pub mod bench;
pub mod blocking;
#[cfg(feature = "schema")]
pub mod dynamic;
pub mod environment;
#[cfg(feature = "metrics")]
pub mod metrics;
pub mod testing;
/// What the code needs that `#[hopline::service]` writes, beside the API.
#[doc(hidden)]
pub mod generated {
    pub use crate::service::{Probe, Undescribed};
}
#[cfg(doctest)]
mod guide;

pub use hopline_macros::{event, service};

pub use call::{Answered, Broadcast, BroadcastReply, Call, Oneway, Pending, Quorum};
pub use client::{Absent, Client, ClientBuilder, Coalesce, Publish, Rules, Traffic, WhenFull};
pub use codec::{Arguments, Codec, CodecError};
pub use compression::Compression;
pub use context::Context;
pub use dead::{
    DeadLetter, DeadLetters, DeadLettersBuilder, EarlierDeath, Fate, Handled, LetterKind, Listed, WhichLetters,
};
pub use document::{
    Histogram, Instance, InstanceStats, LastFault, MethodInfo, MethodStats, RuleInForce, Tapped, TappedCall,
};
#[cfg(feature = "schema")]
pub use document::{MethodSchema, ParameterSchema, ServiceSchema};
pub use error::{CallError, Code, Error, Fault, Unanswered};
pub use event::{Event, Published};
pub use groups::{Group, GroupCounts, Groups, GroupsBuilder, ReplayPosition};
pub use middleware::{
    Adaptive, AdaptiveCounts, Breaker, BreakerState, CacheCounts, FairShare, FairShareCounts, Finished, Invocation,
    Middleware, Next, PolicyCounts, Quarantine, QuarantineCounts, RateCounts, RateLimit, Reply, ResultCache,
    ShedCounts, Shedding, Style,
};
pub use registry::{Change, Pong, Registry, ServiceQueues};
pub use route::{Route, Weights};
pub use rules::{BreakerRule, Rule, RuleChange};
pub use server::{Caller, Readiness, Running, Server, ServerBuilder, ServerHealth};
pub use service::{Dispatch, EventResult, Failure, IntoService, Method, QueueFull, Replay, Service};
pub use state::State;
pub use subscription::Subscription;
pub use topology::ServiceId;
#[cfg(feature = "tls")]
pub use transport::{QueueCount, Tls};
