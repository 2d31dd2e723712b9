//! The acks of one consumer, collected to be sent in few frames.

use std::collections::BTreeSet;

/// The acks that are not sent yet. The broker gives deliveries the tags 1, 2, 3 and so on, so it is known without
/// being told which of them are not settled.
#[derive(Debug, Default)]
pub(super) struct Acks {
    /// Everything up to this tag is settled.
    up_to: u64,
    /// The tags after that which are settled, or whose ack is waiting.
    settled: BTreeSet<u64>,
    /// The tags whose ack is waiting.
    waiting: BTreeSet<u64>,
    /// How many deliveries are settled in all.
    count: u64,
}

impl Acks {
    /// Collects an ack.
    pub(super) fn add(&mut self, tag: u64) {
        self.waiting.insert(tag);
        self.settled.insert(tag);
    }

    /// Notes that a delivery was settled in another way.
    pub(super) fn settled_otherwise(&mut self, tag: u64) {
        self.settled.insert(tag);
        self.count += 1;
    }

    /// How many acks are waiting.
    pub(super) fn waiting(&self) -> usize {
        self.waiting.len()
    }

    /// How many deliveries the broker counts as unsettled, if this is the tag of the last one.
    pub(super) fn unsettled(&self, last: u64) -> u64 {
        last.saturating_sub(self.count)
    }

    /// Sends what is waiting: `send` gets a tag, and whether it stands for all before it as well. Those in front of
    /// which nothing is unsettled are sent in one frame.
    pub(super) fn send(&mut self, mut send: impl FnMut(u64, bool)) {
        while self.settled.remove(&(self.up_to + 1)) {
            self.up_to += 1;
        }
        let later = self.waiting.split_off(&(self.up_to + 1));
        if let Some(last) = self.waiting.last() {
            send(*last, self.waiting.len() > 1);
        }
        later.iter().for_each(|tag| send(*tag, false));
        self.count += (self.waiting.len() + later.len()) as u64;
        self.waiting.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sent(acks: &mut Acks) -> Vec<(u64, bool)> {
        let mut sent = Vec::new();
        acks.send(|tag, multiple| sent.push((tag, multiple)));
        sent
    }

    #[test]
    fn those_in_front_of_which_nothing_is_unsettled_are_sent_at_once() {
        let mut acks = Acks::default();
        [3, 1, 2, 6].into_iter().for_each(|tag| acks.add(tag));
        assert_eq!((acks.waiting(), acks.unsettled(7)), (4, 7));
        assert_eq!(sent(&mut acks), [(3, true), (6, false)]);
        assert_eq!((acks.waiting(), acks.unsettled(7)), (0, 3));
        assert_eq!(sent(&mut acks), []);
        [4, 5].into_iter().for_each(|tag| acks.add(tag));
        assert_eq!(sent(&mut acks), [(5, true)]);
        acks.add(7);
        assert_eq!(sent(&mut acks), [(7, false)]);
        assert_eq!((acks.up_to, acks.settled.len(), acks.unsettled(7)), (7, 0, 0));
    }

    #[test]
    fn what_is_settled_otherwise_stands_in_nobodys_way() {
        let mut acks = Acks::default();
        acks.add(1);
        acks.settled_otherwise(2);
        acks.add(3);
        assert_eq!(sent(&mut acks), [(3, true)]);
        acks.settled_otherwise(4);
        assert_eq!((sent(&mut acks), acks.unsettled(5)), (vec![], 1));
        assert_eq!(acks.up_to, 4);
    }
}
