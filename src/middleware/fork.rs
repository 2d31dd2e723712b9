//! Forks: several instances run the same call at the same time, and the first good reply wins.

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;

use super::apart::Apart;
use super::retry::is_good;
use super::{Invocation, Middleware, Next, Reply};
use crate::error::{Code, Error, Fault};

/// The policy behind [`Call::fork`](crate::Call::fork).
pub(crate) struct Fork;

impl Middleware for Fork {
    async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
        let apart = Apart::default();
        let fork = |number| {
            let apart = if number == 0 { apart.elsewhere() } else { apart.also_elsewhere() };
            next.run(Invocation { apart: Some(apart), ..call.clone() })
        };
        let mut forks: FuturesUnordered<_> = (0..call.asked.forks).map(fork).collect();
        let mut last = Err(Error::Fault(Fault::new(Code::Internal, "the call was sent to no instance")));
        while let Some(outcome) = forks.next().await {
            last = outcome;
            // Dropping the others cancels them.
            if is_good(&last, &call) {
                break;
            }
        }
        last
    }
}
