//! What breaks, and that each call then ends in what is true of it, on RabbitMQ nodes of the tests' own.
//!
//! `HOPLINE_TEST_NODE` names their version, 3.10 or 4.3; the tests that need one are ignored unless they are asked for. They
//! run one at a time, since a fault is not to hit the neighbour's calls: `scripts/test faults-4.3` runs them all, and
//! `HOPLINE_TEST_NODE=4.3 cargo test --test it faults::broker -- --include-ignored --test-threads=1` some.

mod broker;
mod clients;
mod cluster;
mod dead;
mod deleted;
mod exchanges;
mod link;
mod maintenance;
mod node;
mod proxy;
mod refused;
mod taken_back;
mod unanswered;
mod workers;

use std::future::IntoFuture as _;
use std::ops::Range;
use std::time::Duration;

use futures::future::join_all;
use hopline::{Call, Client, Error, Pending, Running};
use tokio::sync::mpsc;

use crate::support::{Arrival, Held, Scene, hold, soon};

/// Longer than [`soon`] waits: what ends by then did not end by its deadline.
const LONG: Duration = Duration::from_secs(300);

type Arrivals = mpsc::UnboundedReceiver<Arrival>;

/// A worker that runs so many calls at a time, has others wait, and holds them until the test lets them go.
async fn worker(scene: &Scene, concurrency: usize) -> (Running, Arrivals) {
    let Held { service, arrived } = Held::new();
    (scene.serve(service.concurrency(concurrency).prefetch(64)).await, arrived)
}

/// Calls that are held by a [`worker`], or will be.
async fn on_their_way(client: &Client, numbers: Range<u64>) -> Vec<Pending<u64>> {
    let mut pending = Vec::new();
    for number in numbers {
        pending.push(hold(client, number).timeout(LONG).start().await.expect("on its way"));
    }
    pending
}

/// How each of the calls ends, which it does before its deadline.
async fn ends(pending: Vec<Pending<u64>>) -> Vec<Result<u64, Error>> {
    soon(join_all(pending)).await
}

/// The number of a call that comes after all others.
const NEXT: u64 = 1_000_000;

/// That a new call is answered as if nothing had happened; those that the worker still has are let go.
async fn the_next_call_works(client: &Client, arrivals: &mut Arrivals) {
    is_answered(hold(client, NEXT), arrivals).await;
}

/// That a call of the number [`NEXT`] is answered.
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
