//! The records of clients and servers: they write down what happens, when it happens.
//!
//! A record is a line, written with one write(2). So it survives when its process is killed.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;
use std::time::{SystemTime, UNIX_EPOCH};

/// The methods that are called, in the order of the ledger's columns.
///
/// To add one, write a variant here and in `ALL`, a line in each `match` below, one in `server::service`, and give it a
/// share of the calls in `client::Plan::next`. Two are events: for a group, and for one that reads a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Method {
    Count,
    CountIdempotent,
    Note,
    NoteOnce,
    Group,
    Replay,
}

impl Method {
    pub(crate) const ALL: [Self; 6] =
        [Self::Count, Self::CountIdempotent, Self::Note, Self::NoteOnce, Self::Group, Self::Replay];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Count => "count",
            Self::CountIdempotent => "count_idempotent",
            Self::Note => "note",
            Self::NoteOnce => "note_once",
            Self::Group => "group",
            Self::Replay => "replay",
        }
    }

    fn named(name: &str) -> Self {
        Self::ALL.into_iter().find(|method| method.name() == name).expect("our own processes wrote it")
    }

    /// Whether the call has no answer.
    pub(crate) fn is_oneway(self) -> bool {
        match self {
            Self::Count | Self::CountIdempotent => false,
            Self::Note | Self::NoteOnce | Self::Group | Self::Replay => true,
        }
    }

    /// Whether it is an event, which has this key.
    pub(crate) fn key(self) -> Option<&'static str> {
        match self {
            Self::Group => Some("soak.group"),
            Self::Replay => Some("soak.replay"),
            Self::Count | Self::CountIdempotent | Self::Note | Self::NoteOnce => None,
        }
    }

    /// Whether the method is idempotent, so that it may run twice.
    pub(crate) fn is_repeatable(self) -> bool {
        match self {
            Self::Count => false,
            Self::CountIdempotent | Self::Note | Self::NoteOnce | Self::Group | Self::Replay => true,
        }
    }

    /// Whether the method has `dedup`: an instance does not run a call again that it has run.
    pub(crate) fn is_remembered(self) -> bool {
        match self {
            Self::Count | Self::CountIdempotent | Self::Note | Self::Group | Self::Replay => false,
            Self::NoteOnce => true,
        }
    }
}

/// What identifies a call: the number of the client, and the number of the call at this client.
pub(crate) type Id = (u32, u32);

/// The right answer to a call.
pub(crate) fn answer((client, sequence): Id) -> u64 {
    (u64::from(client) << 32 | u64::from(sequence)).wrapping_mul(0x9E37_79B9_7F4A_7C15)
}

/// How a call ended.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Outcome {
    Right,
    Wrong,
    Confirmed,
    /// The caller dropped it.
    GivenUp,
    /// It failed with this error.
    Error(String),
}

impl Outcome {
    /// The errors that say that the call has not run.
    pub(crate) const NOT_RUN: [&str; 7] = [
        "NoService",
        "NoSubscriber",
        "Overloaded",
        "Unreachable",
        "Disconnected, not run",
        "Blocked, not run",
        "UNAVAILABLE",
    ];

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

/// The time by this machine's clock, in milliseconds since 1970. All processes share it.
pub(crate) fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is later than 1970");
    u64::try_from(since.as_millis()).expect("it is not that late")
}

/// The file to which a process appends its records.
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

    /// A thread that slept for a moment woke up `by` milliseconds too late.
    pub(crate) fn stalled(&self, by: u64) {
        self.write(&format!("stalled\t{by}\t{}\n", now()));
    }

    /// A handler has begun.
    pub(crate) fn run(&self, method: Method, (client, sequence): Id, redelivered: bool) {
        self.write(&format!("run\t{}\t{client}\t{sequence}\t{}\t{}\n", method.name(), u8::from(redelivered), now()));
    }

    fn write(&self, line: &str) {
        (&self.0).write_all(line.as_bytes()).expect("the disk has room");
    }
}

/// Everything that is known of a call.
#[derive(Debug)]
pub(crate) struct Call {
    pub(crate) method: Method,
    /// The time that it may take, in milliseconds.
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

/// Everything that was recorded.
#[derive(Debug, Default)]
pub(crate) struct History {
    pub(crate) calls: HashMap<Id, Call>,
    /// How many calls ran that nobody had made.
    pub(crate) strange: usize,
    /// The longest time that a client's process was not run, in milliseconds.
    pub(crate) stall: u64,
}

impl History {
    /// How many events are confirmed and have not been handled.
    pub(crate) fn unhandled(&self) -> usize {
        let is_confirmed = |call: &&Call| matches!(call.end, Some((Outcome::Confirmed, _)));
        let events = self.calls.values().filter(|call| call.method.key().is_some());
        events.filter(is_confirmed).filter(|call| call.runs.is_empty()).count()
    }

    /// Reads the files in a folder: the clients' first, since a call is sent before it runs.
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
