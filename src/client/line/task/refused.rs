//! Finding out why a queue has refused calls: it is full, or it cannot be reached, as when its node is away. The broker's
//! refusal does not say it, but the queue, asked how much is in it, does.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use tokio::time::Instant;
use uuid::Uuid;

use super::Task;
use crate::client::line::{Address, Token};
use crate::client::replies::End;
use crate::error::Error;
use crate::frame::Kind;
use crate::outbox::Parcel;
use crate::transport::Confirm;

/// How long a queue that can be reached takes to answer, at most.
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

impl Found {
    fn of(answer: Result<Result<Option<u64>, Error>, tokio::time::error::Elapsed>) -> Self {
        match answer {
            Ok(Ok(Some(_))) => Self::Full,
            // RabbitMQ says of one whose node is away that it is not found.
            Ok(Ok(None)) | Err(_) => Self::Unreachable,
            Ok(Err(_)) => Self::Unknown,
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
        self.found.retain(|_, (when, _)| now.saturating_duration_since(*when) < KNOWN);
        if let Some((_, found)) = self.found.get(&queue) {
            return parcel.token.end(&found.end(&queue));
        }
        let Some(session) = &self.session else { return parcel.token.end(&Found::Unknown.end(&queue)) };
        let waiting = self.refused.entry(queue.clone()).or_default();
        waiting.push(parcel.id, parcel.token.deadline, parcel);
        if waiting.len() == 1 {
            let transport = session.transport.clone();
            let look = async move {
                let answer = tokio::time::timeout(ANSWER, transport.count(&queue)).await;
                (queue, Found::of(answer))
            };
            self.looks.push(look.boxed());
        }
    }

    /// It is known why a queue has refused calls.
    pub(super) fn found(&mut self, queue: &Arc<str>, found: Found) {
        self.found.insert(queue.clone(), (Instant::now(), found));
        let mut waiting = self.refused.remove(queue).unwrap_or_default();
        while let Some(parcel) = waiting.pop() {
            parcel.token.end(&found.end(queue));
        }
    }

    /// Takes out a call that was refused, while it is not known why.
    pub(super) fn unfound(&mut self, id: Uuid) -> Option<Parcel<Token>> {
        self.refused.values_mut().find_map(|waiting| waiting.remove(id))
    }
}
