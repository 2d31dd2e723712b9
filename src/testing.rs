//! For tests of programs that use Hopline: a broker for each test, which fails when the test says so, and fakes of
//! services that do not run.
//!
//! `memory://` is one broker for the whole process, and `cargo test` runs the tests of a file in one process at the
//! same time. So two tests on `memory://` would answer each other's calls. On a [`broker`] of its own, a test is alone:
//!
//! ```test_harness
//! use hopline::{Client, Error, Server, testing};
//!
//! #[hopline::service]
//! trait Greeter {
//!     async fn greet(&self, name: String) -> String;
//! }
//!
//! struct Polite;
//!
//! impl Greeter for Polite {
//!     async fn greet(&self, name: String) -> String {
//!         format!("Good day, {name}")
//!     }
//! }
//!
//! #[tokio::test]
//! async fn everybody_is_greeted() -> Result<(), Error> {
//!     let broker = testing::broker();
//!     let _server = Server::connect(&broker).await?.serve(GreeterServer::new(Polite)).start().await?;
//!     let client = Client::connect(&broker).await?;
//!     assert_eq!(GreeterClient::new(&client).greet("Ada".to_owned()).await?, "Good day, Ada");
//!     Ok(())
//! }
//! ```
//!
//! # Fakes
//!
//! A [`Fake`] takes the place of a service that the program under test calls. It answers as it is told, and remembers
//! what it was asked:
//!
//! ```test_harness
//! use hopline::testing::{self, Fake};
//! use hopline::{Client, Code, Error, Fault};
//!
//! /// What is tested: it calls a service that somebody else runs.
//! async fn total(client: &Client, prices: Vec<u64>) -> Result<u64, Error> {
//!     client.call("calculator", "sum", (prices,)).await
//! }
//!
//! #[tokio::test]
//! async fn the_calculator_is_asked_for_the_sum() -> Result<(), Error> {
//!     let broker = testing::broker();
//!     let calculator = Fake::new("calculator", 1).returns("sum", 5_u64).serve(&broker).await?;
//!     let client = Client::connect(&broker).await?;
//!     assert_eq!(total(&client, vec![2, 3]).await?, 5);
//!     calculator.assert_called("sum", (vec![2_u64, 3],));
//!     Ok(())
//! }
//!
//! #[tokio::test]
//! async fn a_calculator_that_cannot_is_not_hidden() -> Result<(), Error> {
//!     let broker = testing::broker();
//!     let full = Fault::new(Code::ResourceExhausted, "too many prices");
//!     let _calculator = Fake::new("calculator", 1).fails("sum", full.clone()).serve(&broker).await?;
//!     let client = Client::connect(&broker).await?;
//!     let failed = total(&client, vec![]).await.expect_err("it fails");
//!     assert!(failed.to_string().contains("too many prices"));
//!     Ok(())
//! }
//! ```
//!
//! # Time
//!
//! A broker in memory uses tokio's clock. With `#[tokio::test(start_paused = true)]`, which needs tokio's feature
//! `test-util`, the clock stands still while anything can run, and jumps ahead when everything waits. So a test of a
//! deadline of an hour takes no time, and does not fail on a busy machine. This holds for everything in the test's own
//! runtime. It does not hold for handlers with [`Dispatch::Pool`](crate::Dispatch::Pool) or
//! [`Dispatch::Blocking`](crate::Dispatch::Blocking), nor for RabbitMQ.
//!
//! # Faults
//!
//! A broker in memory fails when a test says so, with [`Broker::alarm`], [`Broker::stall`], [`Broker::cut`] and
//! [`Broker::take_down`], until [`Broker::restore`]. With a paused clock, this shows what a program does while its
//! broker is down:
//!
//! ```test_harness
//! use std::time::Duration;
//!
//! use hopline::testing::{self, Fake};
//! use hopline::{Client, Error};
//!
//! #[tokio::test(start_paused = true)]
//! async fn a_call_outlives_half_a_minute_without_a_broker() -> Result<(), Error> {
//!     let broker = testing::broker();
//!     let _calculator = Fake::new("calculator", 1).returns("add", 5).serve(&broker).await?;
//!     let client = Client::builder().timeout(Duration::from_secs(60)).connect(&broker).await?;
//!     broker.take_down();
//!     let call = client.call::<i64>("calculator", "add", (2, 3)).start().await?;
//!     tokio::time::sleep(Duration::from_secs(30)).await;
//!     broker.restore();
//!     assert_eq!(call.await?, 5);
//!     Ok(())
//! }
//! ```

mod fake;

use std::fmt;
use std::sync::Arc;

use uuid::Uuid;

pub use self::fake::{Fake, FakeServer};
use crate::transport::memory;

/// A broker in this process that only this test has.
///
/// It stands for its address: [`Client::connect`](crate::Client::connect) and
/// [`Server::connect`](crate::Server::connect) accept `&broker`. Code that needs a `String` gets it by
/// `broker.to_string()`.
///
/// The broker ends, with its messages, when this is dropped and nobody is connected to it any more.
#[must_use]
pub fn broker() -> Broker {
    let name = Uuid::new_v4().simple().to_string();
    Broker { url: format!("memory://{name}"), state: memory::MemoryBroker::named(&name) }
}

/// A [`broker`] in this process, and its faults. A fault begins at once, and lasts until [`Broker::restore`]. Several
/// can be there at the same time.
///
/// ```
/// use hopline::{Client, Error, State, testing};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Error> {
/// let broker = testing::broker();
/// let client = Client::connect(&broker).await?;
/// let mut state = client.state();
/// broker.take_down();
/// state.wait_for(|state| matches!(state, State::Reconnecting { .. })).await.expect("the client is there");
/// broker.restore();
/// state.wait_for(|state| *state == State::Ready).await.expect("the client is there");
/// # Ok(()) }
/// ```
pub struct Broker {
    url: String,
    state: Arc<memory::MemoryBroker>,
}

impl Broker {
    /// The address, such as `memory://3f2a...`.
    #[must_use]
    pub fn url(&self) -> &str {
        &self.url
    }

    /// Raises an alarm, as RabbitMQ does when it is short of memory or disk. `reason` is for example `low on memory`.
    ///
    /// The broker accepts no messages, and says so to those who publish: clients and servers become
    /// [`State::Blocked`](crate::State::Blocked). Calls wait for [`blocked_wait`](crate::ClientBuilder::blocked_wait),
    /// and then fail with [`Error::Blocked`](crate::Error::Blocked).
    pub fn alarm(&self, reason: &str) {
        self.state.alarm(reason);
    }

    /// Stalls the broker: it accepts, answers and delivers nothing, and tells nobody. Connections stay open.
    ///
    /// Calls end by their deadlines. Clients and servers that wait for an answer become
    /// [`State::Degraded`](crate::State::Degraded) after some seconds. Those who connect wait for their
    /// [`connect_timeout`](crate::ClientBuilder::connect_timeout).
    pub fn stall(&self) {
        self.state.stall();
    }

    /// Cuts all connections, as a network may do for a moment. Clients and servers can reconnect at once. What was
    /// delivered and not settled is delivered again.
    pub fn cut(&self) {
        self.state.cut();
    }

    /// Takes the broker down: all connections are lost, and nobody can connect. Its queues keep their messages.
    pub fn take_down(&self) {
        self.state.take_down();
    }

    /// Ends all faults. What they held up goes on in order, and connections are accepted again.
    pub fn restore(&self) {
        self.state.restore();
    }
}

/// Its address.
impl AsRef<str> for Broker {
    fn as_ref(&self) -> &str {
        &self.url
    }
}

/// Its address.
impl fmt::Display for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.url)
    }
}

impl fmt::Debug for Broker {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Broker").field(&self.url).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topology::{Declaration, Queue, QueueKind};
    use crate::transport::{Role, Transport};

    async fn connect(broker: &Broker) -> Transport {
        Transport::connect(broker.url(), Role::Client).await.expect("it is in this process")
    }

    #[tokio::test]
    async fn each_address_is_a_broker_of_its_own() {
        let [one, other] = [broker(), broker()];
        let (first, second, stranger) = (connect(&one).await, connect(&one).await, connect(&other).await);
        first.declare(&[Declaration::Queue(Queue::new("queue", QueueKind::Classic))]).await.expect("a new queue");
        assert_eq!(second.count("queue").await.expect("an answer"), Some(0));
        assert_eq!(stranger.count("queue").await.expect("an answer"), None);
    }

    #[tokio::test]
    async fn a_broker_outlives_its_connections_until_it_is_dropped() {
        let broker = broker();
        let first = connect(&broker).await;
        first.declare(&[Declaration::Queue(Queue::new("queue", QueueKind::Classic))]).await.expect("a new queue");
        drop(first);
        assert_eq!(connect(&broker).await.count("queue").await.expect("an answer"), Some(0));
        let url = broker.to_string();
        drop(broker);
        let later = Transport::connect(&url, Role::Client).await.expect("it is in this process");
        assert_eq!(later.count("queue").await.expect("an answer"), None);
    }
}
