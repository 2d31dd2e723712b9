//! `hopline watch`: the instances as they come and go.

use clap::Args;
use futures::StreamExt as _;
use hopline::{Change, Instance};
use serde_json::json;

use crate::asking::Asking;
use crate::failed::Failed;
use crate::printed::{json, one_line, print};
use crate::signals::until_told;

/// Show the instances as they come and go, until interrupted.
///
/// A line for each: at first for those that are there. With `--json` each line is an object. Ctrl-C ends it with 0.
#[derive(Args)]
#[command(after_help = "Example:\n  hopline watch --json")]
pub(crate) struct Watch {
    #[command(flatten)]
    asking: Asking,
}

impl Watch {
    pub(crate) async fn run(self) -> Result<(), Failed> {
        let showing = self.asking.questions.ask(async |registry| {
            let mut changes = registry.watch();
            while let Some(change) = changes.next().await {
                print(&if self.asking.json { as_json(&change) } else { as_line(&change) })?;
            }
            Err(Failed::run("the connection was closed for good".to_owned()))
        });
        until_told(showing).await
    }
}

fn as_line(change: &Change) -> String {
    let line = |what, info: &Instance| format!("{what:<8}  {}  {}  {}", info.service, info.instance, info.host);
    one_line(&match change {
        Change::Up(info) => line("up", info),
        Change::Changed(info) if info.draining => line("draining", info),
        Change::Changed(info) => line("changed", info),
        Change::Down { service, instance } => format!("{:<8}  {service}  {instance}", "down"),
        other => format!("{other:?}"),
    })
}

fn as_json(change: &Change) -> String {
    match change {
        Change::Up(info) => json(&json!({ "change": "up", "info": info })),
        Change::Changed(info) => json(&json!({ "change": "changed", "info": info })),
        Change::Down { service, instance } => {
            json(&json!({ "change": "down", "service": service, "instance": instance }))
        }
        other => json(&json!({ "change": format!("{other:?}") })),
    }
}
