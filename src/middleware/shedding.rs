//! Shedding: calls that come too late to be answered in time, or to a machine that cannot do more, are not run.

mod cpu;

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::time::Instant;

use self::cpu::CpuLoad;
use super::{Finished, Invocation, Middleware, ServerPolicy};
use crate::error::{Code, Fault, RefusedBy};
use crate::limits::RETRY_AFTER;

/// How many times of a method are kept, how many there have to be, and for how long they count.
const TIMES: usize = 128;
const LEAST_TIMES: usize = 20;
const TIMES_COUNT: Duration = Duration::from_secs(10);
/// After how many calls the tenth of a method is found anew.
const FOUND_EVERY: u32 = 8;
/// How long the parts are in which ended calls are counted, and how many there are.
const PART: Duration = Duration::from_millis(100);
const PARTS: usize = 100;
/// How often the load is read.
const READ_EVERY: Duration = Duration::from_millis(250);
/// How long calls are shed after the load has fallen, so that it does not rise again at once.
const COOLS: Duration = Duration::from_secs(1);

/// Does not run requests that are of no use, or too many. Both rules refuse before a handler runs, with a code of their
/// own:
///
/// - *Too late:* the time that a call has left is shorter than what 90 % of the calls of its method have taken lately. It
///   is answered with `DEADLINE_EXCEEDED`. This is decided when it is delivered, and again when it gets its place. The
///   times of at least 20 of the last 128 calls that have ended with a result are needed, and they count for 10 s. So a
///   method that has become quicker is tried again after that time.
/// - *Too many:* the processors are busy by more than 90 %, and more calls are in the instance than it has ended so
///   quickly lately: the most calls that have ended in 0.1 s within the last 10 s, times the shortest time that they took.
///   This is the rule of TCP BBR. It is answered with `RESOURCE_EXHAUSTED` and [`retry_after`](Fault::retry_after) 100 ms.
///   It holds for 1 s after the load has fallen.
///
/// The load is that of the machine, or that of the process's control group if it has a limit and is busier. On other
/// systems than Linux it is not known: see [`measured_by`](Self::measured_by). Oneway calls, events and the questions of
/// discovery are not shed. Use one for each service.
///
/// ```
/// use std::sync::Arc;
///
/// use hopline::{Context, Fault, Service, Shedding};
///
/// let shedding = Arc::new(Shedding::default());
/// let add = |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) };
/// let service = Service::new("calculator", 1).with(shedding.clone()).method("add", add);
/// # let _ = service;
/// let counts = shedding.counts();
/// println!("too late: {}, too many: {}", counts.late, counts.overloaded);
/// ```
pub struct Shedding {
    /// The load from which on calls are shed.
    limit: f64,
    measured: Box<dyn Fn() -> Option<f64> + Send + Sync>,
    methods: Mutex<HashMap<Arc<str>, Times>>,
    ended: Mutex<Lately>,
    admitted: AtomicU64,
    late: AtomicU64,
    overloaded: AtomicU64,
}

/// How long the calls of a method have taken lately.
#[derive(Debug, Default)]
struct Times {
    times: VecDeque<(Instant, Duration)>,
    since_found: u32,
    tenth: Option<Duration>,
}

/// How many calls there are, and how many have ended lately.
#[derive(Debug)]
struct Lately {
    began: Instant,
    here: u64,
    /// Of each part of the last seconds its number, how many calls have ended, and how long they took together.
    parts: [(u64, u32, Duration); PARTS],
    load: Option<f64>,
    read_at: Option<Instant>,
    shed_at: Option<Instant>,
}

/// What a [`Shedding`] has done so far.
///
/// ```
/// let counts = hopline::Shedding::default().counts();
/// assert_eq!((counts.admitted, counts.late, counts.overloaded), (0, 0, 0));
/// ```
#[derive(Debug, Clone, Copy, Default, PartialEq)]
#[non_exhaustive]
pub struct ShedCounts {
    /// Requests that were let in.
    pub admitted: u64,
    /// Requests that were not run since they would have ended too late.
    pub late: u64,
    /// Requests that were not run since there were too many.
    pub overloaded: u64,
    /// How busy the processors were when that was read last, from 0 to 1. `None` if it is not known.
    pub load: Option<f64>,
}

impl Default for Shedding {
    fn default() -> Self {
        let cpu = CpuLoad::default();
        let (methods, admitted, late, overloaded) = Default::default();
        let parts = [(0, 0, Duration::ZERO); PARTS];
        let began = Instant::now();
        let ended = Mutex::new(Lately { began, here: 0, parts, load: None, read_at: None, shed_at: None });
        Self { limit: 0.9, measured: Box::new(move || cpu.read()), methods, ended, admitted, late, overloaded }
    }
}

impl Shedding {
    /// How busy the processors have to be until requests are shed. Default: 0.9. From 1 on, none are for that reason.
    #[must_use]
    pub fn cpu(mut self, limit: f64) -> Self {
        self.limit = limit;
        self
    }

    /// Where the load comes from: a function that returns how busy the instance is, from 0 to 1, or `None` if it does not
    /// know. It is asked when calls arrive, at most four times a second, and must not block. Default: what Linux says of
    /// the processors, smoothed over about a second.
    ///
    /// ```
    /// // The share of the connections to a database that are in use.
    /// let shedding = hopline::Shedding::default().measured_by(|| Some(7.0 / 10.0));
    /// # let _ = shedding;
    /// ```
    #[must_use]
    pub fn measured_by(mut self, load: impl Fn() -> Option<f64> + Send + Sync + 'static) -> Self {
        self.measured = Box::new(load);
        self
    }

    /// What it has done so far.
    #[must_use]
    pub fn counts(&self) -> ShedCounts {
        ShedCounts {
            admitted: self.admitted.load(Ordering::Relaxed),
            late: self.late.load(Ordering::Relaxed),
            overloaded: self.overloaded.load(Ordering::Relaxed),
            load: self.ended.lock().expect("no panic while holding the counts").load,
        }
    }

    /// Refuses a call that has less time left than its method takes.
    fn in_time(&self, call: &Invocation) -> Result<(), Fault> {
        let Some(left) = call.remaining() else { return Ok(()) };
        let methods = self.methods.lock().expect("no panic while holding the times");
        let tenth = methods.get(&call.method).and_then(|times| times.tenth(Instant::now()));
        match tenth.filter(|tenth| left < *tenth) {
            None => Ok(()),
            Some(tenth) => {
                self.late.fetch_add(1, Ordering::Relaxed);
                let why = format!("not run: `{}` takes at least {tenth:?}, and {left:?} are left", call.method());
                Err(Fault::new(Code::DeadlineExceeded, why).refused_by(RefusedBy::Late))
            }
        }
    }

    /// Refuses a call if there are too many for a busy machine.
    fn in_flight(&self) -> Result<(), Fault> {
        let now = Instant::now();
        let mut lately = self.ended.lock().expect("no panic while holding the counts");
        if lately.read_at.is_none_or(|read_at| now - read_at >= READ_EVERY) {
            (lately.load, lately.read_at) = ((self.measured)(), Some(now));
        }
        let is_hot = lately.load.is_some_and(|load| load > self.limit);
        let cools = lately.shed_at.is_some_and(|shed_at| now - shed_at < COOLS);
        if let Some(most) = lately.most(now).filter(|most| (is_hot || cools) && lately.here >= *most) {
            if is_hot {
                lately.shed_at = Some(now);
            }
            self.overloaded.fetch_add(1, Ordering::Relaxed);
            let load = 100.0 * lately.load.unwrap_or_default();
            let why = format!("not run: the processors are busy by {load:.0} %, and {most} calls are here already");
            let fault = Fault::new(Code::ResourceExhausted, why).retry_after(RETRY_AFTER);
            return Err(fault.refused_by(RefusedBy::Overload));
        }
        lately.here += 1;
        Ok(())
    }
}

impl Times {
    fn add(&mut self, now: Instant, time: Duration) {
        while self.times.len() >= TIMES || self.times.front().is_some_and(|(at, _)| now - *at > TIMES_COUNT) {
            self.times.pop_front();
        }
        self.times.push_back((now, time));
        self.since_found += 1;
        if self.times.len() < LEAST_TIMES {
            self.tenth = None;
        } else if self.tenth.is_none() || self.since_found >= FOUND_EVERY {
            let mut times: Vec<_> = self.times.iter().map(|(_, time)| *time).collect();
            let at = times.len() / 10;
            self.tenth = Some(*times.select_nth_unstable(at).1);
            self.since_found = 0;
        }
    }

    /// The time that a tenth of the calls does not exceed, if it is known and not too old.
    fn tenth(&self, now: Instant) -> Option<Duration> {
        self.tenth.filter(|_| self.times.back().is_some_and(|(at, _)| now - *at <= TIMES_COUNT))
    }
}

impl Lately {
    fn number(&self, now: Instant) -> u64 {
        u64::try_from((now - self.began).as_nanos() / PART.as_nanos()).unwrap_or(u64::MAX)
    }

    fn ended(&mut self, now: Instant, took: Duration) {
        let number = self.number(now);
        let part = &mut self.parts[usize::try_from(number).unwrap_or_default() % PARTS];
        if part.0 != number {
            *part = (number, 0, Duration::ZERO);
        }
        part.1 += 1;
        part.2 += took;
    }

    /// How many calls may be here at once. `None` if none have ended lately.
    fn most(&self, now: Instant) -> Option<u64> {
        let number = self.number(now);
        let recent = |part: &&(u64, u32, Duration)| part.1 > 0 && part.0 < number && part.0 + PARTS as u64 > number;
        let parts = || self.parts.iter().filter(recent);
        let (calls, quickest) = (parts().map(|part| part.1).max()?, parts().map(|part| part.2 / part.1).min()?);
        let most = f64::from(calls) * quickest.as_secs_f64() / PART.as_secs_f64();
        #[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a small number above 0")]
        Some((most.ceil() as u64).max(1))
    }
}

impl Middleware for Shedding {
    fn admit(&self, call: &Invocation) -> Result<(), Fault> {
        if !call.is_governed() {
            return Ok(());
        }
        self.in_time(call)?;
        self.in_flight()?;
        self.admitted.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }

    fn finished(&self, done: &Finished<'_>) {
        let Some(time) = done.handler_time.filter(|_| done.code == Code::Ok && done.call.is_governed()) else { return };
        let now = Instant::now();
        self.ended.lock().expect("no panic while holding the counts").ended(now, done.took);
        if done.call.served {
            let mut methods = self.methods.lock().expect("no panic while holding the times");
            methods.entry(done.call.method.clone()).or_default().add(now, time);
        }
    }

    fn policy(&self) -> Option<&dyn ServerPolicy> {
        Some(self)
    }
}

impl ServerPolicy for Shedding {
    fn begins(&self, call: &Invocation) -> Result<(), Fault> {
        if call.is_governed() { self.in_time(call) } else { Ok(()) }
    }

    fn leaves(&self, call: &Invocation) {
        if call.is_governed() {
            let mut lately = self.ended.lock().expect("no panic while holding the counts");
            lately.here = lately.here.saturating_sub(1);
        }
    }
}

impl fmt::Debug for Shedding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shedding").field("limit", &self.limit).field("counts", &self.counts()).finish_non_exhaustive()
    }
}
