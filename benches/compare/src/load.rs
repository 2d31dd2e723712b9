//! The load of every contender that is written in Rust: so many callers, a warm-up, and a time that is measured.

use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, ensure};
use bytes::Bytes;
use hdrhistogram::Histogram;
use rustix::time::{ClockId, clock_gettime};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};

use crate::{Load, MEASURED, MEASURING, Report};

/// Calls that end before this are not measured: connections grow their buffers, threads start.
const WARM_UP: Duration = Duration::from_secs(1);

/// A contender whose first call takes longer does not work.
const FIRST_CALL_WITHIN: Duration = Duration::from_secs(10);

/// So many histograms are shared by the callers: few enough to use little memory, enough to wait seldom for one.
const HISTOGRAMS: usize = 64;

/// Makes calls as `load` says, and prints the report.
///
/// `call` makes one call and gives back its reply, which is compared with what was sent. As in `hopline bench call`,
/// the calls that end in the measured time count, whenever they began.
pub async fn run<C, F, R>(load: Load, call: C) -> anyhow::Result<()>
where
    C: Fn(Bytes) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = anyhow::Result<R>> + Send + 'static,
    R: AsRef<[u8]> + Send + 'static,
{
    ensure!(load.concurrency > 0, "--concurrency is 0: nothing would be called");
    let probe = payload(0, load.size);
    let reply = timeout(FIRST_CALL_WITHIN, call(probe.clone())).await.context("the first call was not answered")?;
    ensure!(reply?.as_ref() == probe, "the first reply is not what was sent");

    let run = Arc::new(Run::new(load)?);
    let mut callers = JoinSet::new();
    for number in 0..load.concurrency {
        callers.spawn(run.clone().calls(number, call.clone()));
    }
    sleep(WARM_UP).await;
    let cpu_before = cpu_time()?;
    let began = *run.began.get_or_init(Instant::now);
    say(MEASURING)?;
    sleep(Duration::from_secs_f64(load.seconds)).await;
    let ended = *run.ended.get_or_init(Instant::now);
    let cpu = cpu_time()? - cpu_before;
    say(MEASURED)?;

    // Each caller finishes its last call: its reply is looked at as well.
    while let Some(caller) = callers.join_next().await {
        caller.context("a caller broke down")?;
    }
    say(&serde_json::to_string(&run.report(ended - began, cpu)?)?)
}

/// What the callers of a load share.
struct Run {
    load: Load,
    /// Calls that end after this are counted.
    began: OnceLock<Instant>,
    /// Calls that end after this are not counted any more.
    ended: OnceLock<Instant>,
    /// Latencies in microseconds.
    histograms: Vec<Mutex<Histogram<u64>>>,
    errors: AtomicU64,
}

impl Run {
    fn new(load: Load) -> anyhow::Result<Self> {
        let histograms = (0..load.concurrency.min(HISTOGRAMS)).map(|_| Ok(Mutex::new(Histogram::new(3)?)));
        Ok(Self {
            load,
            began: OnceLock::new(),
            ended: OnceLock::new(),
            histograms: histograms.collect::<anyhow::Result<_>>()?,
            errors: AtomicU64::new(0),
        })
    }

    /// Makes one call after the other until the time is over.
    async fn calls<C, F, R>(self: Arc<Self>, number: usize, call: C)
    where
        C: Fn(Bytes) -> F,
        F: Future<Output = anyhow::Result<R>>,
        R: AsRef<[u8]>,
    {
        let payload = payload(number, self.load.size);
        while self.ended.get().is_none() {
            let sent = Instant::now();
            let reply = call(payload.clone()).await;
            let took = sent.elapsed();
            match reply {
                Ok(reply) if reply.as_ref() == payload => self.answered(number, took),
                Ok(_) => self.failed(&anyhow!("the reply is not what was sent")),
                Err(error) => self.failed(&error),
            }
        }
    }

    fn answered(&self, number: usize, took: Duration) {
        if self.began.get().is_some() && self.ended.get().is_none() {
            let histogram = &self.histograms[number % self.histograms.len()];
            let mut histogram = histogram.lock().expect("no panic while holding a histogram");
            histogram.record(took.as_micros() as u64).expect("it grows as it has to");
        }
    }

    fn failed(&self, error: &anyhow::Error) {
        // Of many errors, the first tells the most.
        if self.errors.fetch_add(1, Ordering::Relaxed) == 0 {
            eprintln!("a call failed: {error:#}");
        }
    }

    fn report(&self, elapsed: Duration, cpu: Duration) -> anyhow::Result<Report> {
        let mut latencies = Histogram::<u64>::new(3)?;
        for histogram in &self.histograms {
            latencies.add(&*histogram.lock().expect("no panic while holding a histogram"))?;
        }
        let calls = latencies.len();
        let some = |figure: f64| (calls > 0).then_some(figure);
        let quantile = |quantile| some(latencies.value_at_quantile(quantile) as f64);
        Ok(Report {
            calls_per_s: calls as f64 / elapsed.as_secs_f64(),
            p50_us: quantile(0.5),
            p99_us: quantile(0.99),
            p999_us: quantile(0.999),
            calls,
            errors: self.errors.load(Ordering::Relaxed),
            concurrency: self.load.concurrency,
            size: self.load.size,
            cpu_us_per_call: some(cpu.as_secs_f64() * 1e6 / calls as f64),
        })
    }
}

/// Different for each caller, so that a reply that went to another one is seen.
fn payload(caller: usize, size: usize) -> Bytes {
    let number = caller.to_le_bytes();
    (0..size).map(|position| number[position % number.len()] ^ (position * 31) as u8).collect()
}

/// User and system time of this process since it began.
fn cpu_time() -> anyhow::Result<Duration> {
    Ok(Duration::try_from(clock_gettime(ClockId::ProcessCPUTime))?)
}

/// Prints a line at once, though standard output is a pipe.
pub(crate) fn say(line: &str) -> anyhow::Result<()> {
    let mut stdout = std::io::stdout();
    writeln!(stdout, "{line}")?;
    Ok(stdout.flush()?)
}
