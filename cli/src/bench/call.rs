//! `hopline bench call`: runs one load and reports the result.

use std::time::Duration;

use clap::Args;
use hopline::Coalesce;
use indicatif::ProgressBar;

use super::load;
use super::measured::{Load, Style};
use super::serve::{Offer, Serving};
use super::{Broker, coalesce, concurrency, methods, progress, report, seconds, size};
use crate::failed::Failed;
use crate::printed::print;

/// Make calls for some seconds, and report how many there were and how long they took.
///
/// Several tasks make one call after the other, on one client, to what `hopline bench serve` serves. Every reply is
/// compared with what was sent. With `--url memory://`, where two processes cannot meet, this process serves as well. A
/// warm-up of a fifth of the time, at most 1 s, comes first and does not count.
///
/// Exits with 0 when all calls were answered, with 1 and the first error in one line on stderr when one has failed or
/// none was made, and with 2 on wrong usage.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  hopline bench call --url amqp://localhost\n  hopline bench call --concurrency 1 --coalesce off\n  hopline bench call --url memory:// --seconds 2 --json"
)]
pub(crate) struct Call {
    #[command(flatten)]
    broker: Broker,
    /// How many calls are in flight
    #[arg(long, default_value = "64", value_parser = concurrency)]
    concurrency: usize,
    /// How long to measure, in seconds, such as 5 or 0.5
    #[arg(long, default_value = "5", value_parser = seconds)]
    seconds: Duration,
    /// How much each call sends and gets back, in bytes
    #[arg(long, default_value = "64", value_parser = size)]
    size: usize,
    /// Which calls may share a message: auto, off, or up to so many
    #[arg(long, value_name = "auto|off|N", default_value = "auto", value_parser = coalesce)]
    coalesce: Coalesce,
    /// How calls are made
    #[arg(long, value_enum, default_value_t = Style::Call)]
    style: Style,
    /// How many methods take turns, of those that `hopline bench serve --methods` serves
    #[arg(long, default_value = "1", value_parser = methods)]
    methods: usize,
}

impl Call {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let Self { broker, concurrency, seconds: measured, size, coalesce, style, methods } = self;
        let json = broker.json;
        if style == Style::Oneway && methods > 1 {
            return Err(Failed::usage("there is one oneway method: leave out `--methods` or `--style`".to_owned()));
        }
        let load = Load { concurrency, size, coalesce, style, methods, measured };
        let served = match broker.address.in_memory() {
            true => Some(Serving::start(&broker, &Offer { instances: 1, work_us: 0, methods, quorum: false }).await?),
            false => None,
        };
        let served_here = served.is_some();
        let bar = if json { ProgressBar::hidden() } else { progress(load.length()) };
        let measured = load::run(&load, &broker, &bar).await;
        bar.finish_and_clear();
        if let Some(serving) = served {
            serving.drain().await;
        }

        let measured = measured?;
        print(&match json {
            true => report::json(&load, &measured).to_string(),
            false => report::text(&load, &measured, served_here),
        })?;
        match measured.first_error {
            Some(first) => Err(Failed::run(format!("{} calls failed, the first one with: {first}", measured.errors))),
            None if measured.calls() == 0 => Err(Failed::run(
                "no call ended in the time that was measured: allow more `--seconds`, or fewer in flight".to_owned(),
            )),
            None => Ok(()),
        }
    }
}
