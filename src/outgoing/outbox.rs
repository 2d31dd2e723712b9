//! The outbox: frames that wait to be published, and the rule which of them share a message.
//!
//! A client's line puts requests into it, a server's task of replies puts replies into it. Both use the same rule, so
//! it is one module. It does no I/O and knows no time: whoever owns an outbox asks it for the next message.

use std::collections::VecDeque;
use std::future::Future;
use std::hash::Hash;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::limits::MAX_FRAMES;
use crate::map::FastMap;
use crate::transport::{Confirm, Lost, Receipt};

/// The most calls that share a message, unless a client sets another number with [`Coalesce`](crate::Coalesce).
const MAX_SHARING: usize = 64;
/// The most bytes of frames that share a message. A larger frame is published in a message of its own.
pub(crate) const MAX_BYTES: usize = 64 * 1024;
/// The longest time that the handlers of the calls in one message may take together, as far as it is known. A message
/// with more work than this would keep one instance busy while others have nothing to do.
const MAX_WORK: Duration = Duration::from_millis(1);
/// The most items that a task receives before it publishes what waits.
pub(crate) const BATCH: usize = 256;
/// How many times [`take_all`] lets other tasks run before it returns.
const ROUNDS: usize = 2;

/// Waits until something is sent to `sent`. Then moves it to `batch`, with everything else that has been sent by then,
/// up to [`BATCH`] items. Returns how many items it has moved; 0 means that nobody can send any more.
///
/// The task that sends wakes the receiver, which then runs next. But other tasks that are ready may be about to send as
/// well: for example several callers whose replies came in one message. So this function yields a few times and lets
/// them run first. It uses no timer: if no other task is ready, yielding takes no time.
///
/// It is cancel safe: if the future is dropped, the items that it has moved are in `batch`.
pub(crate) async fn take_all<T>(sent: &mut mpsc::UnboundedReceiver<T>, batch: &mut Vec<T>) -> usize {
    let mut count = sent.recv_many(batch, BATCH).await;
    for _ in 0..ROUNDS {
        if count == 0 || batch.len() >= BATCH {
            break;
        }
        tokio::task::yield_now().await;
        while batch.len() < BATCH
            && let Ok(next) = sent.try_recv()
        {
            batch.push(next);
            count += 1;
        }
    }
    count
}

/// The part of a message that a frame takes up. A message is full when the shares of its frames add up to
/// [`Share::ALL`].
///
/// There are three limits for what shares a message: a number of frames, the work of their handlers, and bytes. A share
/// expresses the first two; bytes are counted apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Share(u32);

impl Share {
    /// The whole message: a frame with this share never shares a message.
    pub(crate) const ALL: Self = Self(1 << 20);
    /// The smallest share: 64 such frames fill a message.
    pub(crate) const LEAST: Self = Self(Self::ALL.0 / MAX_SHARING as u32);

    /// The share of a frame where a message holds `frames` of them. Counts outside 1 to 1024 are brought within, since
    /// receivers refuse a message with more frames.
    pub(crate) fn one_of(frames: usize) -> Self {
        Self(Self::ALL.0 / frames.clamp(1, MAX_FRAMES) as u32)
    }

    /// The sum of two shares. It stops at the largest number instead of overflowing.
    pub(crate) fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// The share of a call whose handler takes `time`: a call of 1 ms or more is published alone, and one of less than
    /// 16 µs takes up the smallest share.
    pub(crate) fn of_work(time: Duration) -> Self {
        let part = time.as_nanos().saturating_mul(Self::ALL.0.into()) / MAX_WORK.as_nanos();
        Self(u32::try_from(part).unwrap_or(u32::MAX).clamp(Self::LEAST.0, Self::ALL.0))
    }
}

/// A frame that is to be published, with what the outbox has to know about it.
///
/// `T` is what the owner wants back once it is known what became of the frame: a client keeps the waiting caller there,
/// a server the request that is answered.
#[derive(Debug)]
pub(crate) struct Parcel<T> {
    /// The frame's id, which becomes the AMQP `correlation_id` if the frame is alone in its message.
    pub(crate) id: Uuid,
    /// The encoded frame.
    pub(crate) frame: Bytes,
    /// How much of a message it takes up.
    pub(crate) share: Share,
    /// The AMQP `type`, such as `demo.v1.add`: for people who look at a queue.
    pub(crate) kind: Option<Arc<str>>,
    /// How long the frame is of use after it has come to a queue. `None`: for ever.
    pub(crate) expiration: Option<Duration>,
    /// What the owner keeps with the frame.
    pub(crate) token: T,
}

/// Parcels that are published as one message. [`Outbox::next`] makes them.
#[derive(Debug)]
pub(crate) struct Bundle<A, T> {
    /// Where the message goes. All parcels have the same address.
    pub(crate) address: A,
    /// The parcels, at least one, in the order in which they were pushed.
    pub(crate) parcels: Vec<Parcel<T>>,
}

impl<A, T> Bundle<A, T> {
    /// The body of the message: all frames, one after the other. A single frame is not copied.
    pub(crate) fn body(&self) -> Bytes {
        if let [alone] = &*self.parcels {
            return alone.frame.clone();
        }
        let mut body = BytesMut::with_capacity(self.size());
        for parcel in &self.parcels {
            body.extend_from_slice(&parcel.frame);
        }
        body.freeze()
    }

    /// The size of the message's body, in bytes.
    pub(crate) fn size(&self) -> usize {
        self.parcels.iter().map(|parcel| parcel.frame.len()).sum()
    }

    /// The AMQP `expiration` of the message: the longest time of its frames. It is `None` if a frame does not expire.
    /// Each frame carries its own time as well, so a receiver knows which of them are over.
    pub(crate) fn expiration(&self) -> Option<Duration> {
        self.parcels.iter().filter_map(|parcel| parcel.expiration).max()
    }

    /// The AMQP `type` of the message, if all frames have the same; otherwise `None`, since it would be wrong for some.
    pub(crate) fn kind(&self) -> Option<String> {
        let (first, others) = self.parcels.split_first()?;
        let alike = others.iter().all(|other| other.kind == first.kind);
        first.kind.as_deref().filter(|_| alike).map(str::to_owned)
    }

    /// The AMQP `correlation_id` of the message: the frame's id if there is one frame, otherwise `None`.
    pub(crate) fn correlation_id(&self) -> Option<String> {
        if let [alone] = &*self.parcels { Some(alone.id.to_string()) } else { None }
    }
}

/// A message that was published, and that the broker has not confirmed yet.
///
/// It is a future. It gives back what was kept with the message, together with what the broker said of it. Owners
/// collect these futures in a `FuturesUnordered`.
pub(crate) struct UnderWay<B> {
    bundle: Option<B>,
    receipt: Receipt,
}

impl<B> UnderWay<B> {
    /// Keeps `bundle` until `receipt` tells what became of the message.
    pub(crate) fn new(bundle: B, receipt: Receipt) -> Self {
        Self { bundle: Some(bundle), receipt }
    }
}

impl<B: Unpin> Future for UnderWay<B> {
    type Output = (B, Result<Confirm, Lost>);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let said = ready!(Pin::new(&mut self.receipt).poll(context));
        let bundle = self.bundle.take().expect("polled until it is ready, and no more");
        Poll::Ready((bundle, said))
    }
}

/// Frames that wait to be published, by address. Only frames with the same address share a message.
///
/// There is no timer: its owner publishes everything that waits, as soon as it comes to publish.
#[derive(Debug)]
pub(crate) struct Outbox<A, T> {
    /// The parcels that wait, in the order in which they were pushed. An address without any is removed.
    by_address: FastMap<A, VecDeque<Parcel<T>>>,
    /// The addresses with parcels, in the order in which the first parcel of each was pushed.
    order: VecDeque<A>,
    /// The most bytes of frames that share a message.
    max_bytes: usize,
}

impl<A, T> Default for Outbox<A, T> {
    fn default() -> Self {
        Self::new(MAX_BYTES)
    }
}

impl<A, T> Outbox<A, T> {
    /// An empty outbox. Its messages have at most `max_message_size` bytes, and never more than [`MAX_BYTES`], unless a
    /// single frame is larger.
    pub(crate) fn new(max_message_size: usize) -> Self {
        Self { by_address: FastMap::default(), order: VecDeque::new(), max_bytes: max_message_size.min(MAX_BYTES) }
    }
}

/// Whether frames can share a message whose times to live lie between `shortest` and `longest`; `None` stands for a
/// frame that never expires.
///
/// The message lives as long as the longest of them. A frame with a much shorter time would stay in the queue long
/// after its caller has given up. So the times may differ by a quarter, and a frame that expires never shares with one
/// that does not.
fn expire_together(shortest: Option<Duration>, longest: Option<Duration>) -> bool {
    match (shortest, longest) {
        (Some(shortest), Some(longest)) => longest <= shortest.saturating_add(shortest / 4),
        (shortest, longest) => shortest == longest,
    }
}

impl<A: Clone + Eq + Hash, T> Outbox<A, T> {
    /// Adds a parcel behind all others to the same address.
    pub(crate) fn push(&mut self, address: A, parcel: Parcel<T>) {
        if let Some(waiting) = self.by_address.get_mut(&address) {
            return waiting.push_back(parcel);
        }
        self.order.push_back(address.clone());
        self.by_address.insert(address, VecDeque::from([parcel]));
    }

    /// Takes out the next message: the first parcel of an address, and those behind it that can share its message.
    ///
    /// The message has at most `room` bytes, unless its only frame is larger. Parcels that are not `wanted` any more
    /// are dropped: their callers have gone. Returns `None` when the outbox is empty.
    pub(crate) fn next(&mut self, room: usize, mut wanted: impl FnMut(&T) -> bool) -> Option<Bundle<A, T>> {
        let max_bytes = self.max_bytes.min(room);
        while let Some(address) = self.order.front() {
            let waiting =
                self.by_address.get_mut(address).expect("an address is in the order for as long as it has parcels");
            let (mut parcels, mut share, mut bytes) = (Vec::with_capacity(waiting.len().min(MAX_SHARING)), Share(0), 0);
            // The shortest and the longest time to live of the parcels taken so far.
            let mut times = None;
            while let Some(next) = waiting.front() {
                let (more_share, more_bytes) = (share.plus(next.share), bytes + next.frame.len());
                let time = next.expiration;
                let (shortest, longest) =
                    times.map_or((time, time), |(shortest, longest)| (time.min(shortest), time.max(longest)));
                let fits = more_share <= Share::ALL && more_bytes <= max_bytes && expire_together(shortest, longest);
                if !parcels.is_empty() && !fits {
                    break;
                }
                let Some(next) = waiting.pop_front() else { break };
                if wanted(&next.token) {
                    (share, bytes, times) = (more_share, more_bytes, Some((shortest, longest)));
                    parcels.push(next);
                }
            }
            let address = if waiting.is_empty() {
                self.by_address.remove(address);
                self.order.pop_front()?
            } else {
                address.clone()
            };
            if !parcels.is_empty() {
                return Some(Bundle { address, parcels });
            }
        }
        None
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// Empties the outbox. Returns the parcels with their addresses.
    pub(crate) fn clear(&mut self) -> impl Iterator<Item = (A, Parcel<T>)> {
        let mut all = std::mem::take(&mut self.by_address);
        std::mem::take(&mut self.order).into_iter().flat_map(move |address| {
            let waiting = all.remove(&address).unwrap_or_default();
            waiting.into_iter().map(move |parcel| (address.clone(), parcel))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type TestBox = Outbox<&'static str, u32>;

    fn parcel(token: u32, share: Share, size: usize) -> Parcel<u32> {
        let frame = Bytes::from(vec![0; size]);
        Parcel { id: Uuid::new_v4(), frame, share, kind: Some("demo.v1.add".into()), expiration: None, token }
    }

    fn small(token: u32) -> Parcel<u32> {
        parcel(token, Share::LEAST, 100)
    }

    fn tokens(bundle: Option<Bundle<&'static str, u32>>) -> Vec<u32> {
        bundle.into_iter().flat_map(|bundle| bundle.parcels).map(|parcel| parcel.token).collect()
    }

    fn sent(outbox: &mut TestBox) -> Vec<Bundle<&'static str, u32>> {
        std::iter::from_fn(|| outbox.next(MAX_BYTES, |_| true)).collect()
    }

    #[test]
    fn what_waits_for_the_same_address_shares_a_message_in_order() {
        let mut outbox = TestBox::default();
        for token in 0..6 {
            outbox.push(if token % 2 == 0 { "even" } else { "odd" }, small(token));
        }
        assert_eq!(tokens(outbox.next(MAX_BYTES, |_| true)), [0, 2, 4]);
        assert_eq!(tokens(outbox.next(MAX_BYTES, |_| true)), [1, 3, 5]);
        assert!(outbox.next(MAX_BYTES, |_| true).is_none());
    }

    #[test]
    fn a_message_ends_with_its_calls_its_bytes_or_its_work() {
        let sizes = |share, size, count| {
            let mut outbox = TestBox::default();
            (0..count).for_each(|token| outbox.push("here", parcel(token, share, size)));
            sent(&mut outbox).iter().map(|bundle| bundle.parcels.len()).collect::<Vec<_>>()
        };
        assert_eq!(sizes(Share::LEAST, 10, 130), [64, 64, 2]);
        assert_eq!(sizes(Share::LEAST, 30_000, 5), [2, 2, 1]);
        assert_eq!(sizes(Share::LEAST, 100_000, 2), [1, 1]);
        assert_eq!(sizes(Share::of_work(Duration::from_micros(100)), 10, 25), [10, 10, 5]);
        assert_eq!(sizes(Share::of_work(Duration::from_millis(20)), 10, 2), [1, 1]);
        assert_eq!(sizes(Share::of_work(Duration::ZERO), 10, 65), [64, 1]);
        assert_eq!(sizes(Share::one_of(8), 10, 20), [8, 8, 4]);
        assert_eq!(sizes(Share::one_of(0), 10, 2), [1, 1]);
        assert_eq!(sizes(Share::one_of(1000), 10, 1001), [1000, 1]);
        // Receivers accept no more frames in one message.
        assert_eq!(sizes(Share::one_of(usize::MAX), 10, 2049), [MAX_FRAMES, MAX_FRAMES, 1]);
    }

    #[test]
    fn what_expires_much_later_or_never_goes_by_itself() {
        let mut outbox = TestBox::default();
        for (token, seconds) in [30, 31, 29, 60, 70, 1, 0, 0].into_iter().enumerate() {
            let expiration = (seconds > 0).then(|| Duration::from_secs(seconds));
            outbox.push("here", Parcel { expiration, ..small(token as u32) });
        }
        let bundles = sent(&mut outbox).into_iter().map(|bundle| tokens(Some(bundle))).collect::<Vec<_>>();
        assert_eq!(bundles, [vec![0, 1, 2], vec![3, 4], vec![5], vec![6, 7]]);
    }

    #[test]
    fn a_smaller_cap_on_messages_is_kept() {
        let mut outbox = TestBox::new(250);
        (0..5).for_each(|token| outbox.push("here", small(token)));
        assert_eq!(sent(&mut outbox).len(), 3);
    }

    #[test]
    fn what_is_no_longer_wanted_does_not_leave() {
        let mut outbox = TestBox::default();
        (0..4).for_each(|token| outbox.push("here", small(token)));
        assert_eq!(tokens(outbox.next(MAX_BYTES, |token| token % 2 == 1)), [1, 3]);
        outbox.push("there", small(5));
        assert!(outbox.next(MAX_BYTES, |_| false).is_none());
    }

    #[test]
    fn an_address_is_forgotten_when_nothing_waits_for_it() {
        let mut outbox = TestBox::default();
        (0..65).for_each(|token| outbox.push("here", small(token)));
        assert_eq!(sent(&mut outbox).len(), 2);
        outbox.push("there", small(0));
        assert!(outbox.next(MAX_BYTES, |_| false).is_none());
        assert!(outbox.by_address.is_empty() && outbox.order.is_empty());
        (0..3).for_each(|token| outbox.push("here", small(token)));
        assert_eq!(outbox.clear().count(), 3);
        assert!(outbox.next(MAX_BYTES, |_| true).is_none());
    }

    #[test]
    fn a_message_lasts_as_long_as_its_longest_call_and_names_only_what_all_share() {
        let brief = Parcel { expiration: Some(Duration::from_secs(1)), ..small(0) };
        let long = Parcel { expiration: Some(Duration::from_secs(9)), ..small(1) };
        let other = Parcel { kind: Some("demo.v1.div".into()), ..small(2) };
        let bundle = |parcels| Bundle { address: "here", parcels };
        let both = bundle(vec![brief, long]);
        assert_eq!(both.expiration(), Some(Duration::from_secs(9)));
        assert_eq!((both.kind().as_deref(), both.correlation_id()), (Some("demo.v1.add"), None));
        let alone = bundle(vec![small(3)]);
        assert_eq!(alone.correlation_id(), Some(alone.parcels[0].id.to_string()));
        let mixed = bundle(vec![small(4), other]);
        assert_eq!((mixed.kind(), mixed.expiration()), (None, None));
    }
}
