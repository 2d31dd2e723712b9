//! Who is compared, and at what.

use std::fmt;

use hopline_compare::Style;

use self::Contender::{Amqprs, Hopline, HoplineUncoalesced, Kanin, Lapin, Nats, Tonic};

/// A way to make a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Contender {
    Hopline,
    /// Hopline with one message a call, as the others do it.
    HoplineUncoalesced,
    Lapin,
    Amqprs,
    Nats,
    Tonic,
    Kanin,
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Hopline => "hopline",
            Self::HoplineUncoalesced => "hopline --coalesce off",
            Self::Lapin => "plain lapin",
            Self::Amqprs => "plain amqprs",
            Self::Nats => "NATS",
            Self::Tonic => "tonic (no broker)",
            Self::Kanin => "kanin",
        })
    }
}

/// A load, and who is put under it.
#[derive(Debug)]
pub(crate) struct Scenario {
    pub(crate) style: Style,
    pub(crate) size: usize,
    pub(crate) concurrency: usize,
    pub(crate) contenders: &'static [Contender],
}

impl fmt::Display for Scenario {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.style == Style::Oneway {
            f.write_str("oneway, durable and confirmed, ")?;
        }
        match self.size {
            size if size >= 1 << 20 => write!(f, "{} MiB, ", size >> 20)?,
            size if size >= 1 << 10 => write!(f, "{} KiB, ", size >> 10)?,
            size => write!(f, "{size} B, ")?,
        }
        write!(f, "{} in flight", self.concurrency)
    }
}

/// All of them; the first contender of each is the one that the others are compared with.
pub(crate) const SCENARIOS: &[Scenario] = &[
    Scenario {
        style: Style::Call,
        size: 64,
        concurrency: 1,
        contenders: &[Hopline, Lapin, Amqprs, Nats, Tonic, Kanin],
    },
    Scenario {
        style: Style::Call,
        size: 64,
        concurrency: 64,
        contenders: &[Hopline, HoplineUncoalesced, Lapin, Amqprs, Nats, Tonic, Kanin],
    },
    Scenario {
        style: Style::Call,
        size: 64,
        concurrency: 256,
        contenders: &[Hopline, HoplineUncoalesced, Lapin, Amqprs, Nats, Tonic, Kanin],
    },
    Scenario {
        style: Style::Call,
        size: 16 << 10,
        concurrency: 64,
        contenders: &[Hopline, Lapin, Amqprs, Nats, Tonic],
    },
    Scenario { style: Style::Call, size: 1 << 20, concurrency: 8, contenders: &[Hopline, Lapin, Tonic] },
    Scenario { style: Style::Oneway, size: 64, concurrency: 64, contenders: &[Hopline, Lapin, Amqprs] },
];
