//! What the commands have in common that ask instances about themselves.

use std::future::Future;
use std::time::Duration;

use clap::Args;
use hopline::{Client, Registry, ServiceId, environment};

use crate::address::{Address, Namespace, within};
use crate::failed::Failed;

/// How long closing the connection may take.
const CLOSING: Duration = Duration::from_secs(1);

/// Where the instances are, and how long to wait for them.
#[derive(Args)]
pub(crate) struct Asking {
    #[command(flatten)]
    address: Address,
    #[command(flatten)]
    namespace: Namespace,
    /// How long the instances have to reply, such as 500ms or 5s
    #[arg(long, default_value = "2s", value_parser = environment::duration)]
    timeout: Duration,
    /// Print JSON
    #[arg(long)]
    pub(crate) json: bool,
}

impl Asking {
    /// Connects, and has `ask` do the rest.
    pub(crate) async fn ask<F>(&self, ask: impl FnOnce(Registry) -> F) -> Result<(), Failed>
    where
        F: Future<Output = Result<(), Failed>>,
    {
        let builder = self.address.client(Duration::MAX)?.namespace(&self.namespace.namespace);
        let client: Client = within(Duration::MAX, builder.connect(&self.address.url), Failed::run).await?;
        let outcome = ask(client.registry().total(self.timeout)).await;
        // If the broker does not answer any more, this ends without it.
        let _ = tokio::time::timeout(CLOSING, client.close()).await;
        outcome
    }
}

/// A service, as a command takes it.
pub(crate) fn service(text: &str) -> Result<String, String> {
    text.parse::<ServiceId>().map(|_| text.to_owned()).map_err(|error| error.to_string())
}

/// What is said when no instance replies.
pub(crate) fn nobody(service: &str) -> Failed {
    Failed::run(format!(
        "no instance of `{service}` replies: is a server running, and on the same namespace? (`hopline ls` lists all services)"
    ))
}
