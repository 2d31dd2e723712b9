//! What became of a publication, when lapin attaches a return to another's confirm.

use std::collections::HashSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures::stream::FuturesUnordered;
use futures::{Stream as _, StreamExt as _};

use crate::transport::Confirm;

/// Tells a returned publication from an accepted one.
///
/// The broker sends a publication's return before its confirm. lapin puts returns in a queue, and attaches the first
/// in it to whichever publication is confirmed next. So the return of a confirmed publication is either attached to
/// a confirm that came no later, or still in lapin's queue; and then
/// - the queue has not been empty since it came, so each confirm since carried a return. Those are as many returns
///   as confirms: were all of them returns of confirmed publications, ours would be among them. While a return is
///   [`ahead`](Self::ahead) of its own confirm, and only then, others may be missing;
/// - returns come and are attached in the order of publishing, so ours has a higher number than all that were seen.
///
/// Both need that every confirm before the ones in hand has been seen, which [`ended_so_far`] sees to.
pub(super) struct Returns<T> {
    /// Returned, and not yet confirmed.
    pub(super) ahead: HashSet<u64>,
    /// The highest number that was returned.
    up_to: u64,
    /// Confirmed with an ack or a nack, while a return of theirs may still come.
    pub(super) held: Vec<(u64, bool, T)>,
}

impl<T> Default for Returns<T> {
    fn default() -> Self {
        Self { ahead: HashSet::new(), up_to: 0, held: Vec::new() }
    }
}

impl<T> Returns<T> {
    /// Takes the number, the ack or nack and the attached return of each publication confirmed since the last time;
    /// gives those of which the outcome is certain.
    pub(super) fn decide(&mut self, confirmed: Vec<(u64, bool, Option<u64>, T)>) -> Vec<(T, Confirm)> {
        for (number, acked, returned, token) in confirmed {
            self.held.push((number, acked, token));
            if let Some(returned) = returned {
                self.ahead.insert(returned);
                self.up_to = self.up_to.max(returned);
            }
        }
        let mut certain = Vec::with_capacity(self.held.len());
        let mut acks = Vec::new();
        for (number, acked, token) in std::mem::take(&mut self.held) {
            if self.ahead.remove(&number) {
                certain.push((token, Confirm::Returned));
            } else if acked {
                acks.push((number, acked, token));
            } else {
                certain.push((token, Confirm::Refused));
            }
        }
        for ack in acks {
            if self.ahead.is_empty() || ack.0 < self.up_to {
                certain.push((ack.2, Confirm::Accepted));
            } else {
                self.held.push(ack);
            }
        }
        certain
    }
}

/// Waits for a flight to end, then takes every flight that has ended.
pub(super) async fn all_ended<F: Future>(flights: &mut FuturesUnordered<F>) -> Vec<F::Output> {
    let mut ended: Vec<_> = flights.next().await.into_iter().collect();
    ended.append(&mut ended_so_far(flights));
    ended
}

/// Takes every flight that has ended; the end of another wakes nobody.
///
/// `Pending` alone does not mean that none is left: the set also yields now and then, and wakes itself when it does.
pub(super) fn ended_so_far<F: Future>(flights: &mut FuturesUnordered<F>) -> Vec<F::Output> {
    let mut ended = Vec::new();
    let woken = Arc::new(Woken::default());
    let waker = Waker::from(woken.clone());
    let mut context = Context::from_waker(&waker);
    loop {
        match Pin::new(&mut *flights).poll_next(&mut context) {
            Poll::Ready(Some(flight)) => ended.push(flight),
            Poll::Pending if woken.0.swap(false, Ordering::SeqCst) => {}
            Poll::Ready(None) | Poll::Pending => return ended,
        }
    }
}

#[derive(Default)]
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn decided(returns: &mut Returns<u64>, confirmed: &[(u64, Option<u64>)]) -> Vec<(u64, Confirm)> {
        let confirmed = confirmed.iter().map(|&(number, returned)| (number, true, returned, number));
        let mut decided = returns.decide(confirmed.collect());
        decided.sort_by_key(|(number, _)| *number);
        decided
    }

    #[test]
    fn a_return_attached_to_another_confirm_counts_for_its_own_publication() {
        let mut returns = Returns::default();
        let decided = decided(&mut returns, &[(1, Some(2)), (2, None), (3, None)]);
        assert_eq!(decided, [(1, Confirm::Accepted), (2, Confirm::Returned), (3, Confirm::Accepted)]);
    }

    #[test]
    fn a_confirm_is_held_while_its_own_return_may_still_come() {
        let mut returns = Returns::default();
        // 5 and 7 were returned; 7 is confirmed first and carries the return of 5.
        assert_eq!(decided(&mut returns, &[(7, Some(5))]), []);
        assert_eq!(decided(&mut returns, &[(5, Some(7))]), [(5, Confirm::Returned), (7, Confirm::Returned)]);
    }

    #[test]
    fn a_held_confirm_is_accepted_once_no_return_is_ahead() {
        let mut returns = Returns::default();
        assert_eq!(decided(&mut returns, &[(6, Some(5))]), []);
        assert_eq!(decided(&mut returns, &[(5, None)]), [(5, Confirm::Returned), (6, Confirm::Accepted)]);
    }

    #[test]
    fn a_confirm_below_the_last_return_is_certain() {
        let mut returns = Returns::default();
        assert_eq!(decided(&mut returns, &[(4, Some(5))]), [(4, Confirm::Accepted)]);
    }

    #[test]
    fn a_nack_is_a_refusal() {
        let mut returns = Returns::default();
        assert_eq!(returns.decide(vec![(1, false, None, "one")]), [("one", Confirm::Refused)]);
    }
}
