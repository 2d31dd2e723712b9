//! `hopline drain`: has an instance end without losing a call.

use clap::Args;
use serde_json::json;

use crate::asking::Asking;
use crate::failed::Failed;
use crate::printed::{json, print};

/// Have an instance drain: it takes no more calls, lets those end that run, and ends.
///
/// Its server has to allow this to the user of `--url`, by `Server::allow_drain`. Exits with 0 when the instance has begun,
/// with 1 when it is not there, with 71 when its server does not allow it, and with 2 on wrong usage.
#[derive(Args)]
#[command(after_help = "Example:\n  hopline drain a1b2c3d4e5f6    # `hopline info SERVICE` names the instances")]
pub(crate) struct Drain {
    /// The id of the instance
    instance: String,
    #[command(flatten)]
    asking: Asking,
}

impl Drain {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        self.asking.questions.ask(async |registry| {
                let all = registry.services().await?.into_values().flatten();
                let Some(found) = all.into_iter().find(|told| told.instance == self.instance) else {
                    return Err(Failed::run(format!(
                        "no instance `{}` replies in the namespace `{}`: `hopline ls` lists the services, and `hopline info \
                         SERVICE` their instances",
                        self.instance, self.asking.questions.namespace.namespace
                    )));
                };
                registry.drain(&found.service, &found.instance).await?;
                let (service, instance) = (&found.service, &found.instance);
                Ok(print(&match self.asking.json {
                    true => json(&json!({ "instance": instance, "service": service, "draining": true })),
                    false => format!("{instance} of {service} drains"),
                })?)
            })
            .await
    }
}
