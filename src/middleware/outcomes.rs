//! How calls have ended lately, which opens a breaker and begins a quarantine.

use std::time::Duration;

use tokio::time::Instant;

/// How many parts the time has in which calls are counted. Each is forgotten as a whole.
const PARTS: u64 = 10;

/// How many calls have ended within the last time, and how many of them have failed.
#[derive(Debug)]
pub(crate) struct OutcomeWindow {
    part: Duration,
    since: Instant,
    parts: [WindowPart; PARTS as usize],
}

#[derive(Debug, Default, Clone, Copy)]
struct WindowPart {
    /// Which one of all that there were it is.
    number: u64,
    ended: u64,
    failed: u64,
}

impl OutcomeWindow {
    pub(crate) fn new(within: Duration) -> Self {
        Self { part: within / PARTS as u32, since: Instant::now(), parts: Default::default() }
    }

    /// Counts a call that ends now. Returns how many have ended within the time, and how many of them have failed.
    pub(crate) fn count(&mut self, failed: bool, now: Instant) -> (u64, u64) {
        let number = self.number(now);
        let part = &mut self.parts[usize::try_from(number % PARTS).unwrap_or_default()];
        if part.number != number {
            *part = WindowPart { number, ..WindowPart::default() };
        }
        part.ended += 1;
        part.failed += u64::from(failed);
        self.recent(number).fold((0, 0), |(ended, failed), part| (ended + part.ended, failed + part.failed))
    }

    /// Whether no call has ended within the time.
    pub(crate) fn is_empty(&self, now: Instant) -> bool {
        self.recent(self.number(now)).all(|part| part.ended == 0)
    }

    /// Forgets all.
    pub(crate) fn clear(&mut self) {
        self.parts = Default::default();
    }

    fn number(&self, now: Instant) -> u64 {
        let passed = now.saturating_duration_since(self.since).as_nanos();
        u64::try_from(passed / self.part.as_nanos().max(1)).unwrap_or(u64::MAX)
    }

    fn recent(&self, number: u64) -> impl Iterator<Item = &WindowPart> {
        self.parts.iter().filter(move |part| part.number.saturating_add(PARTS) > number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_window_forgets_what_is_older_than_its_time() {
        let mut window = OutcomeWindow::new(Duration::from_secs(10));
        assert!(window.is_empty(Instant::now()));
        assert_eq!(window.count(true, Instant::now()), (1, 1));
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(window.count(false, Instant::now()), (2, 1));
        tokio::time::advance(Duration::from_secs(5)).await;
        assert_eq!(window.count(true, Instant::now()), (2, 1), "the first is forgotten");
        assert!(!window.is_empty(Instant::now()));
        tokio::time::advance(Duration::from_secs(60)).await;
        assert!(window.is_empty(Instant::now()));
        assert_eq!(window.count(false, Instant::now()), (1, 0));
        window.clear();
        assert!(window.is_empty(Instant::now()));
    }
}
