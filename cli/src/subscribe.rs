//! `hopline subscribe`: prints events as they come.

use std::num::NonZeroU64;

use clap::Args;
use hopline::Context;
use serde_json::{Map, Value, json};
use tokio::sync::mpsc;

use crate::address::{Address, Namespace};
use crate::failed::{Failed, tell};
use crate::printed::{json, one_line, print};
use crate::signals;

/// How many events may wait to be printed. More wait at the broker.
const WAITING: usize = 64;

/// Print events as they come, until interrupted.
///
/// Each is a line: its key, and the event in JSON. It has a queue of its own, which goes with it, so all other
/// subscribers get their events as before. Events from before it subscribed, or while it has no connection, do not come.
/// A line on stderr says when it has subscribed. Exits with 0 after Ctrl-C, SIGTERM or the last of `--count`, with 1 and
/// an error on stderr when it cannot subscribe or print, and with 2 on wrong usage.
#[derive(Args)]
#[command(after_help = "Examples:\n  hopline subscribe 'order.*'\n  hopline subscribe '#' --json --count 10")]
pub(crate) struct Subscribe {
    /// Which events: words with dots between them, where * is any word and # any number of words
    pattern: String,
    /// End after so many events
    #[arg(short, long, value_name = "N")]
    count: Option<NonZeroU64>,
    #[command(flatten)]
    address: Address,
    #[command(flatten)]
    namespace: Namespace,
    /// Print JSON: each line is an object with the event, its key, its publisher and metadata
    #[arg(long)]
    json: bool,
}

impl Subscribe {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        let Self { pattern, count, address, namespace: Namespace { namespace }, json } = self;
        if address.in_memory() {
            return Err(Failed::usage(
                "nobody else can publish at `memory://`, which ends with this process".to_owned(),
            ));
        }
        let signal = signals::told_to_end().map_err(|error| Failed::at("cannot hear of signals", error))?;
        let (sender, mut lines) = mpsc::channel(WAITING);
        let handle = move |context: Context, event: Value| {
            let (line, sender) = (line(&context, &event, json), sender.clone());
            // After the last line that is wanted, nobody takes it.
            async move { drop(sender.send(line).await) }
        };
        let subscribing = async {
            let server = address.server()?.namespace(&namespace).connect(&address.url).await?;
            server.subscribe(&pattern, handle).start().await
        };
        let running = subscribing.await?;
        tell(&format!("subscribed to {pattern}: Ctrl-C ends it"));
        let printing = async {
            let mut left = count.map(NonZeroU64::get);
            while left != Some(0) {
                let Some(line) = lines.recv().await else { break };
                print(&line)?;
                left = left.map(|left| left - 1);
            }
            Ok(())
        };
        let outcome: Result<(), Failed> = tokio::select! {
            outcome = printing => outcome,
            () = signal => Ok(()),
        };
        drop(lines);
        running.drain().await;
        outcome
    }
}

fn line(context: &Context, event: &Value, as_json: bool) -> String {
    let key = context.method();
    if !as_json {
        return format!("{}  {}", one_line(key), json(event));
    }
    let metadata = context.metadata_entries().map(|(name, value)| (name.to_owned(), json!(value)));
    json(&json!({
        "key": key, "event": event, "caller": context.caller(), "metadata": metadata.collect::<Map<_, _>>(),
    }))
}
