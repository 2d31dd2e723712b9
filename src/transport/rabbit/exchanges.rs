//! Which exchanges exist, as far as is known, and the publications that wait until the broker has told.
//!
//! A publication to an exchange that does not exist makes the broker close the channel, and everything in flight on it
//! is lost. So the publisher asks the broker once before it publishes to an exchange for the first time.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex};

/// The exchanges that are known to exist. All channels of one connection share it.
#[derive(Debug, Clone, Default)]
pub(super) struct KnownExchanges(Arc<Mutex<HashSet<String>>>);

impl KnownExchanges {
    /// Notes that an exchange was declared or found.
    pub(super) fn add(&self, exchange: &str) {
        self.0.lock().expect("no panic while holding the set").insert(exchange.to_owned());
    }

    /// Notes that an exchange does not exist any more. Without a name, it could be any of them.
    fn forget(&self, exchange: Option<&str>) {
        let mut known = self.0.lock().expect("no panic while holding the set");
        match exchange {
            Some(exchange) => drop(known.remove(exchange)),
            None => known.clear(),
        }
    }

    /// Whether the exchange is known to exist. The default exchange, whose name is empty, always does.
    pub(super) fn has(&self, exchange: &str) -> bool {
        exchange.is_empty() || self.0.lock().expect("no panic while holding the set").contains(exchange)
    }
}

/// The publications that wait until the broker has told whether their exchange exists. Those to known exchanges do not
/// wait.
#[derive(Debug)]
pub(super) struct ExchangeChecks<T> {
    known: KnownExchanges,
    /// What waits, by exchange, in the order of publishing.
    waiting: HashMap<String, Vec<T>>,
}

/// What is done with a publication.
#[derive(Debug, PartialEq)]
pub(super) enum Admitted<T> {
    /// It is published now: its exchange exists.
    Goes(T),
    /// It waits for the broker's answer. `ask` is true for the first one: its publisher has to ask the broker.
    Waits { ask: bool },
}

impl<T> ExchangeChecks<T> {
    pub(super) fn new(known: KnownExchanges) -> Self {
        Self { known, waiting: HashMap::new() }
    }

    /// Decides what is done with a publication. Keeps it if it has to wait.
    pub(super) fn admit(&mut self, exchange: &str, publication: T) -> Admitted<T> {
        if let Some(waiting) = self.waiting.get_mut(exchange) {
            waiting.push(publication);
            return Admitted::Waits { ask: false };
        }
        if self.known.has(exchange) {
            return Admitted::Goes(publication);
        }
        self.waiting.insert(exchange.to_owned(), vec![publication]);
        Admitted::Waits { ask: true }
    }

    /// Notes whether the exchange exists, and returns what has waited for that, in the order of publishing.
    pub(super) fn answered(&mut self, exchange: &str, there: bool) -> Vec<T> {
        if there {
            self.known.add(exchange);
        }
        self.waiting.remove(exchange).unwrap_or_default()
    }

    /// Notes that the broker has closed a channel. If its reason names an exchange, that one does not exist; otherwise
    /// nothing is sure any more.
    pub(super) fn channel_closed(&self, reason: &str) {
        self.known.forget(missing_exchange(reason));
    }

    /// Whether a publication waits.
    pub(super) fn is_waited_for(&self) -> bool {
        !self.waiting.is_empty()
    }

    /// Takes out everything that waits, when the channel is lost.
    pub(super) fn drain(&mut self) -> impl Iterator<Item = T> {
        self.waiting.drain().flat_map(|(_, waiting)| waiting)
    }
}

/// The exchange in the broker's words "NOT_FOUND - no exchange 'a.b' in vhost '/'".
fn missing_exchange(reason: &str) -> Option<&str> {
    let (_, rest) = reason.split_once("no exchange '")?;
    rest.split_once("' in vhost").map(|(exchange, _)| exchange)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn publications_wait_for_an_answer_in_order_and_hold_up_none_to_another_exchange() {
        let known = KnownExchanges::default();
        known.add("there");
        let mut exchanges = ExchangeChecks::new(known);
        assert_eq!(exchanges.admit("new", 1), Admitted::Waits { ask: true });
        assert_eq!(exchanges.admit("there", 2), Admitted::Goes(2));
        assert_eq!(exchanges.admit("", 3), Admitted::Goes(3));
        assert_eq!(exchanges.admit("new", 4), Admitted::Waits { ask: false });
        assert_eq!(exchanges.admit("newer", 5), Admitted::Waits { ask: true });
        assert_eq!(exchanges.answered("new", true), [1, 4]);
        assert_eq!(exchanges.admit("new", 6), Admitted::Goes(6));
        assert_eq!(exchanges.answered("newer", false), [5]);
        assert_eq!(exchanges.admit("newer", 7), Admitted::Waits { ask: true });
        assert_eq!(exchanges.drain().collect::<Vec<_>>(), [7]);
        assert!(!exchanges.is_waited_for());
    }

    #[test]
    fn an_exchange_that_the_broker_misses_is_asked_for_again() {
        let known = KnownExchanges::default();
        ["a.b", "c"].into_iter().for_each(|exchange| known.add(exchange));
        let mut exchanges = ExchangeChecks::new(known);
        exchanges.channel_closed("NOT_FOUND - no exchange 'a.b' in vhost '/'");
        assert_eq!(exchanges.admit("a.b", 1), Admitted::Waits { ask: true });
        assert_eq!(exchanges.admit("c", 2), Admitted::Goes(2));
        exchanges.channel_closed("the broker closed the channel");
        assert_eq!(exchanges.admit("c", 3), Admitted::Waits { ask: true });
    }
}
