//! `hopline publish`: publishes one event.

use std::time::Duration;

use clap::Args;
use hopline::{Error, Published, environment};
use serde_json::{Value, json};

use crate::address::{Address, Namespace, left, within};
use crate::call::{Entry, Written, entry};
use crate::failed::Failed;
use crate::input;
use crate::printed::{json, one_line, print};

/// Publish an event to all who subscribe to its key.
///
/// It is no error if nobody subscribes, unless --required says so. Exits with 0 when the broker has the event, with 1 and an
/// error on stderr when it has not, or when the queue of a subscriber did not take it, and with 2 on wrong usage.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  hopline publish order.created '{\"id\": 7}'\n  echo 7 | hopline publish order.created - --metadata user=alice"
)]
pub(crate) struct Publish {
    /// What has happened: words with dots between them, such as order.created
    #[arg(value_name = "KEY")]
    event_key: String,
    /// The event in JSON, @FILE to read it from a file, or - from stdin
    #[arg(value_name = "EVENT", default_value = "null", value_parser = input::value)]
    event: Value,
    #[command(flatten)]
    address: Address,
    #[command(flatten)]
    namespace: Namespace,
    /// How long connecting may take, and then the broker, such as 500ms, 5s or 2m
    #[arg(
        long, env = environment::TIMEOUT, default_value = "30s", value_parser = environment::duration,
        hide_env_values = true
    )]
    timeout: Duration,
    /// Text for the subscribers, such as user=alice; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = entry)]
    metadata: Vec<Entry>,
    /// Fail if nobody gets the event: no subscriber and no group
    #[arg(long)]
    required: bool,
    /// How the event is written on the way
    #[arg(long, value_enum, default_value_t = Written::Json)]
    codec: Written,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

impl Publish {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        let mut builder = self.address.client(self.timeout)?.namespace(&self.namespace.namespace);
        builder = builder.codec(self.codec.into()).timeout(self.timeout);
        for Entry { name, value } in &self.metadata {
            builder = builder.metadata(name, value);
        }
        let client = within(self.timeout, builder.connect(&self.address.url), Failed::run).await?;
        let event = client.publish(&self.event_key, &self.event);
        let published = if self.required { event.required() } else { event.confirmed() }.await;
        left(&client).await;
        let to_nobody = matches!(&published, Ok(Published::ToNobody) | Err(Error::NoSubscriber { .. }));
        let to_all = to_nobody || matches!(&published, Ok(Published::ToAll));
        let key = one_line(&self.event_key);
        if self.json && (to_nobody || published.is_ok()) {
            print(&json(&json!({ "key": self.event_key, "to_all": to_all, "to_nobody": to_nobody })))?;
        }
        match published? {
            _ if self.json && to_all => {}
            Published::ToAll => print(&format!("{key}: taken by the queues of all subscribers"))?,
            Published::ToNobody => {
                print(&format!("{key}: taken by nobody, since there is no subscriber and no group"))?
            }
            _ => {
                let why = "not all subscribers have the event: the queue of one is full, or its node is away";
                return Err(Failed::run(why.to_owned()));
            }
        }
        Ok(())
    }
}
