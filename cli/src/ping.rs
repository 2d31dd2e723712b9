//! `hopline ping`: whether the instances of a service are there, and how long they take to say so.

use std::time::{Duration, Instant};

use clap::{Args, value_parser};
use hopline::{Error, Pong, Registry, environment};
use serde_json::json;

use crate::asking::{Asking, nobody, service};
use crate::failed::{Failed, tell};
use crate::printed::{json, print, table, time};

/// The pause between two pings.
const PAUSE: Duration = Duration::from_secs(1);
/// The pause before the next try while nobody is there.
const RETRY: Duration = Duration::from_millis(250);

/// Ask whether the instances of a service are there, and how long they take to say so.
///
/// No handler runs for it. Exits with 0 when an instance has replied to the last ping, with 1 and an error on stderr when
/// none has, and with 2 on wrong usage: so it serves as a probe, and a start-up script can wait with it.
#[derive(Args)]
#[command(after_help = "Examples:\n  hopline ping demo\n  hopline ping demo --wait 30s && start-the-client")]
pub(crate) struct Ping {
    /// SERVICE, or SERVICE.vMAJOR for a version other than 1
    #[arg(value_parser = service)]
    service: String,
    /// Wait for so long until an instance replies, such as 30s
    #[arg(long, value_name = "TIME", value_parser = environment::duration)]
    wait: Option<Duration>,
    /// How many times to ask, a second apart
    #[arg(short, long, value_name = "N", default_value_t = 1, value_parser = value_parser!(u32).range(1..))]
    count: u32,
    #[command(flatten)]
    asking: Asking,
}

impl Ping {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        let began = Instant::now();
        loop {
            let asked =
                self.asking.questions.ask_within(self.wait, async |registry| self.asked(&registry, began).await);
            let outcome = asked.await;
            match outcome {
                // The broker, too, may come up only now.
                Err(failed) if !failed.is_usage() && !self.left(began).is_zero() => {
                    tokio::time::sleep(RETRY.min(self.left(began))).await;
                }
                outcome => return outcome,
            }
        }
    }

    /// How long it waits yet for an instance to reply.
    fn left(&self, began: Instant) -> Duration {
        self.wait.unwrap_or_default().saturating_sub(began.elapsed())
    }

    /// Asks as often as it is told to, from the first time on that somebody replies.
    async fn asked(&self, registry: &Registry, began: Instant) -> Result<(), Failed> {
        let mut pongs = registry.ping(&self.service).await?;
        while pongs.is_empty() && !self.left(began).is_zero() {
            tokio::time::sleep(RETRY.min(self.left(began))).await;
            pongs = registry.ping(&self.service).await?;
        }
        let mut last = self.shown(registry, Ok(pongs)).await;
        for _ in 1..self.count {
            if let Err(failed) = &last {
                tell(&failed.to_string());
            }
            tokio::time::sleep(PAUSE).await;
            last = self.shown(registry, registry.ping(&self.service).await).await;
        }
        last
    }

    /// Prints who has replied. Fails if nobody has.
    async fn shown(&self, registry: &Registry, pongs: Result<Vec<Pong>, Error>) -> Result<(), Failed> {
        let pongs = pongs?;
        if pongs.is_empty() {
            return Err(nobody(registry, &self.service).await);
        }
        Ok(print(&if self.asking.json { as_json(&pongs) } else { as_table(&pongs) })?)
    }
}

fn as_json(pongs: &[Pong]) -> String {
    let one = |pong: &Pong| json!({ "instance": pong.instance, "round_trip_us": pong.round_trip.as_micros() as u64 });
    json(&pongs.iter().map(one).collect::<Vec<_>>())
}

fn as_table(pongs: &[Pong]) -> String {
    table(pongs.iter().map(|pong| [pong.instance.clone(), time(pong.round_trip)]).collect())
}
