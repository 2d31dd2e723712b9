//! `hopline call`: makes one call and prints its reply as JSON.

use std::time::{Duration, Instant};

use clap::{Args, ValueEnum};
use futures::StreamExt as _;
use hopline::{CallError, Client, Codec, Error, Route, ServiceId, Weights, environment};
use serde_json::{Value, json};

use crate::address::{self, Address, Namespace, within};
use crate::arguments::{self, Given};
use crate::failed::Failed;
use crate::printed;
use crate::repeat::Repeating;
use crate::verbose::Verbose;

/// Call a method and print its reply as JSON.
///
/// Exits with 0 when the method has answered, with 1 and a one-line error on stderr when the call has failed, with 2 on
/// wrong usage, and with 64 and the number of its code when the server reports a fault: 67 for INVALID_ARGUMENT (3), 76
/// for UNIMPLEMENTED (12).
#[derive(Args)]
#[command(
    after_help = "Examples:\n  hopline call demo.add '[2, 3]'\n  hopline call demo.add a=2 b=3\n  hopline call billing.v2.total '[42]' --timeout 5s --metadata user=alice\n  hopline call demo.whoami --all\n  hopline call demo.add '[2, 3]' --repeat 1000 --concurrency 16\n  echo '[\"hello\"]' | hopline call demo.note - --oneway"
)]
pub(crate) struct Call {
    /// What to call: SERVICE.METHOD, or SERVICE.vMAJOR.METHOD for a version other than 1
    #[arg(value_name = "TARGET", value_parser = target)]
    target: Target,
    /// The arguments: a JSON array with one element for each, @FILE to read it from a file, or - from stdin; or
    /// NAME=VALUE for each parameter
    ///
    /// They are checked before they are sent, if an instance tells a schema. Names need one. A VALUE is JSON, or text.
    #[arg(value_name = "ARGUMENTS", value_parser = arguments::given)]
    given: Vec<Given>,
    /// What is sent of them.
    #[arg(skip)]
    arguments: Vec<Value>,
    /// Do not ask for a schema to check a JSON array of arguments
    #[arg(long)]
    no_check: bool,
    #[command(flatten)]
    address: Address,
    /// How long it may take in all, with connecting, such as 500ms, 5s or 2m; with `--repeat`, each call
    #[arg(
        long, env = environment::TIMEOUT, default_value = "30s", value_parser = environment::duration,
        hide_env_values = true
    )]
    timeout: Duration,
    #[command(flatten)]
    namespace: Namespace,
    /// Text for the handler, such as user=alice; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = entry)]
    metadata: Vec<Entry>,
    /// The instance to call, and not any other
    #[arg(long, value_name = "INSTANCE", conflicts_with = "all")]
    to: Option<String>,
    /// How the instance is chosen: any, round-robin, least-in-flight, key=KEY (the same instance for the same key),
    /// weight=ATTRIBUTE, or zone=ATTRIBUTE=VALUE
    #[arg(long, value_name = "ROUTE", value_parser = route, conflicts_with_all = ["to", "all", "oneway"])]
    route: Option<Route>,
    /// Call every instance, and print an array of what they reply: each with its instance, and a result or an error
    #[arg(long)]
    all: bool,
    /// Send a oneway call, which has no reply: the command ends when the broker has it, and prints nothing
    #[arg(long)]
    oneway: bool,
    /// How arguments and reply are written on the way
    #[arg(long, value_enum, default_value_t = Written::Json)]
    codec: Written,
    #[command(flatten)]
    repeating: Repeating,
    /// Heed what `hopline rules` has set
    #[arg(long)]
    rules: bool,
    /// Tell on stderr which instance answered, how long it took, and how many bytes went and came
    #[arg(long, short, conflicts_with_all = ["all", "oneway", "repeat"])]
    verbose: bool,
    /// Print JSON: also what `--repeat` and `--verbose` tell, and an error
    #[arg(long)]
    json: bool,
}

/// How arguments and reply are written on the way. What the user writes and reads is JSON in any case.
#[derive(Clone, Copy, ValueEnum)]
pub(crate) enum Written {
    Json,
    Cbor,
    Msgpack,
}

impl From<Written> for Codec {
    fn from(written: Written) -> Self {
        match written {
            Written::Json => Self::Json,
            Written::Cbor => Self::Cbor,
            Written::Msgpack => Self::MessagePack,
        }
    }
}

#[derive(Clone)]
struct Target {
    service: String,
    method: String,
}

/// An entry of the metadata.
#[derive(Clone)]
pub(crate) struct Entry {
    pub(crate) name: String,
    pub(crate) value: String,
}

impl Call {
    /// Connects, makes the call, and prints what comes of it.
    pub(crate) async fn run(mut self) -> Result<(), Failed> {
        let began = Instant::now();
        arguments::fit_together(&self.given)?;
        let builder = self.address.client(self.timeout)?.namespace(&self.namespace.namespace).codec(self.codec.into());
        // The question for a schema carries it as well.
        let mut builder =
            self.metadata.iter().fold(builder, |builder, entry| builder.metadata(&entry.name, &entry.value));
        if self.rules {
            builder = builder.rules();
        }
        if self.verbose {
            builder = builder.with(Verbose { json: self.json });
        }
        let client = within(self.timeout, builder.connect(&self.address.url), Failed::run).await?;
        let outcome = self.with_arguments(&client, began).await;
        address::left(&client).await;
        outcome
    }

    async fn with_arguments(&mut self, client: &Client, began: Instant) -> Result<(), Failed> {
        let Target { service, method } = &self.target;
        let left = self.timeout.saturating_sub(began.elapsed());
        self.arguments = arguments::in_order(client, service, method, &self.given, !self.no_check, left).await?;
        let left = self.timeout.saturating_sub(began.elapsed());
        match (self.oneway, self.all) {
            _ if !self.repeating.is_once() => self.repeated(client).await,
            (true, _) => self.sent(client, left).await.map_err(|error| self.failed(error)),
            (false, true) => self.all_replies(client, left).await,
            (false, false) => self.reply(client, left).await,
        }
    }

    async fn reply(&self, client: &Client, left: Duration) -> Result<(), Failed> {
        let reply = self.call(client, left).await.map_err(|error| self.failed(error))?;
        Ok(printed::print(&printed::json(&reply))?)
    }

    /// Makes the call many times, and prints what became of it.
    async fn repeated(&self, client: &Client) -> Result<(), Failed> {
        let sums = self.repeating.summed(async || match self.oneway {
            true => self.sent(client, self.timeout).await,
            false => self.call(client, self.timeout).await.map(drop),
        });
        let sums = sums.await;
        printed::print(&if self.json { sums.as_json() } else { sums.as_text() })?;
        match sums.failed() {
            Some((count, first)) => {
                Err(Failed::run(format!("{count} calls failed, the first one with: {}", self.failed(first))))
            }
            None => Ok(()),
        }
    }

    async fn sent(&self, client: &Client, left: Duration) -> Result<(), CallError<Value>> {
        let call = client.oneway(&self.target.service, &self.target.method, self.arguments.clone()).timeout(left);
        let call = self.with_options(call);
        let sent = if self.all { call.all().send().await } else { call.send().await };
        sent.map_err(CallError::Failed)
    }

    /// Prints the replies of all instances that are there now. It fails if one of them does not reply with a result.
    async fn all_replies(&self, client: &Client, left: Duration) -> Result<(), Failed> {
        let service = &self.target.service;
        let instances = client.registry().total(left).instances(service).await?.len();
        let replies = self.call(client, left).all().replies(left).await?.take(instances.max(1));
        let replies: Vec<_> = replies.collect().await;
        let results = replies.iter().filter(|reply| reply.outcome.is_ok()).count();
        let told = replies.into_iter().map(|reply| match reply.outcome {
            Ok(result) => json!({ "instance": reply.instance, "result": result }),
            Err(CallError::Service(error)) => json!({ "instance": reply.instance, "service_error": error }),
            Err(CallError::Failed(error)) => json!({ "instance": reply.instance, "error": error.to_string() }),
        });
        printed::print(&printed::json(&told.collect::<Vec<_>>()))?;
        match instances.saturating_sub(results) {
            0 => Ok(()),
            failed => Err(Failed::run(format!("{failed} of {instances} instances have not replied with a result"))),
        }
    }

    /// The call with all its options, for a reply.
    fn call(&self, client: &Client, left: Duration) -> hopline::Call<Value, Value> {
        let call = client.call::<Value>(&self.target.service, &self.target.method, self.arguments.clone());
        let call = self.with_options(call.fails_with::<Value>().timeout(left));
        match &self.route {
            Some(route) => call.route(route.clone()),
            None => call,
        }
    }

    fn with_options<T, E>(&self, call: hopline::Call<T, E>) -> hopline::Call<T, E> {
        match &self.to {
            Some(instance) => call.to(instance),
            None => call,
        }
    }

    fn failed(&self, error: CallError<Value>) -> Failed {
        match error {
            CallError::Service(error) => Failed::service_error(error),
            CallError::Failed(mut error) => {
                // If connecting took all the time, the error says that the call was not sent: that stays as it is.
                if let Error::Timeout { after, .. } = &mut error
                    && !after.is_zero()
                {
                    *after = self.timeout;
                }
                error.into()
            }
        }
    }
}

fn target(text: &str) -> Result<Target, String> {
    let (service, method) = ServiceId::with_method(text).map_err(|error| error.to_string())?;
    Ok(Target { service: service.to_string(), method: method.to_owned() })
}

fn route(text: &str) -> Result<Route, String> {
    let named = text.split_once('=').filter(|(_, value)| !value.is_empty());
    match (text, named) {
        ("any", _) => Ok(Route::Any),
        ("round-robin", _) => Ok(Route::RoundRobin),
        ("least-in-flight", _) => Ok(Route::LeastInFlight),
        (_, Some(("key", key))) => Ok(Route::Key(key.to_owned())),
        (_, Some(("weight", attribute))) => Ok(Route::Weighted(Weights::Attribute(attribute.to_owned()))),
        (_, Some(("zone", zone))) => {
            let Entry { name: attribute, value } =
                entry(zone).map_err(|_| "write zone=ATTRIBUTE=VALUE, such as zone=zone=eu1")?;
            Ok(Route::Zone { attribute, value })
        }
        _ => {
            Err("write any, round-robin, least-in-flight, key=KEY, weight=ATTRIBUTE or zone=ATTRIBUTE=VALUE".to_owned())
        }
    }
}

pub(crate) fn entry(text: &str) -> Result<Entry, String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok(Entry { name: name.to_owned(), value: value.to_owned() }),
        _ => Err("write NAME=VALUE, such as user=alice".to_owned()),
    }
}
