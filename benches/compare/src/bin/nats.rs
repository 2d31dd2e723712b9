//! Request/reply over NATS, as its client does it: one message a call, to a queue group.

use anyhow::bail;
use clap::Parser;
use futures::StreamExt;
use hopline_compare::{Load, Role, Style};

/// RPC over NATS.
#[derive(Parser)]
struct Command {
    #[command(subcommand)]
    role: Role,
}

const SUBJECT: &str = "compare.echo";
const GROUP: &str = "compare";

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Command::parse().role {
        Role::Serve { url } => serve(&url).await,
        Role::Call { url, style: Style::Call, load } => call(&url, load).await,
        Role::Call { style: Style::Oneway, .. } => bail!("core NATS has no durable queues: nats has no --style oneway"),
    }
}

async fn serve(url: &str) -> anyhow::Result<()> {
    let client = async_nats::connect(url).await?;
    let mut requests = client.queue_subscribe(SUBJECT, GROUP.to_owned()).await?;
    client.flush().await?;
    let replies = client.clone();
    // Publishing only hands the message to the connection's writer: a task for each request gains nothing.
    tokio::spawn(async move {
        while let Some(request) = requests.next().await {
            let Some(reply_to) = request.reply else { continue };
            if let Err(error) = replies.publish(reply_to, request.payload).await {
                eprintln!("nats: a request was not answered: {error}");
            }
        }
    });
    hopline_compare::announce()?;
    hopline_compare::told_to_stop().await
}

async fn call(url: &str, load: Load) -> anyhow::Result<()> {
    let client = async_nats::connect(url).await?;
    hopline_compare::run(load, move |payload| {
        let client = client.clone();
        async move { Ok(client.request(SUBJECT, payload).await?.payload) }
    })
    .await
}
