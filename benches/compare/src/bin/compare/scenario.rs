//! Who is compared, and at what.

use std::fmt;

use clap::ValueEnum;
use hopline_compare::Style;

use self::Contender::*;

/// A way to make a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Contender {
    /// As it is by default.
    Hopline,
    /// Hopline with one message a call, as the others do it.
    #[value(name = "hopline-off")]
    HoplineOff,
    /// A client and a server by hand.
    Lapin,
    /// A client and a server by hand.
    Amqprs,
    /// Its server, and a client by hand.
    Kanin,
    /// Python: `aio_pika.patterns.RPC`.
    AioPika,
    /// Node: the RPC of the tutorials.
    Amqplib,
    /// Its own broker.
    Nats,
    /// gRPC, without a broker.
    Tonic,
    /// Without a broker.
    Tarpc,
}

impl Contender {
    /// Whether it is the `hopline` command.
    pub(crate) fn is_hopline(self) -> bool {
        matches!(self, Hopline | HoplineOff)
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Hopline => "hopline",
            HoplineOff => "hopline --coalesce off",
            Lapin => "plain lapin",
            Amqprs => "plain amqprs",
            Kanin => "kanin",
            AioPika => "aio-pika (Python)",
            Amqplib => "amqplib (Node)",
            Nats => "NATS",
            Tonic => "tonic (no broker)",
            Tarpc => "tarpc (no broker)",
        })
    }
}

/// A load, and who is put under it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scenario {
    pub(crate) style: Style,
    pub(crate) size: usize,
    pub(crate) concurrency: usize,
    /// The first one is compared with each of the others.
    pub(crate) contenders: &'static [Contender],
}

impl Scenario {
    /// Whether it also shows what one call a message costs.
    pub(crate) fn has_one_call_a_message(&self) -> bool {
        self.contenders.contains(&HoplineOff)
    }
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
        match self.concurrency {
            thousands if thousands >= 1000 => write!(f, "{} {:03} in flight", thousands / 1000, thousands % 1000),
            few => write!(f, "{few} in flight"),
        }
    }
}

/// All that send one message for each call. What they make is compared with `hopline --coalesce off`.
pub(crate) const ONE_CALL_A_MESSAGE: &[Contender] = &[HoplineOff, Lapin, Amqprs, Kanin, AioPika, Amqplib];

/// All of them, in the order of the results.
pub(crate) const SCENARIOS: &[Scenario] = &[
    small(1),
    small(64),
    small(256),
    small(1_000),
    small(10_000),
    Scenario { style: Style::Call, size: 16 << 10, concurrency: 64, contenders: EACH_ONCE },
    Scenario { style: Style::Call, size: 1 << 20, concurrency: 8, contenders: EACH_ONCE },
    Scenario { style: Style::Oneway, size: 64, concurrency: 64, contenders: &[Hopline, Lapin, Amqprs] },
];

const EACH_ONCE: &[Contender] = &[Hopline, Lapin, Amqprs, Kanin, AioPika, Amqplib, Nats, Tonic, Tarpc];

/// The payload that shows what a call costs, and not what its bytes cost.
pub(crate) const SMALL: usize = 64;

const fn small(concurrency: usize) -> Scenario {
    let contenders = &[Hopline, HoplineOff, Lapin, Amqprs, Kanin, AioPika, Amqplib, Nats, Tonic, Tarpc];
    Scenario { style: Style::Call, size: SMALL, concurrency, contenders }
}
