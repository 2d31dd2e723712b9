//! A channel that carries messages: its frames become deliveries, returns and confirms.

use bytes::{Bytes, BytesMut};
use tokio::sync::oneshot;

use super::super::frames::{
    ACK, BODY, DELIVER, Fields, GOT, GOT_NOTHING, HEADER, Head, Method, NACK, RETURN, method, payload,
};
use super::super::properties::{self, Content};
use super::awaiting::AwaitingConfirm;
use super::{Answer, Arrived, ChannelClosed, Flight, Sink};
use crate::transport::{Confirm, ReceiptSender};

/// A body of fewer bytes is copied out of what was read. The rest of that would stay in memory for as long as the body.
const COPIED: usize = 8 * 1024;
/// The room that is made for a body before it has arrived, in bytes, at most.
const ROOM: usize = 4 * 1024 * 1024;

/// A channel that carries messages.
pub(super) struct WireChannel {
    pub(super) purpose: ChannelUse,
    /// The message whose frames are arriving.
    arriving: Option<Arriving>,
    /// Whether lapin is closing it. Then nothing more may be sent on it.
    pub(super) is_closing: bool,
}

/// What a channel is for.
pub(super) enum ChannelUse {
    /// Publications, which are confirmed.
    Publish {
        unconfirmed: AwaitingConfirm<Flight>,
        /// Is told when the broker closes the channel.
        closed: Option<oneshot::Sender<ChannelClosed>>,
        /// Are told when everything is confirmed.
        idle: Vec<oneshot::Sender<()>>,
    },
    /// Deliveries for a consumer.
    Consume {
        /// `None` when it wants no more.
        sink: Option<Sink>,
        /// What is said of deliveries, while that is held back: a method, the tag, and its flags.
        held: Option<Vec<(Method, u64, u8)>>,
    },
    /// The answers to questions for single messages. `None` while there is no question.
    Get(Option<Answer>),
}

/// A message whose frames are arriving.
struct Arriving {
    /// Where it comes from, and its tag. `None` for a publication that is returned.
    envelope: Option<Envelope>,
    content: Option<Content>,
    body: BytesMut,
}

/// What the broker tells of a delivery in front of its content.
#[derive(Debug)]
pub(in super::super) struct Envelope {
    pub(in super::super) tag: u64,
    pub(in super::super) redelivered: bool,
    pub(in super::super) exchange: String,
    pub(in super::super) key: String,
}

/// What has to be told to somebody after the lock is released.
pub(super) enum Happened {
    Delivered(Sink, Arrived),
    Confirmed(ReceiptSender, Confirm),
    Got(Answer, Option<Arrived>),
}

impl WireChannel {
    pub(super) fn new(purpose: ChannelUse) -> Self {
        Self { purpose, arriving: None, is_closing: false }
    }

    /// Whether a frame is for this, and not for lapin.
    pub(super) fn takes(&self, head: Head, method: Option<Method>) -> bool {
        match (head.kind, method) {
            (HEADER | BODY, _) => self.arriving.is_some(),
            (_, Some(DELIVER)) => matches!(self.purpose, ChannelUse::Consume { .. }),
            (_, Some(RETURN | ACK | NACK)) => matches!(self.purpose, ChannelUse::Publish { .. }),
            (_, Some(GOT | GOT_NOTHING)) => matches!(self.purpose, ChannelUse::Get(_)),
            _ => false,
        }
    }

    /// Handles a frame that is for this. What it tells is added to `happened`. `None` if the frame cannot be read.
    pub(super) fn handle(&mut self, frame: &Bytes, happened: &mut Vec<Happened>) -> Option<()> {
        match method(frame) {
            Some((DELIVER, mut fields)) => {
                let _consumer = fields.short()?;
                self.begin(Some(envelope(fields)?));
            }
            Some((RETURN, _)) => self.begin(None),
            Some((GOT, fields)) => self.begin(Some(envelope(fields)?)),
            Some((GOT_NOTHING, _)) => {
                if let ChannelUse::Get(answer) = &mut self.purpose {
                    happened.extend(answer.take().map(|answer| Happened::Got(answer, None)));
                }
            }
            Some((method, mut fields)) => {
                let (number, flags) = (fields.u64()?, fields.u8()?);
                self.confirm(number, flags & 1 != 0, method == ACK, happened);
            }
            None if frame.first() == Some(&HEADER) => {
                let content = properties::read(payload(frame));
                let arriving = self.arriving.as_mut()?;
                let size = content.size;
                arriving.content = Some(content);
                if size == 0 {
                    self.complete(Bytes::new(), happened);
                }
            }
            None => {
                let arriving = self.arriving.as_mut()?;
                let size = usize::try_from(arriving.content.as_ref()?.size).unwrap_or(usize::MAX);
                let part = payload(frame);
                if arriving.body.is_empty() && part.len() == size {
                    let body = if size < COPIED { Bytes::copy_from_slice(part) } else { frame.slice_ref(part) };
                    self.complete(body, happened);
                } else {
                    if arriving.body.is_empty() {
                        arriving.body.reserve(size.min(ROOM));
                    }
                    arriving.body.extend_from_slice(part);
                    if arriving.body.len() >= size {
                        let body = arriving.body.split().freeze();
                        self.complete(body, happened);
                    }
                }
            }
        }
        Some(())
    }

    /// The size of the body that is arriving, and what has arrived of it. `None` if it is smaller than `least`.
    pub(super) fn large_body(&mut self, least: u64) -> Option<(usize, &mut BytesMut)> {
        let Arriving { content: Some(content), body, .. } = self.arriving.as_mut()? else { return None };
        let size = usize::try_from(content.size).ok().filter(|_| content.size >= least)?;
        Some((size, body))
    }

    /// Goes on with a body that was taken out.
    pub(super) fn put_back(&mut self, body: BytesMut, is_complete: bool, happened: &mut Vec<Happened>) {
        if is_complete {
            self.complete(body.freeze(), happened);
        } else if let Some(arriving) = &mut self.arriving {
            arriving.body = body;
        }
    }

    fn begin(&mut self, envelope: Option<Envelope>) {
        self.arriving = Some(Arriving { envelope, content: None, body: BytesMut::new() });
    }

    /// Hands over a message of which everything has arrived.
    fn complete(&mut self, body: Bytes, happened: &mut Vec<Happened>) {
        let Some(Arriving { envelope, content: Some(content), .. }) = self.arriving.take() else { return };
        match (&mut self.purpose, envelope) {
            (ChannelUse::Publish { unconfirmed, .. }, None) => {
                if let Some(flight) = content.number.and_then(|number| unconfirmed.get_mut(number)) {
                    flight.returned = true;
                }
            }
            (ChannelUse::Consume { sink: Some(sink), .. }, Some(envelope)) => {
                happened.push(Happened::Delivered(sink.clone(), Arrived { envelope, content, body }));
            }
            (ChannelUse::Get(answer), Some(envelope)) => {
                let arrived = Arrived { envelope, content, body };
                happened.extend(answer.take().map(|answer| Happened::Got(answer, Some(arrived))));
            }
            _ => {}
        }
    }

    fn confirm(&mut self, number: u64, multiple: bool, is_ack: bool, happened: &mut Vec<Happened>) {
        let ChannelUse::Publish { unconfirmed, idle, .. } = &mut self.purpose else { return };
        unconfirmed.confirmed(number, multiple, |flight| {
            let Flight { handed, returned, .. } = flight;
            let confirm = match (returned, is_ack) {
                (true, _) => Confirm::Returned,
                (false, true) => Confirm::Accepted,
                (false, false) => Confirm::Refused,
            };
            happened.push(Happened::Confirmed(handed.outcome, confirm));
        });
        if unconfirmed.is_empty() {
            // Whoever has stopped waiting does not care.
            idle.drain(..).for_each(|waiting| _ = waiting.send(()));
        }
    }
}

/// Reads what the broker tells of a delivery.
fn envelope(mut fields: Fields<'_>) -> Option<Envelope> {
    Some(Envelope {
        tag: fields.u64()?,
        redelivered: fields.u8()? & 1 != 0,
        exchange: fields.short()?.into_owned(),
        key: fields.short()?.into_owned(),
    })
}
