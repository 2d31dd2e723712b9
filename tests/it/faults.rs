//! What happens when something breaks: every call still ends with a true outcome. The tests use RabbitMQ nodes of their
//! own.
//!
//! `HOPLINE_TEST_NODE` names the version of the nodes, 3.10 or 4.3. The tests that need a node are ignored unless they
//! are asked for. They run one at a time, so that a fault does not hit the calls of another test:
//! `scripts/test faults-4.3` runs all of them, and `HOPLINE_TEST_NODE=4.3 cargo test --test it faults::broker --
//! --include-ignored --test-threads=1` runs some.

mod broker;
mod clients;
mod cluster;
mod dead;
mod deleted;
mod exchanges;
mod link;
mod maintenance;
mod nested;
mod node;
mod policies;
mod proxy;
mod receipts;
mod refused;
mod taken_back;
mod unanswered;
mod watching;
mod workers;

use std::future::IntoFuture as _;
use std::ops::Range;
use std::time::Duration;

use futures::future::join_all;
use hopline::{Call, Client, Error, Pending, Running};
use tokio::sync::mpsc;

use crate::support::{Arrival, Held, Scene, hold, soon};

/// A time-out that is longer than [`soon`] waits: a call that ends within `soon` did not end by its deadline.
const LONG: Duration = Duration::from_secs(300);

type Arrivals = mpsc::UnboundedReceiver<Arrival>;

/// A server that runs this many calls at a time and lets others wait. It holds each call until the test lets it go.
async fn worker(scene: &Scene, concurrency: usize) -> (Running, Arrivals) {
    let Held { service, arrived } = Held::new();
    (scene.serve(service.concurrency(concurrency).prefetch(64)).await, arrived)
}

/// Calls that a [`worker`] holds, or will hold.
async fn on_their_way(client: &Client, numbers: Range<u64>) -> Vec<Pending<u64>> {
    let mut pending = Vec::new();
    for number in numbers {
        pending.push(hold(client, number).timeout(LONG).start().await.expect("on its way"));
    }
    pending
}

/// How each of the calls ends. All of them end before their deadlines.
async fn ends(pending: Vec<Pending<u64>>) -> Vec<Result<u64, Error>> {
    soon(join_all(pending)).await
}

/// The number of a call that is made after all others.
const NEXT: u64 = 1_000_000;

/// Checks that a new call is answered as if nothing had happened. Calls that the worker still holds are let go.
async fn the_next_call_works(client: &Client, arrivals: &mut Arrivals) {
    is_answered(hold(client, NEXT), arrivals).await;
}

/// Checks that a call with the number [`NEXT`] is answered.
async fn is_answered(next: Call<u64>, arrivals: &mut Arrivals) {
    let release = async {
        loop {
            arrivals.recv().await.expect("the worker serves").release();
        }
    };
    let answer = tokio::select! {
        answer = soon(next.timeout(LONG).into_future()) => answer,
        () = release => unreachable!("it goes on"),
    };
    assert_eq!(answer.expect("answered"), NEXT);
}
