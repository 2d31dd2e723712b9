//! Access to some inner operations for `benches/inside.rs`, which measures them. It is not part of the API.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::oneshot;
use tokio::time::Instant;
use uuid::Uuid;

use crate::client::Target;
use crate::client::in_flight::{CallEnd, CallsInFlight, PendingCall, Waiter};
use crate::client::presence::Moment;
use crate::codec::{Codec, CodecError};
use crate::frame::{self, Frame, Kind, Metadata};
use crate::outgoing::{Outbox, Parcel, Share};
use crate::topology::ServiceId;

/// Requests as a client makes them when calls are not traced.
#[derive(Debug)]
pub struct Requests {
    frames: Vec<Frame>,
    payload: Vec<u8>,
}

impl Requests {
    /// This many requests with this payload.
    #[must_use]
    pub fn new(count: usize, payload: Vec<u8>) -> Self {
        let metadata = || Metadata {
            method: Some("add".into()),
            remaining: Some(Duration::from_secs(30)),
            sent_at: Some(1_700_000_000_000),
            instance: Some("0123456789ab".into()),
            ..Metadata::default()
        };
        let frame = |_| Frame::new(Kind::Request, Uuid::new_v4(), Codec::Cbor, metadata(), Bytes::new());
        Self { frames: (0..count).map(frame).collect(), payload }
    }

    /// Writes each request, and puts all of them into one body.
    ///
    /// # Errors
    /// Never: a payload of bytes is only appended.
    pub fn encode(&self) -> Result<Bytes, CodecError> {
        let mut outbox = Outbox::default();
        for frame in &self.frames {
            let body = frame.to_body_with(|payload| {
                payload.extend_from_slice(&self.payload);
                Ok(())
            })?;
            outbox.push((), parcel(frame.id, body, Share::one_of(self.frames.len())));
        }
        Ok(outbox.next(usize::MAX, |()| true).map(|bundle| bundle.body()).unwrap_or_default())
    }
}

/// Reads the frames of a body. Returns how many there are.
#[must_use]
pub fn decode(body: Bytes) -> usize {
    frame::decode(body).filter(Result::is_ok).count()
}

/// Writes a payload.
///
/// # Errors
/// What the codec cannot write.
pub fn write<T: Serialize>(codec: Codec, value: &T) -> Result<Vec<u8>, CodecError> {
    codec.encode(value)
}

/// Reads a payload.
///
/// # Errors
/// What is not of this type.
pub fn read<T: DeserializeOwned>(codec: Codec, payload: &[u8]) -> Result<T, CodecError> {
    codec.decode(payload)
}

/// A call that is about to wait for its reply.
#[derive(Debug)]
pub struct WaitingCall {
    id: Uuid,
    sender: oneshot::Sender<Result<Frame, CallEnd>>,
    receiver: oneshot::Receiver<Result<Frame, CallEnd>>,
}

impl Default for WaitingCall {
    fn default() -> Self {
        let (sender, receiver) = oneshot::channel();
        Self { id: Uuid::new_v4(), sender, receiver }
    }
}

/// A constant number of calls in flight.
#[derive(Debug)]
pub struct InFlight {
    calls: CallsInFlight<()>,
    waiting: VecDeque<(Uuid, oneshot::Receiver<Result<Frame, CallEnd>>)>,
    target: Arc<Target>,
}

impl InFlight {
    /// This many calls of one method.
    ///
    /// # Errors
    /// Never: the name is valid.
    pub fn new(calls: usize) -> Result<Self, String> {
        let target = Arc::new(Target::new(ServiceId::new("demo", 1)?, "add"));
        let mut in_flight = Self { calls: CallsInFlight::default(), waiting: VecDeque::new(), target };
        (0..calls).for_each(|_| in_flight.expect(WaitingCall::default()));
        Ok(in_flight)
    }

    /// Adds a call that waits for its reply, and delivers the reply to the call that has waited for the longest time.
    /// Returns whether that has worked.
    pub fn turn(&mut self, waiting: WaitingCall) -> bool {
        self.expect(waiting);
        let Some((id, mut receiver)) = self.waiting.pop_front() else { return false };
        let moment = Moment { now: Instant::now(), last: 0, earlier: 0 };
        let metadata = Metadata { handler_time: Some(Duration::from_micros(7)), ..Metadata::default() };
        self.calls.deliver(Frame::new(Kind::Reply, id, Codec::Cbor, metadata, Bytes::new()), moment);
        matches!(receiver.try_recv(), Ok(Ok(reply)) if reply.id == id)
    }

    fn expect(&mut self, WaitingCall { id, sender, receiver }: WaitingCall) {
        let (waiter, target) = (Waiter::One(sender), self.target.clone());
        let (for_any, left_before) = (true, false);
        let call =
            PendingCall { waiter, target, message: 0, for_any, left_before, leaving: None, place: None, again: None };
        self.calls.expect(id, call);
        self.waiting.push_back((id, receiver));
    }
}

/// Small frames that may share a message with others to the same address.
#[derive(Debug)]
pub struct Parcels(Vec<(Arc<str>, Parcel<()>)>);

impl Parcels {
    /// This many frames. They use the addresses in turn.
    #[must_use]
    pub fn new(count: usize, addresses: &[Arc<str>]) -> Self {
        let parcel = |_| parcel(Uuid::nil(), Bytes::from_static(&[0; 160]), Share::LEAST);
        Self(addresses.iter().cloned().cycle().zip((0..count).map(parcel)).collect())
    }
}

fn parcel(id: Uuid, frame: Bytes, share: Share) -> Parcel<()> {
    Parcel { id, frame, share, kind: None, expiration: None, token: () }
}

/// An outbox like a client's. A client's address has more fields than a key, but only the key is hashed.
#[derive(Debug, Default)]
pub struct Sender(Outbox<Arc<str>, ()>);

impl Sender {
    /// Puts parcels into the outbox, and takes out all messages. Returns how many messages there were.
    pub fn send(&mut self, parcels: Parcels) -> usize {
        parcels.0.into_iter().for_each(|(address, parcel)| self.0.push(address, parcel));
        std::iter::from_fn(|| self.0.next(usize::MAX, |()| true)).count()
    }
}
