//! What the commands have in common that ask instances about themselves.

use std::future::Future;
use std::time::Duration;

use clap::Args;
use hopline::{Registry, ServiceId, environment};

use crate::address::{Address, Namespace, left, within};
use crate::call::{Entry, entry};
use crate::failed::Failed;

/// What is asked, and whether the replies are printed as JSON.
#[derive(Args)]
pub(crate) struct Asking {
    #[command(flatten)]
    pub(crate) questions: Questions,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

/// Where the instances are, and how long to wait for them.
#[derive(Args)]
pub(crate) struct Questions {
    #[command(flatten)]
    address: Address,
    #[command(flatten)]
    pub(crate) namespace: Namespace,
    /// Wait for replies for all of this time, such as 500ms or 5s [default: 2s, and no longer than 250ms after a reply]
    #[arg(long, value_parser = environment::duration)]
    timeout: Option<Duration>,
    /// Text for servers that ask who is asking, such as token=secret; may be repeated
    #[arg(long, value_name = "NAME=VALUE", value_parser = entry)]
    metadata: Vec<Entry>,
}

impl Questions {
    /// Connects, and has `ask` do the rest.
    pub(crate) async fn ask<F>(&self, ask: impl FnOnce(Registry) -> F) -> Result<(), Failed>
    where
        F: Future<Output = Result<(), Failed>>,
    {
        self.ask_within(None, ask).await
    }

    /// The same, with another limit for connecting if no time-out is set.
    pub(crate) async fn ask_within<F>(
        &self,
        limit: Option<Duration>,
        ask: impl FnOnce(Registry) -> F,
    ) -> Result<(), Failed>
    where
        F: Future<Output = Result<(), Failed>>,
    {
        let limit = self.timeout.or(limit).unwrap_or(Duration::MAX);
        let mut builder = self.address.client(limit)?.namespace(&self.namespace.namespace);
        for Entry { name, value } in &self.metadata {
            builder = builder.metadata(name, value);
        }
        let client = within(limit, builder.connect(&self.address.url), Failed::run).await?;
        let registry = match self.timeout {
            Some(timeout) => client.registry().total(timeout).stall(timeout),
            None => client.registry(),
        };
        let outcome = ask(registry).await;
        left(&client).await;
        outcome
    }
}

/// A service, as a command takes it.
pub(crate) fn service(text: &str) -> Result<String, String> {
    text.parse::<ServiceId>().map(|_| text.to_owned()).map_err(|error| error.to_string())
}

/// What is said when no instance replies. The broker knows whether somebody reads the queue of its calls all the same.
pub(crate) async fn nobody(registry: &Registry, service: &str) -> Failed {
    let queues = registry.queues(service).await.unwrap_or_default();
    let readers = queues.calls.map_or(0, |calls| calls.consumers);
    Failed::run(match readers {
        0 => format!(
            "no instance of `{service}` replies: is a server running, and on the same namespace? (`hopline ls` lists all services)"
        ),
        1 => format!("no instance of `{service}` replies, though one reads its queue: it hangs, or may not reply"),
        _ => {
            format!("no instance of `{service}` replies, though {readers} read its queue: they hang, or may not reply")
        }
    })
}
