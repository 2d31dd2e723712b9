//! `hopline schema`: what the methods of a service take and return, as JSON Schema.

use clap::Args;

use crate::asking::{Asking, service};
use crate::failed::Failed;
use crate::printed::{json, pretty, print};

/// Print what the methods of a service take and return, as JSON Schema.
///
/// One instance is asked, any of them. Exits with 0 when it has replied, with 1 and an error on stderr when none is there,
/// with 76 when it knows no schemas, and with 2 on wrong usage.
#[derive(Args)]
#[command(after_help = "Example:\n  hopline schema demo > demo.json")]
pub(crate) struct Schema {
    /// SERVICE, or SERVICE.vMAJOR for a version other than 1
    #[arg(value_parser = service)]
    service: String,
    #[command(flatten)]
    asking: Asking,
}

impl Schema {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        self.asking
            .questions
            .ask(async |registry| {
                let schema = registry.schema(&self.service).await?;
                Ok(print(&if self.asking.json { json(&schema) } else { pretty(&schema) })?)
            })
            .await
    }
}
