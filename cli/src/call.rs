//! `hopline call`: makes one call and prints its reply as JSON.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use hopline::{CallError, Codec, Error, ServiceId, environment};
use serde_json::Value;

use crate::address::{Address, Namespace, within};
use crate::failed::{self, Failed};
use crate::printed;

/// How long closing the connection may take. If the call was cancelled, its server is told in this time.
const CLOSING: Duration = Duration::from_secs(1);

/// Call a method and print its reply as JSON.
///
/// Exits with 0 when the method has answered, with 1 and a one-line error on stderr when the call has failed, and with
/// 2 on wrong usage.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  hopline call demo.add '[2, 3]'\n  hopline call billing.v2.total '[42]' --timeout 5s --metadata user=alice"
)]
pub(crate) struct Call {
    /// What to call: SERVICE.METHOD, or SERVICE.vMAJOR.METHOD for a version other than 1
    #[arg(value_name = "TARGET", value_parser = target)]
    target: Target,
    /// The arguments: a JSON array with one element for each
    #[arg(value_name = "ARGUMENTS", default_value = "[]", value_parser = arguments)]
    arguments: Arguments,
    #[command(flatten)]
    address: Address,
    /// How long it may take in all, with connecting, such as 500ms, 5s or 2m
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
    #[arg(long, value_name = "INSTANCE")]
    to: Option<String>,
}

#[derive(Clone)]
struct Target {
    service: String,
    method: String,
}

/// The arguments of the call. It is a type of its own, since clap would take a `Vec` for an option that may be
/// repeated.
#[derive(Clone)]
struct Arguments(Vec<Value>);

/// An entry of the metadata.
#[derive(Clone)]
struct Entry {
    name: String,
    value: String,
}

impl Call {
    pub(crate) fn run(self) -> ExitCode {
        let reply = hopline::blocking::wait(self.reply());
        failed::ended(reply.and_then(|reply| Ok(printed::print(&reply.to_string())?)))
    }

    async fn reply(self) -> Result<Value, Failed> {
        let Self { target, arguments, address, timeout, namespace: Namespace { namespace }, metadata, to } = self;
        let began = Instant::now();
        let builder = address.client(timeout)?.namespace(namespace).codec(Codec::Json);
        let client = within(timeout, builder.connect(&address.url), Failed::run).await?;
        let left = timeout.saturating_sub(began.elapsed());
        let mut call =
            client.call::<Value>(&target.service, &target.method, arguments.0).fails_with::<Value>().timeout(left);
        for Entry { name, value } in metadata {
            call = call.metadata(name, value);
        }
        if let Some(instance) = to {
            call = call.to(instance);
        }
        let reply = call.await;
        // If the broker does not answer any more, this ends without it.
        let _ = tokio::time::timeout(CLOSING, client.close()).await;
        reply.map_err(|error| match error {
            CallError::Service(error) => Failed::run(format!("the service returned its own error: {error}")),
            CallError::Failed(mut error) => {
                // If connecting took all the time, the error says that the call was not sent: that stays as it is.
                if let Error::Timeout { after, .. } = &mut error
                    && !after.is_zero()
                {
                    *after = timeout;
                }
                error.into()
            }
        })
    }
}

fn target(text: &str) -> Result<Target, String> {
    let (service, method) = ServiceId::with_method(text).map_err(|error| error.to_string())?;
    Ok(Target { service: service.to_string(), method: method.to_owned() })
}

fn entry(text: &str) -> Result<Entry, String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok(Entry { name: name.to_owned(), value: value.to_owned() }),
        _ => Err("write NAME=VALUE, such as user=alice".to_owned()),
    }
}

fn arguments(text: &str) -> Result<Arguments, String> {
    match serde_json::from_str(text) {
        Ok(Value::Array(arguments)) => Ok(Arguments(arguments)),
        Ok(_) => Err("write a JSON array with one element for each argument, such as '[2, 3]'".to_owned()),
        Err(error) => Err(format!("not JSON: {error}")),
    }
}
