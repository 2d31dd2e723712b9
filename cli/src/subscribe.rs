//! `hopline subscribe`: prints events as they come, or those that were kept.

use std::num::NonZeroU64;

use clap::Args;
use std::str::FromStr;

use hopline::{Context, Replay, Subscription, environment};
use serde_json::{Map, Value, json};
use tokio::sync::{mpsc, oneshot};

use crate::address::{Address, Namespace};
use crate::failed::{Failed, tell};
use crate::printed::{json, one_line, print};
use crate::signals;

/// How many events may wait to be printed. More wait at the broker.
const WAITING: usize = 64;

/// Print events as they come, until interrupted.
///
/// Each is a line: its key, and the event in JSON. It has a queue of its own, which goes with it, so all other
/// subscribers get their events as before. Events from before it subscribed, or while it has no connection, do not come,
/// unless it is in a group, or begins in the past. In a group each event goes to one of those who are in it, this command
/// or a server, and counts as handled when its line is printed. A line on stderr says when it has subscribed. Exits with 0 after Ctrl-C, SIGTERM or the last of `--count`, with 1 and
/// an error on stderr when it cannot subscribe or print, and with 2 on wrong usage.
#[derive(Args)]
#[command(after_help = "Examples:\n  hopline subscribe 'order.*'\n  hopline subscribe '#' --json --count 10\n  \
    hopline subscribe 'order.*' --group audit\n  hopline subscribe 'order.*' --from 30m")]
pub(crate) struct Subscribe {
    /// Which events: words with dots between them, where * is any word and # any number of words
    pattern: String,
    /// Share the events with all who subscribe as this group: the broker keeps them for it, also when this command has
    /// ended. `hopline groups rm` removes a group
    #[arg(short, long, value_name = "NAME")]
    group: Option<String>,
    /// Begin with the events that are kept: `start`, `last`, how long ago such as 30m, or a position such as 1200. They are
    /// kept from when somebody first asks for that. A group goes on where it was
    #[arg(long, value_name = "WHERE")]
    from: Option<From>,
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

/// Where to begin, as it is written.
#[derive(Debug, Clone, Copy)]
struct From(Replay);

impl FromStr for From {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        Ok(Self(match text {
            "start" => Replay::Start,
            "last" => Replay::Last,
            text => match text.parse() {
                Ok(position) => Replay::Offset(position),
                Err(_) => Replay::Ago(
                    environment::duration(text)
                        .map_err(|error| format!("{error}; or write `start`, `last` or a position"))?,
                ),
            },
        }))
    }
}

/// A line that is to be printed, and who waits for that.
type Line = (String, oneshot::Sender<()>);

impl Subscribe {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        let Self { pattern, group, from, count, address, namespace: Namespace { namespace }, json } = self;
        if address.in_memory() {
            return Err(Failed::usage(
                "nobody else can publish at `memory://`, which ends with this process".to_owned(),
            ));
        }
        let signal = signals::told_to_end().map_err(|error| Failed::at("cannot hear of signals", error))?;
        let (sender, mut lines) = mpsc::channel::<Line>(WAITING);
        let handle = move |context: Context, event: Value| {
            let (line, sender) = (line(&context, &event, json), sender.clone());
            async move {
                let (printed, is_printed) = oneshot::channel();
                // After the last line that is wanted, nobody takes it. A group tries it again then.
                let _ = sender.send((line, printed)).await;
                is_printed.await.map_err(|_| "the command has ended".to_owned())
            }
        };
        let mut subscription = Subscription::to(&pattern);
        if let Some(group) = &group {
            subscription = subscription.shared(group).concurrency(1);
        }
        if let Some(From(from)) = from {
            subscription = subscription.from(from);
        }
        let subscribing = async {
            let server = address.server()?.namespace(&namespace).connect(&address.url).await?;
            server.subscribe(subscription, handle).start().await
        };
        let running = subscribing.await?;
        let of_group = group.map(|group| format!(" as the group {group}")).unwrap_or_default();
        tell(&format!("subscribed to {pattern}{of_group}: Ctrl-C ends it"));
        let printing = async {
            let mut left = count.map(NonZeroU64::get);
            while left != Some(0) {
                let Some((line, printed)) = lines.recv().await else { break };
                print(&line)?;
                // Who waits for it may have gone with its connection.
                let _ = printed.send(());
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
