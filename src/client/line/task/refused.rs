//! Finding out why a queue has refused calls: it is full, or it cannot be reached, as when its node is away. The broker's
//! refusal does not say it, but the queue, asked how much is in it, does.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::Instant;
use uuid::Uuid;

use super::Task;
use crate::client::line::{Address, Token};
use crate::client::replies::End;
use crate::error::Error;
use crate::frame::Kind;
use crate::outbox::Parcel;
use crate::transport::{Confirm, Transport};

/// How long a queue that can be reached takes to answer, at most. For one that cannot be the broker takes more than a minute:
/// then it is asked no second time meanwhile.
const ANSWER: Duration = Duration::from_secs(2);
/// For how long it counts as it was found.
const KNOWN: Duration = Duration::from_secs(1);

/// What a queue that has refused calls was found to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Found {
    /// It answers, so it is full.
    Full,
    Unreachable,
    /// This user may not ask.
    Unknown,
}

/// What there is to say of a queue, and the rest of the look at it, if that is not over yet.
pub(super) struct Look {
    queue: Arc<str>,
    found: Found,
    rest: Option<BoxFuture<'static, Look>>,
}

impl Look {
    /// Looks at a queue.
    async fn at(queue: Arc<str>, transport: Transport) -> Self {
        let name = queue.clone();
        let mut counting = async move { transport.count(&name).await }.boxed();
        match tokio::time::timeout(ANSWER, &mut counting).await {
            Ok(answer) => Self { queue, found: Found::of(&answer), rest: None },
            Err(_) => {
                let name = queue.clone();
                let rest = async { Self { queue: name, found: Found::of(&counting.await), rest: None } };
                Self { queue, found: Found::Unreachable, rest: Some(rest.boxed()) }
            }
        }
    }
}

impl Found {
    fn of(answer: &Result<Option<u64>, Error>) -> Self {
        match answer {
            Ok(Some(_)) => Self::Full,
            // RabbitMQ says of one whose node is away that it is not found.
            Ok(None) => Self::Unreachable,
            Err(_) => Self::Unknown,
        }
    }

    fn end(self, queue: &Arc<str>) -> End {
        match self {
            Self::Full | Self::Unknown => End::Said(Confirm::Refused),
            Self::Unreachable => End::Unreachable(queue.clone()),
        }
    }
}

impl Task {
    /// The queue that has refused what went to this address, if it is one that any instance reads.
    pub(super) fn refusing(&self, address: &Address, parcel: &Parcel<Token>) -> Option<Arc<str>> {
        let namespace = &self.sessions.namespace;
        let service = match &parcel.token.reply {
            Some((_, target)) if address.kind == Kind::Request => target.service_text.clone(),
            None if address.kind == Kind::Oneway && address.exchange == namespace.oneway().into() => {
                // The key ends in the method, which has no dot in it.
                let (service, _) = address.key.rsplit_once('.')?;
                return Some(namespace.work_queue(service).into());
            }
            _ => return None,
        };
        (address.key == service).then(|| namespace.calls_queue(service).into())
    }

    /// Ends a call that its queue has refused, once it is known why.
    pub(super) fn refused(&mut self, queue: Arc<str>, parcel: Parcel<Token>) {
        let now = Instant::now();
        self.found.retain(|_, (until, _)| until.is_none_or(|until| now < until));
        if let Some((_, found)) = self.found.get(&queue) {
            return parcel.token.end(&found.end(&queue));
        }
        let Some(session) = &self.session else { return parcel.token.end(&Found::Unknown.end(&queue)) };
        let waiting = self.refused.entry(queue.clone()).or_default();
        waiting.push(parcel.id, parcel.token.deadline, parcel);
        if waiting.len() == 1 {
            self.looks.push(Look::at(queue, session.transport.clone()).boxed());
        }
    }

    /// It is known why a queue has refused calls.
    pub(super) fn found(&mut self, look: Look) {
        let Look { queue, found, rest } = look;
        let until = rest.is_none().then(|| Instant::now() + KNOWN);
        self.looks.extend(rest);
        let mut waiting = self.refused.remove(&queue).unwrap_or_default();
        while let Some(parcel) = waiting.pop() {
            parcel.token.end(&found.end(&queue));
        }
        self.found.insert(queue, (until, found));
    }

    /// Takes out a call that was refused, while it is not known why.
    pub(super) fn unfound(&mut self, id: Uuid) -> Option<Parcel<Token>> {
        self.refused.values_mut().find_map(|waiting| waiting.remove(id))
    }
}
