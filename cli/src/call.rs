//! `hopline call`: one call, its reply as JSON.

use std::io::Write;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use hopline::topology::{ServiceId, check_name};
use hopline::{Client, Codec, Error};
use serde_json::Value;

/// Call a method and print its reply as JSON.
///
/// Exits with 0 when the method answered, with 1 and the error in one line on stderr when the call failed, and with 2
/// on bad usage.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  hopline call demo.add '[2, 3]'\n  hopline call billing.v2.total '[42]' --timeout 5s"
)]
pub(crate) struct Call {
    /// What to call: SERVICE.METHOD, or SERVICE.vMAJOR.METHOD for a version other than 1
    #[arg(value_name = "TARGET", value_parser = target)]
    target: Target,
    /// The arguments: a JSON array with one element for each
    #[arg(value_name = "ARGUMENTS", default_value = "[]", value_parser = arguments)]
    arguments: Arguments,
    /// The broker's address
    #[arg(long, env = "HOPLINE_URL", default_value = "amqp://localhost", hide_env_values = true)]
    url: String,
    /// How long the call may take, such as 500ms, 5s or 2m
    #[arg(long, default_value = "30s", value_parser = duration)]
    timeout: Duration,
    /// The prefix of every name on the broker
    #[arg(long, default_value = "hopline")]
    namespace: String,
    /// One instance instead of any
    #[arg(long, value_name = "INSTANCE")]
    to: Option<String>,
}

#[derive(Clone)]
struct Target {
    service: String,
    method: String,
}

/// The arguments, one by one: clap would take a bare `Vec` for an option that may be repeated.
#[derive(Clone)]
struct Arguments(Vec<Value>);

impl Call {
    pub(crate) fn run(self) -> ExitCode {
        match hopline::blocking::wait(self.reply()) {
            Ok(reply) => match writeln!(std::io::stdout(), "{reply}") {
                Ok(()) => ExitCode::SUCCESS,
                // Whoever reads this program's output has gone.
                Err(_) => ExitCode::FAILURE,
            },
            // A name or an address that cannot be used is a matter of usage.
            Err(error @ Error::Invalid(_)) => failed(&error, 2),
            Err(error) => failed(&error, 1),
        }
    }

    async fn reply(self) -> Result<Value, Error<Value>> {
        let Self { target, arguments, url, timeout, namespace, to } = self;
        let builder = Client::builder().namespace(&namespace).codec(Codec::Json);
        let client = builder.connect(&url).await.map_err(Error::widen)?;
        let mut call =
            client.call::<Value>(&target.service, &target.method, arguments.0).fails_with::<Value>().timeout(timeout);
        if let Some(instance) = to {
            call = call.to(instance);
        }
        let reply = call.await;
        client.close().await;
        reply
    }
}

fn failed(error: &Error<Value>, code: u8) -> ExitCode {
    match error {
        Error::Service(error) => eprintln!("hopline: the service returned its own error: {error}"),
        Error::Connect { .. } => eprintln!("hopline: {error} (`--url` or HOPLINE_URL names another broker)"),
        error => eprintln!("hopline: {}", error.to_string().replace('\n', " ")),
    }
    ExitCode::from(code)
}

fn target(text: &str) -> Result<Target, String> {
    let Some((service, method)) = text.rsplit_once('.') else {
        return Err("write SERVICE.METHOD, such as demo.add".to_owned());
    };
    ServiceId::parse(service)?;
    check_name("method", method)?;
    Ok(Target { service: service.to_owned(), method: method.to_owned() })
}

fn arguments(text: &str) -> Result<Arguments, String> {
    match serde_json::from_str(text) {
        Ok(Value::Array(arguments)) => Ok(Arguments(arguments)),
        Ok(_) => Err("write a JSON array with one element for each argument, such as '[2, 3]'".to_owned()),
        Err(error) => Err(format!("not JSON: {error}")),
    }
}

fn duration(text: &str) -> Result<Duration, String> {
    let unit = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(unit);
    let millis = match unit {
        "ms" => 1,
        "s" => 1000,
        "m" => 60_000,
        _ => 0,
    };
    match number.parse::<u64>().ok().and_then(|number| number.checked_mul(millis)) {
        Some(millis) if millis > 0 => Ok(Duration::from_millis(millis)),
        _ => Err("write a number above 0 and a unit: 500ms, 5s or 2m".to_owned()),
    }
}
