//! Finding out why a queue has not taken calls. It has refused them: it is full, or it cannot be reached, as when its node is
//! away. The broker does not say which, but the queue, asked how much is in it, does. Or they were returned: there is no queue,
//! but if the service has an instance, it is only out of reach.

use std::sync::Arc;
use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::Instant;
use uuid::Uuid;

use super::Task;
use crate::client::line::{Address, Token};
use crate::client::replies::End;
use crate::client::target::Target;
use crate::error::Error;
use crate::frame::Kind;
use crate::outbox::Parcel;
use crate::transport::{Confirm, Transport, forbids};

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
            Err(Error::Broker { reason, .. }) if !forbids(reason) => Self::Unreachable,
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
    /// Has a call that its queue has not taken end once it is known why; gives it back when there is nothing to find out.
    pub(super) fn find_out(
        &mut self,
        address: &Address,
        parcel: Parcel<Token>,
        confirm: &Confirm,
    ) -> Option<Parcel<Token>> {
        // One instance's own queue is never full, and all have their own.
        let any = parcel.token.reply.as_ref().map(|(_, target)| target.clone());
        let any = any.filter(|target| address.kind == Kind::Request && address.key == target.service_text);
        let namespace = &self.sessions.namespace;
        match (confirm, any) {
            (Confirm::Refused, Some(target)) => {
                let queue = namespace.calls_queue(&target.service).into();
                self.refused(queue, parcel);
            }
            (Confirm::Refused, None) if address.kind == Kind::Oneway && *address.exchange == *namespace.oneway() => {
                // The key ends in the method, which has no dot in it.
                let Some((service, _)) = address.key.rsplit_once('.') else { return Some(parcel) };
                let queue = namespace.work_queue(service).into();
                self.refused(queue, parcel);
            }
            (Confirm::Returned, Some(target)) => self.returned(target, parcel),
            _ => return Some(parcel),
        }
        None
    }

    /// Ends a call that its queue has refused, once it is known why.
    fn refused(&mut self, queue: Arc<str>, parcel: Parcel<Token>) {
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

    /// Ends a call that was returned, once it is known whether its service has an instance.
    fn returned(&mut self, target: Arc<Target>, parcel: Parcel<Token>) {
        let waiting = self.returned.entry(target.service_text.clone()).or_default();
        waiting.push(parcel.id, parcel.token.deadline, parcel);
        if waiting.len() == 1 {
            self.ask(target);
        }
    }

    /// It is known whether a service has an instance.
    pub(super) fn end_returned(&mut self, target: &Target, is_there: bool) {
        let mut waiting = self.returned.remove(&target.service_text).unwrap_or_default();
        while let Some(parcel) = waiting.pop() {
            parcel.token.end(&match is_there {
                true => End::Unreachable(self.sessions.namespace.calls_queue(&target.service).into()),
                false => End::Said(Confirm::Returned),
            });
        }
    }

    /// Takes out a call while it is not known why its queue has not taken it, with what is to be said of it.
    pub(super) fn unfound(&mut self, id: Uuid) -> Option<(Parcel<Token>, Confirm)> {
        let refused = self.refused.values_mut().find_map(|waiting| waiting.remove(id));
        let mut returned = || self.returned.values_mut().find_map(|waiting| waiting.remove(id));
        refused.map(|parcel| (parcel, Confirm::Refused)).or_else(|| Some((returned()?, Confirm::Returned)))
    }
}
