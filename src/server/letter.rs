//! Dead letters: a message that cannot be run, and of which nobody can be told, is kept in a queue for an operator.
//! This is how a server puts it there.

use std::time::Duration;

use bytes::Bytes;
use tracing::{debug, error, warn};
use uuid::Uuid;

use super::dead_letters::SILENCE;
use super::message::{Message, MessageEnd, Source};
use super::reason::shortened;
use super::worker::Worker;
use crate::clock::unix_millis;
use crate::exchanges::to_queue;
use crate::frame::CONTENT_TYPE;
use crate::headers::history;
use crate::topology::header;
use crate::transport::{Confirm, Loss, Lost, Properties, Settle};

/// The pause before a letter is published again that its queue did not accept. It doubles each time.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// The longest pause.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What made a dead letter of a frame, as it is counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum LetterCause {
    /// It has failed in its last attempt.
    Failed,
    /// It must not run.
    Refused,
    /// It cannot be read.
    Malformed,
}

/// A dead letter that is to be published: a frame that nobody can be told about, or that has failed in its last
/// attempt.
pub(super) struct Letter<'a> {
    #[cfg_attr(not(feature = "metrics"), expect(dead_code, reason = "only metrics tell it"))]
    pub(super) cause: LetterCause,
    /// The frame, or the part of a message that could not be read.
    pub(super) body: Bytes,
    /// Why it is a dead letter. For operators; it may contain arguments.
    pub(super) reason: &'a str,
    /// The part of the reason that may be logged.
    pub(super) why: &'a str,
    pub(super) id: Uuid,
    pub(super) method: Option<&'a str>,
    pub(super) caller: Option<&'a str>,
    pub(super) attempts: u64,
}

impl Letter<'_> {
    /// The headers of this letter, which is a part of `message`.
    pub(super) fn headers(&self, instance: &str, message: &Message) -> Vec<(String, String)> {
        // A message that was published again names where it was published first.
        let first = |name, now: &str| header::value(&message.properties.headers, name).unwrap_or(now).to_owned();
        let mut headers = vec![
            (header::REASON, shortened(self.reason).to_owned()),
            (header::INSTANCE, instance.to_owned()),
            (header::EXCHANGE, first(header::EXCHANGE, &message.exchange)),
            (header::KEY, first(header::KEY, &message.key)),
            (header::ATTEMPTS, self.attempts.to_string()),
            (header::FAILED_AT, unix_millis().to_string()),
            (header::ID, self.id.to_string()),
            (header::USER, message.user.as_deref().unwrap_or_default().to_owned()),
        ];
        headers.extend(self.method.map(|method| (header::METHOD, method.to_owned())));
        headers.extend(history(&message.properties.headers).map(|history| (header::HISTORY, history)));
        headers.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
    }
}

impl Worker {
    /// Keeps a letter where an operator finds it. While its queue does not accept it, the message stays unsettled, and
    /// is requeued when the server drains: nothing that the broker has confirmed to a caller is dropped.
    pub(super) async fn dead_letter(&self, letter: Letter<'_>, message: &Message) {
        #[cfg(feature = "metrics")]
        let letter_cause = letter.cause;
        let Letter { why, id, method, caller, attempts: attempt, .. } = letter;
        let (service, reason) = (&self.name, shortened(why));
        // Every subscriber gets a copy of an event. A publisher's mistake is not kept by each of them.
        if message.source == Source::Events {
            let pattern = self.service.pattern.as_deref();
            warn!(key = message.key, pattern, %id, caller, reason, "an event that cannot be handled is dropped");
            return message.finish();
        }
        let properties = Properties {
            persistent: true,
            correlation_id: message.properties.correlation_id.clone(),
            reply_to: message.properties.reply_to.clone(),
            kind: message.properties.kind.clone(),
            content_type: Some(CONTENT_TYPE.to_owned()),
            app_id: Some(self.site.instance.to_string()),
            headers: letter.headers(&self.site.instance, message),
            ..Properties::default()
        };
        let publication = to_queue(self.site.namespace.dead_queue(&self.id), properties, letter.body);
        let (trouble, title) = (self.dead_trouble(), self.dead_title());
        let mut pause = FIRST_PAUSE;
        loop {
            let publishing = message.transport.publish(publication.clone());
            let said = tokio::select! {
                said = self.site.health.sees_through(&trouble, &title, publishing) => said,
                () = self.site.has_drained_for(SILENCE) => {
                    debug!(%service, method, %id, "a call for the dead letters goes back: their queue does not answer, and the server drains");
                    return message.settle(Settle::GiveBack);
                }
            };
            let why = match said {
                Ok(Confirm::Accepted) => {
                    #[cfg(feature = "metrics")]
                    self.measured.is_kept(letter_cause);
                    let queue = &*publication.key;
                    warn!(%service, method, %id, caller, attempt, reason, queue, "kept with the dead letters: it runs again when it is replayed");
                    self.site.health.cured(&trouble);
                    return self.done(id, MessageEnd::Over, message);
                }
                Err(Lost { loss: Loss::Unsent | Loss::Connection, reason }) => {
                    debug!(%service, method, %id, %reason, "a call for the dead letters went back with its connection");
                    return;
                }
                Ok(Confirm::TooLarge(limit)) => {
                    // The broker itself makes a dead letter of a rejected message from the queue for oneway calls.
                    let lost = message.frames > 1 || message.source != Source::Work;
                    error!(%service, method, %id, caller, attempt, reason, limit, lost, "over the broker's limit of a message as a dead letter: if it is not lost, the broker keeps it there without the reason");
                    return match message.frames {
                        1 => message.settle(Settle::Discard),
                        _ => message.finish(),
                    };
                }
                Ok(Confirm::Returned) => tokio::select! {
                    declared = self.declare_dead_letters(&message.transport) => match declared {
                        Ok(()) => continue,
                        Err(error) => error.to_string(),
                    },
                    () = self.site.has_drained_for(SILENCE) => "the broker does not answer about it".to_owned(),
                },
                Ok(Confirm::Refused) => {
                    "it is full, or its node cannot be reached: make room by `hopline dead`, or start the node"
                        .to_owned()
                }
                Err(Lost { reason, .. }) => reason.to_string(),
            };
            let queue = &publication.key;
            self.site.health.suffers(trouble.clone(), format!("the queue `{queue}` takes no dead letters: {why}"));
            tokio::select! {
                () = self.site.draining.cancelled() => {
                    debug!(%service, method, %id, "a call for the dead letters goes back: the server drains");
                    return message.settle(Settle::GiveBack);
                }
                () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
            }
        }
    }
}
