//! `hopline tap`: the calls of a service as they go by.

use std::pin::pin;
use std::time::Duration;

use clap::Args;
use futures::StreamExt as _;
use hopline::{Error, Tapped, TappedCall, environment};
use serde::Serialize;

use crate::asking::{Asking, nobody, service};
use crate::failed::{Failed, tell};
use crate::printed::{bytes, json, one_line, print, time};
use crate::signals;

/// The longest time of a tap.
const LONGEST: Duration = Duration::from_secs(600);

/// Show the calls of a service as its instances run them.
///
/// The instances tell of the calls that have ended after they ran: nothing is taken from their queues, and arguments and
/// results are not shown. Events are not calls. A line has the method, the caller, how long the call waited (by two
/// machines' clocks) and its handler ran, the code with which it ended, how many bytes came and went, and the instance.
/// SERVICE_ERROR is the method's own error. With `--json` each line is an object. At the end a line on stderr says how
/// many calls were shown, and how many were left out since there were more than `--rate`.
///
/// Exits with 0 when the time is over or after Ctrl-C or SIGTERM, with 1 and an error on stderr when no instance is
/// there, with 64 and the code when all refuse, and with 2 on wrong usage.
#[derive(Args)]
#[command(after_help = "Examples:\n  hopline tap demo\n  hopline tap demo --for 5m --rate 20 --json")]
pub(crate) struct Tap {
    /// SERVICE, or SERVICE.vMAJOR for a version other than 1
    #[arg(value_parser = service)]
    service: String,
    /// The most calls that an instance tells of in a second
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rate: u32,
    /// For how long, at most 10m
    #[arg(long = "for", value_name = "TIME", default_value = "30s", value_parser = lasting)]
    lasts: Duration,
    #[command(flatten)]
    asking: Asking,
}

/// How many calls there were.
#[derive(Default)]
struct Count {
    shown: u64,
    left_out: u64,
}

/// A call in JSON: as the instance tells it, and where it ran.
#[derive(Serialize)]
struct Line<'a> {
    service: &'a str,
    instance: &'a str,
    #[serde(flatten)]
    call: &'a TappedCall,
}

fn lasting(text: &str) -> Result<Duration, String> {
    match environment::duration(text)? {
        time if time <= LONGEST => Ok(time),
        _ => Err("10m is the longest".to_owned()),
    }
}

impl Tap {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        let mut signal = pin!(signals::told_to_end().map_err(|error| Failed::at("cannot hear of signals", error))?);
        self.asking
            .questions
            .ask(async |registry| {
                let mut tap = match registry.tap(&self.service, self.lasts, self.rate).await {
                    Err(Error::NoService { .. }) => return Err(nobody(&registry, &self.service).await),
                    tap => tap?,
                };
                let (mut count, mut refused, mut told) = (Count::default(), None, false);
                loop {
                    let tapped = tokio::select! {
                        biased;
                        () = &mut signal => None,
                        tapped = tap.next() => tapped,
                    };
                    match tapped {
                        None => break,
                        Some(Ok(tapped)) => {
                            if !told {
                                told = true;
                                self.begin()?;
                            }
                            self.show(&tapped, &mut count)?;
                        }
                        // The others go on.
                        Some(Err(error @ Error::Fault(_))) => {
                            tell(&format!("an instance refuses: {error}"));
                            refused = Some(error);
                        }
                        Some(Err(error)) => return Err(error.into()),
                    }
                }
                match refused {
                    Some(error) if !told => Err(error.into()),
                    _ => {
                        let calls = if count.shown == 1 { "call" } else { "calls" };
                        tell(&format!("{} {calls} shown, {} left out", count.shown, count.left_out));
                        Ok(())
                    }
                }
            })
            .await
    }

    /// The first instance tells.
    fn begin(&self) -> Result<(), String> {
        tell(&format!("tapping {} for {}: Ctrl-C ends it", self.service, time(self.lasts)));
        if self.asking.json {
            return Ok(());
        }
        print(&row(["METHOD", "CALLER", "QUEUED", "RAN", "CODE", "IN", "OUT", "INSTANCE"].map(str::to_owned)))
    }

    fn show(&self, tapped: &Tapped, count: &mut Count) -> Result<(), String> {
        let Tapped { service, instance, calls, left_out, .. } = tapped;
        for call in calls {
            print(&if self.asking.json { json(&Line { service, instance, call }) } else { line(instance, call) })?;
        }
        count.shown += calls.len() as u64;
        count.left_out = count.left_out.saturating_add(*left_out);
        Ok(())
    }
}

fn line(instance: &str, call: &TappedCall) -> String {
    let named = |text: &str| if text.is_empty() { "-".to_owned() } else { one_line(text) };
    row([
        named(&call.method),
        named(&call.caller),
        call.queue_time().map_or_else(|| "-".to_owned(), time),
        time(call.handler_time()),
        if call.own_error { "SERVICE_ERROR".to_owned() } else { named(&call.code) },
        bytes(call.received_bytes),
        bytes(call.returned_bytes),
        named(instance),
    ])
}

/// A line of the table. Its columns are as wide as is usual, since later lines are not known.
fn row(cells: [String; 8]) -> String {
    let [method, caller, queued, ran, code, came, went, instance] = cells;
    format!("{method:<16}  {caller:<12}  {queued:>7}  {ran:>7}  {code:<17}  {came:>8}  {went:>8}  {instance}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call() -> TappedCall {
        let mut call = TappedCall::default();
        (call.method, call.caller, call.code) = ("add".to_owned(), "c1".to_owned(), "OK".to_owned());
        (call.queue_micros, call.handler_micros, call.received_bytes) = (Some(2_500), 90, 1536);
        call
    }

    #[test]
    fn a_call_is_a_line() {
        let cells = |call: &TappedCall| line("i1", call).split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(cells(&call()), ["add", "c1", "2.5ms", "90us", "OK", "1.5", "KiB", "0", "B", "i1"]);
        let mut other = call();
        (other.own_error, other.queue_micros, other.caller) = (true, None, String::new());
        assert_eq!(cells(&other)[..5], ["add", "-", "-", "90us", "SERVICE_ERROR"]);
    }

    #[test]
    fn what_a_peer_says_does_not_steer_the_terminal() {
        let mut call = call();
        (call.method, call.caller) = ("a\u{1b}[2J".to_owned(), "b\nc".to_owned());
        let line = line("i\u{202e}", &call);
        assert!(!line.contains(['\u{1b}', '\n', '\u{202e}']), "{line:?}");
    }

    #[test]
    fn a_call_in_json_says_where_it_ran() {
        let text = json(&Line { service: "demo.v1", instance: "i1", call: &call() });
        let expected = r#"{"service":"demo.v1","instance":"i1","method":"add","caller":"c1","at_ms":0,"queue_micros":2500,"handler_micros":90,"code":"OK","own_error":false,"received_bytes":1536,"returned_bytes":0}"#;
        assert_eq!(text, expected);
    }

    #[test]
    fn ten_minutes_are_the_longest() {
        assert_eq!(lasting("10m"), Ok(LONGEST));
        assert!(lasting("11m").is_err() && lasting("0s").is_err());
    }
}
