//! The messages that were published and whose outcomes are not known yet.

use tokio::sync::mpsc;

use crate::map::FastMap;
use crate::transport::{Confirm, Lost, ReceiptSender};

/// What an owner keeps of each message until its outcome is known. Outcomes come in any order.
#[derive(Debug)]
pub(crate) struct Receipts<B> {
    kept: FastMap<u64, B>,
    /// The number of the last message.
    number: u64,
    tell: mpsc::UnboundedSender<(u64, Result<Confirm, Lost>)>,
    told: mpsc::UnboundedReceiver<(u64, Result<Confirm, Lost>)>,
}

impl<B> Default for Receipts<B> {
    fn default() -> Self {
        let (tell, told) = mpsc::unbounded_channel();
        Self { kept: FastMap::default(), number: 0, tell, told }
    }
}

impl<B> Receipts<B> {
    /// Keeps something of a message. Returns where its outcome has to be told.
    pub(crate) fn keep(&mut self, what: B) -> ReceiptSender {
        self.number += 1;
        self.kept.insert(self.number, what);
        ReceiptSender::numbered(self.number, self.tell.clone())
    }

    /// Whether every outcome is known.
    pub(crate) fn is_empty(&self) -> bool {
        self.kept.is_empty()
    }

    /// What was kept of the next message whose outcome is known, and that outcome. Never resolves if there is none.
    /// Nothing is lost if this is dropped.
    pub(crate) async fn next(&mut self) -> (B, Result<Confirm, Lost>) {
        loop {
            match self.told.recv().await {
                Some((number, said)) => {
                    if let Some(what) = self.kept.remove(&number) {
                        return (what, said);
                    }
                }
                // `tell` is here, so there is always somebody who may send.
                None => std::future::pending().await,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[test]
    fn each_outcome_comes_with_what_was_kept_of_its_message() {
        let mut receipts = Receipts::default();
        let [first, second, third] = ["first", "second", "third"].map(|name| receipts.keep(name));
        assert!(receipts.next().now_or_never().is_none());
        second.tell(Ok(Confirm::Returned));
        first.tell(Ok(Confirm::Accepted));
        assert_eq!(receipts.next().now_or_never(), Some(("second", Ok(Confirm::Returned))));
        assert_eq!(receipts.next().now_or_never(), Some(("first", Ok(Confirm::Accepted))));
        // Whoever had to tell it is gone.
        drop(third);
        let (name, said) = receipts.next().now_or_never().expect("it is told");
        assert!(name == "third" && said.is_err_and(|lost| lost.may_have_arrived()));
        assert!(receipts.is_empty() && receipts.next().now_or_never().is_none());
    }
}
