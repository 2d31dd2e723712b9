//! What clients and servers write down as it happens: a line a record, with one write(2) each, so that what a process has
//! written survives its being killed.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// The methods that are called, in the order of the ledger's columns.
///
/// One more is a variant here and in `ALL`, a line in each `match` below, one in `server::service`, and a share of the
/// calls in `client::Plan::next`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Method {
    Count,
    CountIdempotent,
    Note,
    NoteOnce,
}

impl Method {
    pub(crate) const ALL: [Self; 4] = [Self::Count, Self::CountIdempotent, Self::Note, Self::NoteOnce];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Count => "count",
            Self::CountIdempotent => "count_idempotent",
            Self::Note => "note",
            Self::NoteOnce => "note_once",
        }
    }

    fn named(name: &str) -> Self {
        Self::ALL.into_iter().find(|method| method.name() == name).expect("our own processes wrote it")
    }

    /// Whether nobody is answered.
    pub(crate) fn is_oneway(self) -> bool {
        match self {
            Self::Count | Self::CountIdempotent => false,
            Self::Note | Self::NoteOnce => true,
        }
    }

    /// Whether it may run twice.
    pub(crate) fn is_repeatable(self) -> bool {
        match self {
            Self::Count => false,
            Self::CountIdempotent | Self::Note | Self::NoteOnce => true,
        }
    }

    /// Whether a process remembers what it has run, and runs it no second time.
    pub(crate) fn is_remembered(self) -> bool {
        match self {
            Self::Count | Self::CountIdempotent | Self::Note => false,
            Self::NoteOnce => true,
        }
    }
}

/// What every call is known by: the client's number, and the call's number there.
pub(crate) type Id = (u32, u32);

/// What a call is to be answered with.
pub(crate) fn answer((client, sequence): Id) -> u64 {
    (u64::from(client) << 32 | u64::from(sequence)).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// How a call ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Outcome {
    Right,
    Wrong,
    Confirmed,
    /// Its caller dropped it.
    GivenUp,
    /// By this error.
    Error(String),
}

impl Outcome {
    /// Errors that say that the call has not run.
    pub(crate) const NOT_RUN: [&str; 6] =
        ["NoService", "Overloaded", "Unreachable", "Disconnected, not run", "Blocked, not run", "UNAVAILABLE"];

    fn text(&self) -> &str {
        match self {
            Self::Right => "right",
            Self::Wrong => "wrong",
            Self::Confirmed => "confirmed",
            Self::GivenUp => "given up",
            Self::Error(kind) => kind,
        }
    }

    fn of(text: &str) -> Self {
        match text {
            "right" => Self::Right,
            "wrong" => Self::Wrong,
            "confirmed" => Self::Confirmed,
            "given up" => Self::GivenUp,
            kind => Self::Error(kind.to_owned()),
        }
    }
}

/// This machine's clock, in milliseconds, which all processes share.
pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is later than 1970");
    u64::try_from(since.as_millis()).expect("it is not that late")
}

/// A file that a process appends to.
#[derive(Debug)]
pub(crate) struct Records(File);

impl Records {
    pub(crate) fn create(path: &Path) -> Self {
        Self(File::options().append(true).create_new(true).open(path).expect("the folder is there"))
    }

    /// A call is about to be made.
    pub(crate) fn sent(&self, method: Method, sequence: u32, deadline: u64) {
        self.write(&format!("sent\t{}\t{sequence}\t{deadline}\t{}\n", method.name(), now()));
    }

    /// A call has ended after `took` milliseconds.
    pub(crate) fn ended(&self, sequence: u32, outcome: &Outcome, took: u64, detail: &str) {
        let detail = detail.replace(['\n', '\t'], " ");
        self.write(&format!("ended\t{sequence}\t{}\t{took}\t{detail}\n", outcome.text()));
    }

    /// A thread that wanted to sleep for a moment slept for so many milliseconds more.
    pub(crate) fn stalled(&self, by: u64) {
        self.write(&format!("stalled\t{by}\t{}\n", now()));
    }

    /// A handler begins.
    pub(crate) fn run(&self, method: Method, (client, sequence): Id, redelivered: bool) {
        self.write(&format!("run\t{}\t{client}\t{sequence}\t{}\t{}\n", method.name(), u8::from(redelivered), now()));
    }

    fn write(&self, line: &str) {
        (&self.0).write_all(line.as_bytes()).expect("the disk has room");
    }
}

/// All that is known of a call.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) method: Method,
    /// In milliseconds from when it was made.
    pub(crate) deadline: u64,
    pub(crate) sent_at: u64,
    /// How it ended, and after how many milliseconds.
    pub(crate) end: Option<(Outcome, u64)>,
    pub(crate) runs: Vec<Run>,
}

#[derive(Debug)]
pub(crate) struct Run {
    /// The number of the server.
    pub(crate) server: u32,
    pub(crate) at: u64,
    pub(crate) redelivered: bool,
}

/// Everything that was written down.
#[derive(Debug, Default)]
pub(crate) struct History {
    pub(crate) calls: HashMap<Id, Call>,
    /// Runs of what nobody has called.
    pub(crate) strange: usize,
    /// The longest stall of a client's process, in milliseconds.
    pub(crate) stall: u64,
}

impl History {
    /// Reads the files of a folder: first the clients', since a call is sent before it runs.
    pub(crate) fn read(folder: &Path) -> Self {
        let mut history = Self::default();
        let mut files: Vec<_> = fs::read_dir(folder)
            .expect("it is there")
            .map(|entry| entry.expect("it can be read").path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "records"))
            .collect();
        files.sort();
        for path in files {
            let name = path.file_stem().and_then(|name| name.to_str()).expect("we have named it");
            let (role, number) = name.split_once('-').expect("we have named it");
            let number = number.parse().expect("we have named it");
            let text = fs::read_to_string(&path).expect("it is text");
            for line in text.lines() {
                let fields: Vec<&str> = line.split('\t').collect();
                history.take(role, number, &fields);
            }
        }
        history
    }

    fn take(&mut self, role: &str, process: u32, fields: &[&str]) {
        let number = |text: &str| text.parse::<u64>().expect("a number");
        let small = |text: &str| text.parse::<u32>().expect("a number");
        match (role, fields) {
            ("client", ["sent", method, sequence, deadline, at]) => {
                let (method, deadline, sent_at) = (Method::named(method), number(deadline), number(at));
                let call = Call { method, deadline, sent_at, end: None, runs: Vec::new() };
                self.calls.insert((process, small(sequence)), call);
            }
            ("client", ["ended", sequence, outcome, took, _detail]) => {
                let call = self.calls.get_mut(&(process, small(sequence))).expect("it was sent before it ended");
                call.end = Some((Outcome::of(outcome), number(took)));
            }
            ("client", ["stalled", by, _at]) => self.stall = self.stall.max(number(by)),
            ("server", ["run", method, client, sequence, redelivered, at]) => {
                let run = Run { server: process, at: number(at), redelivered: *redelivered == "1" };
                match self.calls.get_mut(&(small(client), small(sequence))) {
                    Some(call) if call.method == Method::named(method) => call.runs.push(run),
                    _ => self.strange += 1,
                }
            }
            _ => panic!("not a record of a {role}: {fields:?}"),
        }
    }
}
