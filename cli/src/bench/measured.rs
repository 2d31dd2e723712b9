//! What is measured, and the results.

use std::time::Duration;

use clap::ValueEnum;
use hdrhistogram::Histogram;
use hopline::{Coalesce, Traffic};

/// The longest warm-up.
const WARM_UP: Duration = Duration::from_secs(1);

/// What to measure.
#[derive(Clone, Copy)]
pub(super) struct Load {
    pub(super) concurrency: usize,
    pub(super) size: usize,
    pub(super) coalesce: Coalesce,
    pub(super) style: Style,
    pub(super) methods: usize,
    pub(super) measured: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Style {
    /// Request and reply
    Call,
    /// Sent, and confirmed by the broker
    Oneway,
}

impl Load {
    /// How long the load runs, with the warm-up.
    pub(super) fn length(&self) -> Duration {
        self.warm_up() + self.measured
    }

    /// The time at the beginning that does not count.
    pub(super) fn warm_up(&self) -> Duration {
        WARM_UP.min(self.measured / 5)
    }
}

/// The results of a load.
pub(super) struct Measured {
    /// The latencies of the calls that ended well in the measured time, in microseconds.
    pub(super) latencies: Histogram<u64>,
    /// The measured time.
    pub(super) elapsed: Duration,
    /// How many calls have failed, also before and after the measured time.
    pub(super) errors: u64,
    pub(super) first_error: Option<String>,
    /// Calls and messages in the measured time.
    pub(super) traffic: Traffic,
    /// The CPU time of this process in the measured time, if the system tells it.
    pub(super) cpu: Option<Duration>,
}

impl Measured {
    pub(super) fn calls(&self) -> u64 {
        self.latencies.len()
    }

    pub(super) fn calls_per_second(&self) -> f64 {
        self.calls() as f64 / self.elapsed.as_secs_f64()
    }

    /// The latency that this part of the calls did not exceed, in microseconds.
    pub(super) fn latency(&self, part: f64) -> Option<u64> {
        (self.calls() > 0).then(|| self.latencies.value_at_quantile(part))
    }

    pub(super) fn messages_per_second(&self) -> Option<f64> {
        let Traffic { messages_sent, messages_received, .. } = self.traffic;
        (messages_sent > 0).then(|| (messages_sent + messages_received) as f64 / self.elapsed.as_secs_f64())
    }

    pub(super) fn calls_per_message(&self) -> Option<f64> {
        let Traffic { messages_sent, calls_sent, .. } = self.traffic;
        (messages_sent > 0).then(|| calls_sent as f64 / messages_sent as f64)
    }

    /// CPU time per call, in microseconds.
    pub(super) fn cpu_per_call(&self) -> Option<f64> {
        let cpu = self.cpu.filter(|_| self.calls() > 0)?;
        Some(cpu.as_secs_f64() * 1e6 / self.calls() as f64)
    }
}
