//! Forks: several instances run the same call at the same time, and the first good reply wins.

use std::sync::Arc;

use futures::StreamExt as _;
use futures::stream::FuturesUnordered;

use super::apart::Apart;
use super::policies::PolicyCounters;
use super::{Invocation, Middleware, Next, Reply};
use crate::error::{Code, Error, Fault};

/// The policy behind [`Call::fork`](crate::Call::fork).
pub(crate) struct Fork {
    pub(crate) counted: Arc<PolicyCounters>,
}

impl Middleware for Fork {
    async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
        let apart = Apart::default();
        let fork = |_| next.run(Invocation { apart: Some(apart.elsewhere()), ..call.clone() });
        let mut forks: FuturesUnordered<_> = (0..call.asked.forks).map(fork).collect();
        self.counted.forks.add(u64::from(call.asked.forks.saturating_sub(1)));
        let mut last = Error::Fault(Fault::new(Code::Internal, "the call was sent to no instance"));
        while let Some(outcome) = forks.next().await {
            match outcome {
                // Dropping the others cancels them.
                Ok(reply) => return Ok(reply),
                Err(error) => last = error,
            }
        }
        Err(last)
    }
}
