//! A load on one client: it keeps a number of calls in flight, and counts their outcomes.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock};
use std::time::Duration;

use hdrhistogram::Histogram;
use hopline::{Absent, Client, Code, Error};
use indicatif::ProgressBar;
use serde_bytes::ByteBuf;
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until};

use super::measured::{Load, Measured, Style};
use super::serve::{NOTE, SERVICE, echo};
use super::{Broker, millis, process};
use crate::address::said;
use crate::failed::Failed;

/// How many histograms the callers share: few enough to use little memory, and many enough that callers seldom wait for
/// one.
const HISTOGRAMS: usize = 64;
/// How often the progress bar moves.
const TICK: Duration = Duration::from_millis(100);

/// Runs a load on a client of its own.
///
/// # Errors
/// When the first call fails. Calls that fail later are counted.
pub(super) async fn run(load: &Load, broker: &Broker, progress: &ProgressBar) -> Result<Measured, Failed> {
    let client = broker.client(load.coalesce).await?;
    let run = Arc::new(Run::new(*load, client));
    run.probe().await?;
    let mut callers = JoinSet::new();
    for number in 0..load.concurrency {
        callers.spawn(run.clone().calls(number));
    }

    run.wait(load.warm_up(), progress).await;
    let (before, cpu_before) = (run.client.traffic(), process::cpu_time());
    let began = *run.began.get_or_init(Instant::now);
    run.wait(load.measured, progress).await;
    let ended = *run.ended.get_or_init(Instant::now);
    let (after, cpu_after) = (run.client.traffic(), process::cpu_time());

    // Each caller finishes its last call. A cancelled call would cost the server as well.
    while let Some(caller) = callers.join_next().await {
        caller.map_err(|error| Failed::at("a caller broke down", error))?;
    }
    run.client.close().await;
    Ok(Measured {
        latencies: run.latencies(),
        elapsed: ended - began,
        errors: run.errors.load(Ordering::Relaxed),
        first_error: run.first_error.get().cloned(),
        traffic: after.since(before),
        cpu: cpu_after.zip(cpu_before).map(|(after, before)| after.saturating_sub(before)),
    })
}

/// What the callers of a load share.
struct Run {
    load: Load,
    client: Client,
    methods: Vec<String>,
    /// Calls that end after this are counted.
    began: OnceLock<Instant>,
    /// Calls that end after this are not counted any more.
    ended: OnceLock<Instant>,
    /// Latencies in microseconds.
    histograms: Vec<Mutex<Histogram<u64>>>,
    errors: AtomicU64,
    first_error: OnceLock<String>,
    /// Whether the connection is lost: every other call would fail at once.
    lost: AtomicBool,
}

/// The result of a call.
enum Answer {
    /// The reply was right.
    Right,
    /// The reply was not what was sent.
    Wrong,
}

impl Run {
    fn new(load: Load, client: Client) -> Self {
        Self {
            load,
            client,
            methods: (0..load.methods).map(echo).collect(),
            began: OnceLock::new(),
            ended: OnceLock::new(),
            histograms: (0..load.concurrency.min(HISTOGRAMS)).map(|_| Mutex::new(no_latencies())).collect(),
            errors: AtomicU64::new(0),
            first_error: OnceLock::new(),
            lost: AtomicBool::new(false),
        }
    }

    /// Calls every method once, so that a method that cannot be called is noticed at once.
    async fn probe(&self) -> Result<(), Failed> {
        for method in &self.methods {
            // A oneway call would not tell that there is no server.
            let call = self.client.call::<ByteBuf>(SERVICE, method, (ByteBuf::from(vec![0; self.load.size]),));
            // Where the last server has just left, nobody is waited for.
            match call.absent(Absent::Fail).await {
                Ok(_) => {}
                Err(Error::Fault(fault)) if fault.code == Code::Unimplemented => {
                    let Load { methods, .. } = self.load;
                    return Err(Failed::run(format!("{fault} (start `hopline bench serve --methods {methods}`)")));
                }
                Err(error @ Error::NoService { .. }) => {
                    return Err(Failed::run(format!("{} (start one with `hopline bench serve`)", said(&error))));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    /// Makes one call after the other until the time is over.
    async fn calls(self: Arc<Self>, number: usize) {
        let Load { concurrency, size, style, .. } = self.load;
        let mut payload = vec![0; size];
        let histogram = &self.histograms[number % self.histograms.len()];
        // No two calls have the same number, so the reply to another call would be noticed.
        for call in (number..).step_by(concurrency) {
            let stamp = call.to_le_bytes();
            let stamped = size.min(stamp.len());
            payload[..stamped].copy_from_slice(&stamp[..stamped]);

            let left = Instant::now();
            let answer = self.call(style, &self.methods[call % self.methods.len()], &payload).await;
            let took = left.elapsed();
            let over = self.ended.get().is_some();
            match answer {
                Ok(Answer::Right) if self.began.get().is_some() && !over => record(&mut locked(histogram), took),
                Ok(Answer::Right) => {}
                Ok(Answer::Wrong) => self.fail("a reply had other bytes than its call".to_owned()),
                Err(error) => {
                    if matches!(error, Error::Disconnected { .. }) {
                        self.lost.store(true, Ordering::Relaxed);
                    }
                    self.fail(error.to_string().replace('\n', " "));
                }
            }
            if over || self.lost() {
                return;
            }
        }
    }

    async fn call(&self, style: Style, method: &str, payload: &[u8]) -> Result<Answer, Error> {
        let arguments = (ByteBuf::from(payload),);
        match style {
            Style::Call => {
                let reply: ByteBuf = self.client.call(SERVICE, method, arguments).await?;
                Ok(if reply.as_slice() == payload { Answer::Right } else { Answer::Wrong })
            }
            Style::Oneway => self.client.oneway(SERVICE, NOTE, arguments).send().await.map(|()| Answer::Right),
        }
    }

    fn fail(&self, error: String) {
        self.errors.fetch_add(1, Ordering::Relaxed);
        // Of many errors, the first tells the most.
        let _ = self.first_error.set(error);
    }

    fn lost(&self) -> bool {
        self.lost.load(Ordering::Relaxed)
    }

    /// Waits for this time, and shows the rate on the progress bar.
    async fn wait(&self, length: Duration, progress: &ProgressBar) {
        let mut now = Instant::now();
        let until = now + length;
        while now < until && !self.lost() {
            sleep_until(until.min(now + TICK)).await;
            let waited = now.elapsed();
            now += waited;
            progress.inc(millis(waited));
            progress.set_message(match self.began.get() {
                Some(began) => format!("{:.0} calls/s", self.counted() as f64 / began.elapsed().as_secs_f64()),
                None => "warming up".to_owned(),
            });
        }
    }

    fn counted(&self) -> u64 {
        self.histograms.iter().map(|histogram| locked(histogram).len()).sum()
    }

    fn latencies(&self) -> Histogram<u64> {
        let mut all = no_latencies();
        for histogram in &self.histograms {
            all.add(&*locked(histogram)).expect("it grows as it has to");
        }
        all
    }
}

fn no_latencies() -> Histogram<u64> {
    Histogram::new(3).expect("it can hold up to 5 digits")
}

fn record(latencies: &mut Histogram<u64>, took: Duration) {
    let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
    latencies.record(micros).expect("it grows as it has to");
}

fn locked(histogram: &Mutex<Histogram<u64>>) -> MutexGuard<'_, Histogram<u64>> {
    histogram.lock().expect("no panic while holding a histogram")
}
