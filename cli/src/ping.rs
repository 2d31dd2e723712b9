//! `hopline ping`: whether the instances of a service are there, and how long they take to say so.

use std::time::{Duration, Instant};

use clap::Args;
use hopline::{Pong, Registry, environment};
use serde_json::json;

use crate::asking::{Asking, nobody, service};
use crate::failed::Failed;
use crate::printed::{one_line, print, table, time};

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
    #[arg(short, long, value_name = "N", default_value_t = 1)]
    count: u32,
    #[command(flatten)]
    asking: Asking,
}

impl Ping {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        self.asking
            .ask(async |registry| {
                let mut pongs = self.first(&registry).await?;
                for left in (0..self.count.max(1)).rev() {
                    let shown = if self.asking.json { as_json(&pongs) } else { as_table(&pongs) };
                    if !pongs.is_empty() {
                        print(&shown)?;
                    }
                    if left > 0 {
                        tokio::time::sleep(PAUSE).await;
                        pongs = registry.ping(&self.service).await?;
                    }
                }
                if pongs.is_empty() { Err(nobody(&self.service)) } else { Ok(()) }
            })
            .await
    }

    /// The first replies, or none when the time to wait for them is over.
    async fn first(&self, registry: &Registry) -> Result<Vec<Pong>, Failed> {
        let (began, wait) = (Instant::now(), self.wait.unwrap_or_default());
        loop {
            let pongs = registry.ping(&self.service).await?;
            let left = wait.saturating_sub(began.elapsed());
            if !pongs.is_empty() || left.is_zero() {
                return Ok(pongs);
            }
            tokio::time::sleep(RETRY.min(left)).await;
        }
    }
}

fn as_json(pongs: &[Pong]) -> String {
    let one = |pong: &Pong| json!({ "instance": pong.instance, "round_trip_us": pong.round_trip.as_micros() as u64 });
    json!(pongs.iter().map(one).collect::<Vec<_>>()).to_string()
}

fn as_table(pongs: &[Pong]) -> String {
    table(pongs.iter().map(|pong| [one_line(&pong.instance), time(pong.round_trip)]).collect())
}
