//! Replies on their way to their callers: those to the same caller that are ready together share a message.

use std::sync::Arc;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::stream::FuturesUnordered;
use tokio::sync::mpsc;
use tracing::{debug, error, warn};
use uuid::Uuid;

use super::message::Message;
use super::outcome::too_large;
use crate::codec::Codec;
use crate::frame::CONTENT_TYPE;
use crate::outbox::{BATCH, Bundle, Outbox, Parcel, Share, UnderWay, take_all};
use crate::transport::{Confirm, Lost, Properties, Publication, Transport};

/// How often a reply is published that is lost with its channel, over somebody else's message.
const ATTEMPTS: usize = 100;

/// What a reply belongs to.
pub(super) struct Answered {
    pub(super) message: Arc<Message>,
    pub(super) codec: Codec,
    pub(super) attempts: usize,
}

type Letter = Parcel<Answered>;

/// Where replies are handed in. Their task ends when this is dropped.
#[derive(Debug)]
pub(super) struct Replies(mpsc::UnboundedSender<(Arc<str>, Letter)>);

impl Replies {
    pub(super) fn start(transport: Transport, instance: Arc<str>, max_message_size: usize) -> Self {
        let (replies, waiting) = mpsc::unbounded_channel();
        let task = Task {
            transport,
            instance,
            waiting,
            outbox: Outbox::new(max_message_size),
            receipts: FuturesUnordered::new(),
        };
        tokio::spawn(task.run());
        Self(replies)
    }

    /// Puts the reply `frame` to the request `id` on its way, and sees to the request once the broker has it.
    pub(super) fn post(&self, id: Uuid, codec: Codec, frame: Bytes, message: &Arc<Message>) {
        let token = Answered { message: message.clone(), codec, attempts: 0 };
        let kind = message.kind.clone();
        let parcel = Parcel { id, frame, share: Share::LEAST, kind, expiration: None, token };
        // Without a task the connection has ended, and the request goes back to its queue with it.
        let _ = self.0.send((message.reply_to.clone().unwrap_or_default(), parcel));
    }
}

struct Task {
    transport: Transport,
    instance: Arc<str>,
    waiting: mpsc::UnboundedReceiver<(Arc<str>, Letter)>,
    outbox: Outbox<Arc<str>, Answered>,
    receipts: FuturesUnordered<UnderWay<Bundle<Arc<str>, Answered>>>,
}

impl Task {
    async fn run(mut self) {
        let mut batch = Vec::with_capacity(BATCH);
        loop {
            tokio::select! {
                biased;
                Some((bundle, said)) = self.receipts.next(), if !self.receipts.is_empty() => self.concluded(bundle, said),
                count = take_all(&mut self.waiting, &mut batch) => if count == 0 {
                    return;
                },
            }
            batch.drain(..).for_each(|(caller, letter)| self.outbox.push(caller, letter));
            self.publish();
        }
    }

    fn publish(&mut self) {
        while let Some(bundle) = self.outbox.next(|_| true) {
            let properties = Properties {
                correlation_id: bundle.correlation_id(),
                kind: bundle.kind(),
                content_type: Some(CONTENT_TYPE.to_owned()),
                app_id: Some(self.instance.to_string()),
                ..Properties::default()
            };
            let key = bundle.address.to_string();
            let body = bundle.body();
            // The default exchange; mandatory tells when the caller has gone.
            let publication = Publication { exchange: String::new(), key, mandatory: true, properties, body };
            // Nobody waits for it: only the request's settlement does.
            let receipt = self.transport.publish_quietly(publication);
            self.receipts.push(UnderWay::new(bundle, receipt));
        }
    }

    /// A reply does not wait for the broker's confirm, but the request's settlement does.
    fn concluded(&mut self, bundle: Bundle<Arc<str>, Answered>, said: Result<Confirm, Lost>) {
        let Bundle { address: caller, parcels, .. } = bundle;
        let together = parcels.len() > 1;
        match &said {
            Ok(Confirm::Returned) => debug!(caller = &*caller, "the caller has gone"),
            Err(Lost { connected: false, reason, .. }) => {
                // Unsettled, the requests go back to their queue with the connection.
                return warn!(caller = &*caller, %reason, replies = parcels.len(), "replies were lost with their connection");
            }
            _ => {}
        }
        for mut parcel in parcels {
            match &said {
                Ok(Confirm::TooLarge(limit)) => {
                    if !together {
                        parcel.frame =
                            too_large(parcel.id, parcel.token.codec, &self.instance, parcel.frame.len(), *limit);
                    }
                    parcel.share = Share::ALL;
                    self.again(&caller, parcel);
                }
                // The caller ignores a second reply, should both arrive.
                Err(_) => self.again(&caller, parcel),
                Ok(Confirm::Accepted | Confirm::Refused | Confirm::Returned) => parcel.token.message.finish(),
            }
        }
    }

    fn again(&mut self, caller: &Arc<str>, mut parcel: Letter) {
        parcel.token.attempts += 1;
        if parcel.token.attempts < ATTEMPTS {
            return self.outbox.push(caller.clone(), parcel);
        }
        error!(%caller, id = %parcel.id, "the broker does not take a reply: the caller will not hear of it");
        parcel.token.message.finish();
    }
}
