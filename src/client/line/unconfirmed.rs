//! The messages that the broker has not confirmed yet, and the calls in them.
//!
//! The line keeps each message here from when it is sent until the broker confirms, returns or refuses it, or until it
//! is lost.

use std::collections::{BTreeMap, HashMap};

use tokio::sync::oneshot;
use tokio::time::Instant;
use uuid::Uuid;

use super::{Addressed, Token};
use crate::client::in_flight::CallEnd;
use crate::exchanges::Address;
use crate::outgoing::Bundle;

/// A message without a confirm.
pub(super) struct MessageUnderWay {
    /// The calls in it, and where it went.
    pub(super) bundle: Bundle<Address, Token>,
    /// When it was sent.
    pub(super) since: Instant,
    /// The cancels of those of its calls whose callers have given up.
    pub(super) given_up: Vec<Addressed>,
}

/// The messages without a confirm, by their numbers.
#[derive(Default)]
pub(super) struct Unconfirmed {
    messages: BTreeMap<u64, MessageUnderWay>,
    /// Finds the parcels whose callers wait for the confirm: the number of the message, and the position in it.
    told: HashMap<Uuid, (u64, usize)>,
    /// How many cancels wait in all messages.
    given_up: usize,
}

impl Unconfirmed {
    /// Adds a message that was just sent.
    pub(super) fn insert(&mut self, number: u64, bundle: Bundle<Address, Token>, since: Instant) {
        let told = bundle.parcels.iter().enumerate().filter(|(_, parcel)| parcel.token.said.is_some());
        self.told.extend(told.map(|(place, parcel)| (parcel.id, (number, place))));
        self.messages.insert(number, MessageUnderWay { bundle, since, given_up: Vec::new() });
    }

    pub(super) fn contains(&self, number: u64) -> bool {
        self.messages.contains_key(&number)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.messages.is_empty()
    }

    /// The keys of the messages that were sent before `time`, the earliest first.
    pub(super) fn keys_before(&self, time: Instant) -> impl Iterator<Item = &str> {
        let before = self.messages.values().take_while(move |away| away.since <= time);
        before.map(|away| &**away.bundle.address.key())
    }

    /// Takes out a message whose outcome is known.
    pub(super) fn remove(&mut self, number: u64) -> Option<MessageUnderWay> {
        let away = self.messages.remove(&number)?;
        self.given_up -= away.given_up.len();
        for parcel in away.bundle.parcels.iter().filter(|parcel| parcel.token.said.is_some()) {
            self.told.remove(&parcel.id);
        }
        Some(away)
    }

    /// Takes out the caller that waits for the confirm of `id`. This does not search: with 100 000 calls it takes as
    /// long as with one.
    pub(super) fn release_one(&mut self, id: Uuid) -> Option<oneshot::Sender<CallEnd>> {
        let (number, place) = self.told.remove(&id)?;
        self.messages.get_mut(&number)?.bundle.parcels.get_mut(place)?.token.said.take()
    }

    /// Takes out all callers that wait for a confirm. None of their calls is sent again.
    pub(super) fn release(&mut self) -> Vec<oneshot::Sender<CallEnd>> {
        self.told.clear();
        let parcels = self.messages.values_mut().flat_map(|away| &mut away.bundle.parcels);
        let said = parcels.filter_map(|parcel| {
            parcel.token.repeatable = false;
            parcel.token.said.take()
        });
        said.collect()
    }

    /// Keeps the cancel of a call until the broker has confirmed the call's message. Gives the cancel back if it has
    /// done so already.
    pub(super) fn give_up(&mut self, number: u64, cancel: Addressed) -> Option<Addressed> {
        let Some(away) = self.messages.get_mut(&number) else { return Some(cancel) };
        away.given_up.push(cancel);
        self.given_up += 1;
        None
    }

    /// Whether a cancel waits for the confirm of its call.
    pub(super) fn keeps_cancels(&self) -> bool {
        self.given_up > 0
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::frame::Kind;
    use crate::outgoing::{Parcel, Share};

    fn address() -> Address {
        Address::queue("k", Kind::Oneway)
    }

    fn parcel(said: Option<oneshot::Sender<CallEnd>>) -> Parcel<Token> {
        let token = Token { said, repeatable: true, ..Token::until(Instant::now()) };
        Parcel { id: Uuid::new_v4(), frame: Bytes::new(), share: Share::LEAST, kind: None, expiration: None, token }
    }

    /// Messages of so many parcels, and who waits for each parcel.
    fn under_way(messages: u64, parcels: usize) -> (Unconfirmed, Vec<(Uuid, oneshot::Receiver<CallEnd>)>) {
        let (mut unconfirmed, mut waiting) = (Unconfirmed::default(), Vec::new());
        for number in 0..messages {
            let one = |_| {
                let (said, told) = oneshot::channel();
                let parcel = parcel(Some(said));
                waiting.push((parcel.id, told));
                parcel
            };
            let parcels = (0..parcels).map(one).collect();
            unconfirmed.insert(number, Bundle { address: address(), parcels }, Instant::now());
        }
        (unconfirmed, waiting)
    }

    #[test]
    fn whoever_waits_for_one_of_many_is_found_where_it_is_and_nothing_is_kept_of_it() {
        let (mut unconfirmed, waiting) = under_way(300, 64);
        assert_eq!(unconfirmed.told.len(), 300 * 64);
        for (id, mut told) in waiting.into_iter().rev() {
            let (number, place) = unconfirmed.told[&id];
            assert_eq!(unconfirmed.messages[&number].bundle.parcels[place].id, id);
            unconfirmed.release_one(id).expect("it waits").send(CallEnd::Full(7)).expect("it listens");
            assert!(matches!(told.try_recv(), Ok(CallEnd::Full(7))));
            assert!(unconfirmed.release_one(id).is_none());
        }
        assert!(unconfirmed.told.is_empty() && unconfirmed.contains(299));
    }

    #[test]
    fn what_is_confirmed_or_released_is_not_found_any_more() {
        let (mut unconfirmed, waiting) = under_way(3, 2);
        let away = unconfirmed.remove(1).expect("it is under way");
        assert_eq!(
            away.bundle.parcels.iter().map(|parcel| parcel.id).collect::<Vec<_>>(),
            [waiting[2].0, waiting[3].0]
        );
        assert!(unconfirmed.release_one(waiting[2].0).is_none() && unconfirmed.remove(1).is_none());
        assert_eq!(unconfirmed.release().len(), 4);
        assert!(unconfirmed.told.is_empty() && unconfirmed.release_one(waiting[0].0).is_none());
        assert!(unconfirmed.remove(0).expect("it is under way").bundle.parcels.iter().all(|one| !one.token.repeatable));
    }

    #[test]
    fn a_cancel_is_kept_while_its_call_is_under_way() {
        let (mut unconfirmed, _waiting) = under_way(1, 1);
        assert!(unconfirmed.give_up(0, (address(), parcel(None))).is_none() && unconfirmed.keeps_cancels());
        assert!(unconfirmed.give_up(1, (address(), parcel(None))).is_some());
        assert_eq!(unconfirmed.remove(0).expect("it is under way").given_up.len(), 1);
        assert!(!unconfirmed.keeps_cancels());
    }
}
