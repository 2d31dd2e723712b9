//! For the tests of what is built on Hopline: a broker for each, which nobody else has.
//!
//! `memory://` is one broker for the whole process, and `cargo test` runs the tests of a file side by side in one process:
//! two tests on `memory://` answer each other's calls. On a broker of its own, a test is alone:
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
//! Its time is tokio's: with `#[tokio::test(start_paused = true)]` a test of a deadline of an hour takes no time. That holds
//! for handlers that run in the test's own runtime, so not with [`Dispatch::Pool`](crate::Dispatch::Pool).

use uuid::Uuid;

/// The address of a broker in this process that nobody else has, for [`Client::connect`](crate::Client::connect) and
/// [`Server::connect`](crate::Server::connect).
///
/// The broker is there as long as somebody is connected to it: it ends, with all that waits there, when its last client
/// and its last server are dropped or closed.
#[must_use]
pub fn broker() -> String {
    format!("memory://{}", Uuid::new_v4().simple())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::transport::{Role, Transport};

    #[tokio::test]
    async fn each_address_is_a_broker_of_its_own() {
        use crate::topology::{Declaration, Queue, QueueKind};
        let [one, other] = [broker(), broker()];
        let connect = async |url: &str| Transport::connect(url, Role::Client).await.expect("it is in this process");
        let (first, second, stranger) = (connect(&one).await, connect(&one).await, connect(&other).await);
        first.declare(&[Declaration::Queue(Queue::new("queue", QueueKind::Classic))]).await.expect("a new queue");
        assert_eq!(second.count("queue").await.expect("an answer"), Some(0));
        assert_eq!(stranger.count("queue").await.expect("an answer"), None);
    }
}
