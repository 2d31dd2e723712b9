//! `hopline serve`: a stand-in for a service.

mod script;

use std::future::ready;
use std::path::PathBuf;

use clap::{ArgGroup, Args};
use hopline::{Context, Error, Fault, Finished, Invocation, Method, Middleware, Next, Reply, Service, ServiceId};
use serde_json::{Value, json};

use self::script::{Answer, Outcome, Script};
use crate::address::{Address, Namespace};
use crate::failed::{Failed, tell};
use crate::input;
use crate::printed::{json, one_line, print, time};

/// Stand in for a service, until interrupted.
///
/// A line on stderr says when it serves, and then a line on stdout for each call: its method, the caller, how long it
/// took, and how it ended. It drains after Ctrl-C or SIGTERM, and exits with 0. It exits with 1 and an error on stderr
/// when it cannot serve, and with 2 on wrong usage.
///
/// Each line of a script is a JSON object with the name of a `method`, or * for all others, and what it answers: a
/// `reply`, its own `error`, or a `fault` (a code such as NOT_FOUND) with a `message`. `delay_ms` has it wait before
/// that. With `oneway` (true or false) the method takes oneway calls, too. Of several lines for a method, the first
/// answers the first call, and the last all later ones.
#[derive(Args)]
#[command(
    group(ArgGroup::new("answers").required(true).args(["reply", "script", "echo"])),
    after_help = "Examples:\n  hopline serve demo --reply '{\"sum\": 5}'\n  hopline serve --echo demo\n  hopline serve shop.v2 --script answers.jsonl\n\nA script:\n  {\"method\": \"add\", \"reply\": 5}\n  {\"method\": \"slow\", \"reply\": 1, \"delay_ms\": 200}\n  {\"method\": \"sub\", \"error\": {\"too\": \"small\"}}\n  {\"method\": \"find\", \"fault\": \"NOT_FOUND\", \"message\": \"there is no order 7\"}"
)]
pub(crate) struct Serve {
    /// SERVICE, or SERVICE.vMAJOR for a version other than 1
    service: ServiceId,
    /// What every method replies, in JSON, @FILE to read it from a file, or - from stdin
    #[arg(long, value_name = "JSON", value_parser = input::value)]
    reply: Option<Value>,
    /// What each method answers, as a file of JSON lines
    #[arg(long, value_name = "FILE")]
    script: Option<PathBuf>,
    /// Have every method reply the array of its arguments
    #[arg(long)]
    echo: bool,
    /// Heed what `hopline rules` has set
    #[arg(long)]
    rules: bool,
    /// Print nothing for calls
    #[arg(long, short)]
    quiet: bool,
    #[command(flatten)]
    address: Address,
    #[command(flatten)]
    namespace: Namespace,
    /// Print JSON: an object for each call
    #[arg(long)]
    json: bool,
}

/// Answers in place of the methods, and prints a line for each call.
struct StandIn {
    script: Script,
    quiet: bool,
    json: bool,
}

impl Serve {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        let Self {
            service: id, reply, script, rules, quiet, address, namespace: Namespace { namespace }, json, ..
        } = self;
        if address.in_memory() {
            return Err(Failed::usage("nobody else can call at `memory://`, which ends with this process".to_owned()));
        }
        let script = match (reply, script) {
            (_, Some(file)) => {
                let file = file.display();
                let text = std::fs::read_to_string(file.to_string());
                let text = text.map_err(|error| Failed::usage(format!("`{file}` cannot be read: {error}")))?;
                Script::read(&text).map_err(|wrong| Failed::usage(format!("`{file}`, {wrong}")))?
            }
            (Some(reply), None) => Script::of_all(Outcome::Reply(reply)),
            (None, None) => Script::of_all(Outcome::Arguments),
        };
        let mut builder = address.server()?.namespace(&namespace);
        if rules {
            builder = builder.rules();
        }
        let server = builder.connect(&address.url).await?;
        let running = server.serve(service(&id, script, quiet, json)).start().await?;
        let instance = running.instance().to_owned();
        // Whoever reads that it is ready may send a signal at once.
        let ended = running.run_until_signal();
        tell(&format!("serving {id} as {instance}: Ctrl-C ends it"));
        ended.await;
        Ok(())
    }
}

fn service(id: &ServiceId, script: Script, quiet: bool, json: bool) -> Service {
    let echo = |_: Context, arguments: Vec<Value>| ready(Ok::<_, Fault>(arguments));
    let mut service = Service::new(id.name(), id.version());
    for (name, oneway) in script.methods() {
        service = match (name, oneway) {
            (None, _) => service.fallback(echo),
            (Some(name), false) => service.method(name, echo),
            (Some(name), true) => service.method(Method::new(name).oneway(), echo),
        };
    }
    service.with(StandIn { script, quiet, json })
}

impl Middleware for StandIn {
    async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
        let Some(Answer { outcome, delay }) = self.script.answer(call.method()) else { return next.run(call).await };
        tokio::time::sleep(*delay).await;
        match outcome {
            Outcome::Reply(reply) => Reply::result(call.codec(), reply),
            Outcome::OwnError(error) => Reply::own_error(call.codec(), error),
            Outcome::Fault(fault) => Err(Error::Fault(fault.clone())),
            Outcome::Arguments => next.run(call).await,
        }
    }

    fn finished(&self, done: &Finished<'_>) {
        let (method, caller) = (done.call.method(), done.call.caller());
        // Questions of discovery are not calls.
        if self.quiet || method.starts_with("hopline.") {
            return;
        }
        let code = if done.own_error { "SERVICE_ERROR" } else { done.code.name() };
        let told = match self.json {
            true => json(&json!({
                "method": method, "caller": caller, "took_us": done.took.as_micros() as u64, "code": code,
            })),
            false => one_line(&format!("{method}  {}  {}  {code}", caller.unwrap_or("-"), time(done.took))),
        };
        // The calls are answered, whether or not somebody reads this.
        let _ = print(&told);
    }
}
