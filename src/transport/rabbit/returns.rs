//! Tells which publications the broker has returned. lapin does not: it attaches a return to the confirm of another
//! publication.

use std::collections::HashSet;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::{Context, Poll, Wake, Waker};

use futures::stream::FuturesUnordered;
use futures::{Stream as _, StreamExt as _};

use crate::transport::Confirm;

/// Finds out which publications were returned and which were accepted.
///
/// The broker sends the return of a publication before its confirm. lapin puts returns into a queue, and attaches the
/// first of them to whichever publication is confirmed next. So when a publication is confirmed, its return, if there
/// is one, was attached to this confirm or to an earlier one, or it is still in lapin's queue. In the last case:
///
/// - The queue was not empty since the return came, so each confirm since then had a return attached. That makes as
///   many returns as confirms. If all of them belonged to confirmed publications, ours would be among them. So some
///   belong to publications that are not confirmed yet: they are [`ahead`](Self::ahead).
/// - Returns come and are attached in the order of publishing. So ours has a higher number than all that were attached
///   so far.
///
/// So a confirm is certain if no return is ahead, or if a return with a higher number was seen. Both hold only if every
/// earlier confirm has been seen: [`ended_so_far`] makes sure of that.
pub(super) struct Returns<T> {
    /// The numbers of publications that were returned and are not confirmed yet.
    pub(super) ahead: HashSet<u64>,
    /// The highest number of a publication that was returned.
    up_to: u64,
    /// Publications that were confirmed (`true` for an ack) while their return may still come.
    pub(super) held: Vec<(u64, bool, T)>,
}

impl<T> Default for Returns<T> {
    fn default() -> Self {
        Self { ahead: HashSet::new(), up_to: 0, held: Vec::new() }
    }
}

impl<T> Returns<T> {
    /// Takes what was confirmed since the last time: for each publication its number, whether it was acked, the number
    /// of the attached return, and its token. Returns the publications whose outcome is certain now.
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

/// Waits until one of the publications is confirmed, then takes all that are.
pub(super) async fn all_ended<F: Future>(flights: &mut FuturesUnordered<F>) -> Vec<F::Output> {
    let mut ended: Vec<_> = flights.next().await.into_iter().collect();
    ended.append(&mut ended_so_far(flights));
    ended
}

/// Takes all publications that are confirmed by now, without waiting.
///
/// `Pending` alone does not mean that no other is ready: `FuturesUnordered` yields now and then, and wakes itself when
/// it does. So it is polled again as long as it was woken.
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

/// A waker that only notes that it was woken.
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
