//! Frames that wait to leave, and which of them share a message.

use std::collections::{HashMap, VecDeque};
use std::hash::Hash;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use uuid::Uuid;

/// How many calls share a message at most, unless a client says otherwise.
const MAX_SHARING: usize = 64;
/// How many bytes of frames share a message at most. A frame over it goes alone.
const MAX_BYTES: usize = 64 * 1024;
/// How much work shares a message at most.
const MAX_WORK: Duration = Duration::from_millis(1);
/// How many messages that had room left may be on their way to one address before the next waits until it is full, or
/// until the broker has confirmed one of them. A lone call never waits.
const WINDOW: usize = 4;

/// How much of a message a frame takes up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(crate) struct Share(u32);

impl Share {
    /// The whole of it: such a frame never waits for others.
    pub(crate) const ALL: Self = Self(1 << 20);
    /// As little as a frame can.
    pub(crate) const LEAST: Self = Self(Self::ALL.0 / MAX_SHARING as u32);

    /// That of one frame in a message of `frames`.
    pub(crate) fn one_of(frames: usize) -> Self {
        Self(u32::try_from(frames).map_or(1, |frames| Self::ALL.0 / frames.max(1)).max(1))
    }

    pub(crate) fn plus(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// That of a call whose handler takes so long.
    pub(crate) fn of_work(time: Duration) -> Self {
        let part = time.as_nanos().saturating_mul(Self::ALL.0.into()) / MAX_WORK.as_nanos();
        Self(u32::try_from(part).unwrap_or(u32::MAX).clamp(Self::LEAST.0, Self::ALL.0))
    }
}

/// A frame that is to leave, and what belongs to it.
#[derive(Debug)]
pub(crate) struct Parcel<T> {
    pub(crate) id: Uuid,
    pub(crate) frame: Bytes,
    pub(crate) share: Share,
    /// The AMQP `type`, such as `demo.v1.add`.
    pub(crate) kind: Option<Arc<str>>,
    /// After this time in a queue nobody wants it any more.
    pub(crate) expiration: Option<Duration>,
    pub(crate) token: T,
}

/// Parcels that share a message.
#[derive(Debug)]
pub(crate) struct Bundle<A, T> {
    pub(crate) address: A,
    pub(crate) parcels: Vec<Parcel<T>>,
    /// Others could have come along.
    has_room: bool,
}

impl<A, T> Bundle<A, T> {
    pub(crate) fn body(&self) -> Bytes {
        if let [alone] = &*self.parcels {
            return alone.frame.clone();
        }
        let mut body = BytesMut::with_capacity(self.parcels.iter().map(|parcel| parcel.frame.len()).sum());
        for parcel in &self.parcels {
            body.extend_from_slice(&parcel.frame);
        }
        body.freeze()
    }

    /// The longest of theirs: each frame tells its own.
    pub(crate) fn expiration(&self) -> Option<Duration> {
        let longest = self.parcels.iter().map(|parcel| parcel.expiration.unwrap_or(Duration::MAX)).max();
        longest.filter(|longest| *longest < Duration::MAX)
    }

    /// The AMQP `type`, if it is the same for all.
    pub(crate) fn kind(&self) -> Option<String> {
        let (first, others) = self.parcels.split_first()?;
        let alike = others.iter().all(|other| other.kind == first.kind);
        first.kind.as_deref().filter(|_| alike).map(str::to_owned)
    }

    /// The AMQP `correlation_id`, of a frame that is alone.
    pub(crate) fn correlation_id(&self) -> Option<String> {
        if let [alone] = &*self.parcels { Some(alone.id.to_string()) } else { None }
    }
}

/// Frames that wait to leave, by address: those that agree on it may share a message.
#[derive(Debug)]
pub(crate) struct Outbox<A, T> {
    lanes: HashMap<A, Lane<T>>,
    /// Lanes from which something may leave, in the order in which they were added.
    ready: VecDeque<A>,
}

#[derive(Debug)]
struct Lane<T> {
    waiting: VecDeque<Parcel<T>>,
    share: u64,
    bytes: usize,
    /// Messages on their way that had room left.
    with_room: usize,
    listed: bool,
}

impl<T> Default for Lane<T> {
    fn default() -> Self {
        Self { waiting: VecDeque::new(), share: 0, bytes: 0, with_room: 0, listed: false }
    }
}

impl<T> Lane<T> {
    fn push(&mut self, parcel: Parcel<T>) {
        self.share += u64::from(parcel.share.0);
        self.bytes += parcel.frame.len();
        self.waiting.push_back(parcel);
    }

    fn pop(&mut self) -> Option<Parcel<T>> {
        let parcel = self.waiting.pop_front()?;
        self.share -= u64::from(parcel.share.0);
        self.bytes -= parcel.frame.len();
        Some(parcel)
    }

    /// Whether what waits is to wait for more.
    fn is_held(&self) -> bool {
        self.with_room >= WINDOW && self.share < u64::from(Share::ALL.0) && self.bytes < MAX_BYTES
    }

    fn is_idle(&self) -> bool {
        self.waiting.is_empty() && self.with_room == 0
    }
}

impl<A, T> Default for Outbox<A, T> {
    fn default() -> Self {
        Self { lanes: HashMap::new(), ready: VecDeque::new() }
    }
}

impl<A: Clone + Eq + Hash, T> Outbox<A, T> {
    pub(crate) fn push(&mut self, address: A, parcel: Parcel<T>) {
        if let Some(lane) = self.lanes.get_mut(&address) {
            lane.push(parcel);
            if !lane.listed {
                lane.listed = true;
                self.ready.push_back(address);
            }
            return;
        }
        let mut lane = Lane { listed: true, ..Lane::default() };
        lane.push(parcel);
        self.ready.push_back(address.clone());
        self.lanes.insert(address, lane);
    }

    /// What leaves next, if anything does: the longest waiting, and what goes along with it. Parcels that are no longer
    /// `wanted` are dropped.
    pub(crate) fn next(&mut self, mut wanted: impl FnMut(&T) -> bool) -> Option<Bundle<A, T>> {
        while let Some(address) = self.ready.pop_front() {
            let Some(lane) = self.lanes.get_mut(&address) else { continue };
            lane.listed = false;
            if lane.is_held() {
                continue;
            }
            let (mut parcels, mut share, mut bytes) = (Vec::new(), 0, 0);
            let mut has_room = true;
            while let Some(next) = lane.waiting.front() {
                let fits =
                    share + u64::from(next.share.0) <= u64::from(Share::ALL.0) && bytes + next.frame.len() <= MAX_BYTES;
                if !parcels.is_empty() && !fits {
                    has_room = false;
                    break;
                }
                let Some(next) = lane.pop() else { break };
                if wanted(&next.token) {
                    share += u64::from(next.share.0);
                    bytes += next.frame.len();
                    parcels.push(next);
                }
            }
            has_room &= share + u64::from(Share::LEAST.0) <= u64::from(Share::ALL.0) && bytes < MAX_BYTES;
            if parcels.is_empty() {
                if lane.is_idle() {
                    self.lanes.remove(&address);
                }
                continue;
            }
            lane.with_room += usize::from(has_room);
            if !lane.waiting.is_empty() {
                lane.listed = true;
                self.ready.push_front(address.clone());
            } else if lane.is_idle() {
                self.lanes.remove(&address);
            }
            return Some(Bundle { address, parcels, has_room });
        }
        None
    }

    /// The broker has said what became of a bundle's message: others may follow it.
    pub(crate) fn arrived(&mut self, bundle: &Bundle<A, T>) {
        if !bundle.has_room {
            return;
        }
        let Some(lane) = self.lanes.get_mut(&bundle.address) else { return };
        lane.with_room -= 1;
        if lane.is_idle() {
            self.lanes.remove(&bundle.address);
        } else if !lane.waiting.is_empty() && !lane.listed {
            lane.listed = true;
            self.ready.push_back(bundle.address.clone());
        }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lanes.values().all(|lane| lane.waiting.is_empty())
    }

    /// Takes out all that waits.
    pub(crate) fn clear(&mut self) -> impl Iterator<Item = Parcel<T>> {
        self.ready.clear();
        self.lanes.drain().flat_map(|(_, lane)| lane.waiting)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    type Box = Outbox<&'static str, u32>;

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

    fn sent(outbox: &mut Box) -> Vec<Bundle<&'static str, u32>> {
        std::iter::from_fn(|| outbox.next(|_| true)).collect()
    }

    #[test]
    fn what_waits_for_the_same_address_shares_a_message_in_order() {
        let mut outbox = Box::default();
        for token in 0..6 {
            outbox.push(if token % 2 == 0 { "even" } else { "odd" }, small(token));
        }
        assert_eq!(tokens(outbox.next(|_| true)), [0, 2, 4]);
        assert_eq!(tokens(outbox.next(|_| true)), [1, 3, 5]);
        assert!(outbox.next(|_| true).is_none());
    }

    #[test]
    fn a_message_ends_with_its_calls_its_bytes_or_its_work() {
        let sizes = |share, size, count| {
            let mut outbox = Box::default();
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
    }

    #[test]
    fn messages_with_room_left_wait_for_a_confirm_once_there_are_enough_and_full_ones_do_not() {
        let mut outbox = Box::default();
        let mut under_way = Vec::new();
        for token in 0..WINDOW {
            outbox.push("here", small(token as u32));
            under_way.extend(sent(&mut outbox));
        }
        assert_eq!(under_way.len(), WINDOW);
        outbox.push("here", small(90));
        assert!(sent(&mut outbox).is_empty());
        outbox.push("there", small(91));
        assert_eq!(tokens(outbox.next(|_| true)), [91]);
        (100..163).for_each(|token| outbox.push("here", small(token)));
        assert_eq!(tokens(outbox.next(|_| true)).len(), 64);
        outbox.push("here", small(92));
        outbox.push("here", parcel(93, Share::ALL, 10));
        assert_eq!(sent(&mut outbox).len(), 2, "a slow one, and the one before it, do not wait");
        outbox.push("here", small(94));
        assert!(sent(&mut outbox).is_empty());
        outbox.arrived(&under_way[0]);
        assert_eq!(tokens(outbox.next(|_| true)), [94]);
    }

    #[test]
    fn what_is_no_longer_wanted_does_not_leave() {
        let mut outbox = Box::default();
        (0..4).for_each(|token| outbox.push("here", small(token)));
        assert_eq!(tokens(outbox.next(|token| token % 2 == 1)), [1, 3]);
        outbox.push("there", small(5));
        assert!(outbox.next(|_| false).is_none());
    }

    #[test]
    fn an_address_is_forgotten_when_nothing_waits_or_is_under_way() {
        let mut outbox = Box::default();
        (0..65).for_each(|token| outbox.push("here", small(token)));
        for bundle in sent(&mut outbox) {
            outbox.arrived(&bundle);
        }
        outbox.push("there", small(0));
        assert!(outbox.next(|_| false).is_none());
        outbox.push("alone", parcel(0, Share::ALL, 10));
        assert_eq!(sent(&mut outbox).len(), 1);
        assert!(outbox.lanes.is_empty() && outbox.ready.is_empty());
    }

    #[test]
    fn a_message_lasts_as_long_as_its_longest_call_and_names_only_what_all_share() {
        let brief = Parcel { expiration: Some(Duration::from_secs(1)), ..small(0) };
        let long = Parcel { expiration: Some(Duration::from_secs(9)), ..small(1) };
        let other = Parcel { kind: Some("demo.v1.div".into()), ..small(2) };
        let bundle = |parcels| Bundle { address: "here", parcels, has_room: true };
        let both = bundle(vec![brief, long]);
        assert_eq!(both.expiration(), Some(Duration::from_secs(9)));
        assert_eq!((both.kind().as_deref(), both.correlation_id()), (Some("demo.v1.add"), None));
        let alone = bundle(vec![small(3)]);
        assert_eq!(alone.correlation_id(), Some(alone.parcels[0].id.to_string()));
        let mixed = bundle(vec![small(4), other]);
        assert_eq!((mixed.kind(), mixed.expiration()), (None, None));
    }
}
