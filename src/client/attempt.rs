//! An attempt: a call that is sent once. With policies, a middleware or a route, a call may have several.

use std::time::Duration;

use tokio::time::Instant;
use tracing::level_filters::LevelFilter;
use uuid::Uuid;

use crate::context::Context;
use crate::frame::{More, Trace};
use crate::middleware::{Apart, Beside};

/// One attempt of a call that may have several.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Attempt {
    /// The id of the call. The first attempt has it as its own id too.
    pub(super) call_id: Uuid,
    /// 1 for the first attempt.
    pub(super) number: u32,
    /// How many instances it was sent to before, along its route.
    pub(super) moves: u32,
    /// How long the call may take with all its attempts.
    pub(super) timeout: Duration,
    /// When that time is over.
    pub(super) deadline: Instant,
    /// The trace of the call, under which each attempt has a span.
    pub(super) trace: Option<Trace>,
    /// The span that a middleware has set as that of the call. It is sent as it is.
    pub(super) set_trace: Option<Trace>,
}

impl Attempt {
    /// The first attempt of a call that may take the time `timeout` from now on.
    pub(super) fn first(timeout: Duration) -> Self {
        let (call_id, deadline) = (Uuid::new_v4(), Instant::now() + timeout);
        Self { call_id, number: 1, moves: 0, timeout, deadline, trace: None, set_trace: None }
    }

    /// Which time of sending the call this is. The first is 1.
    pub(super) fn time(&self) -> u32 {
        self.number + self.moves
    }

    /// The id of what is sent now. Except for the first time, each call of this returns a new id.
    pub(super) fn id(self) -> Uuid {
        if self.time() == 1 { self.call_id } else { Uuid::new_v4() }
    }

    /// The trace that is sent with it. `current` is the call that is handled by whoever makes this one.
    pub(super) fn traced(self, current: Option<&Context>) -> Option<Trace> {
        let under = |trace| Trace::under(Some(trace));
        self.set_trace.or_else(|| self.trace.map(under)).or_else(|| traced(current))
    }
}

/// What an attempt is among those of its call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum AttemptKind {
    First,
    /// It comes after one that has failed.
    Retry,
    /// It is made beside another one, since that is late.
    Hedge,
    /// It is made at the same time as another one.
    Fork,
}

impl AttemptKind {
    /// What an attempt is. `apart` is what it knows of others at the same time.
    pub(super) fn of(attempt: &Attempt, apart: Option<&Apart>) -> Self {
        match apart.and_then(Apart::beside) {
            _ if attempt.time() == 1 => Self::First,
            Some(Beside::Hedge) if attempt.moves == 0 => Self::Hedge,
            Some(Beside::Fork) if attempt.moves == 0 => Self::Fork,
            _ => Self::Retry,
        }
    }

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::First => "first",
            Self::Retry => "retry",
            Self::Hedge => "hedge",
            Self::Fork => "fork",
        }
    }
}

/// The trace of a call that is made here. Its parent is the call being handled. Without one it begins a new trace, if
/// anything subscribes to spans.
pub(super) fn traced(parent: Option<&Context>) -> Option<Trace> {
    match parent {
        Some(parent) => Some(Trace::under(Some(parent.trace()))),
        None => (LevelFilter::current() >= LevelFilter::INFO).then(|| Trace::under(None)),
    }
}

/// What few frames have: the user's own entries, and of another attempt than the first, which call it is an attempt of.
pub(super) fn more(attempt: Option<&Attempt>, user: Vec<(String, String)>) -> Option<Box<More>> {
    // The first attempt has the call's id as its own.
    let again = attempt.filter(|attempt| attempt.time() > 1);
    let (call_id, attempt) = (again.map(|again| again.call_id), again.map(|again| again.time().into()));
    let has_more = !user.is_empty() || again.is_some();
    has_more.then(|| Box::new(More { user, call_id, attempt, ..More::default() }))
}
