//! RPC with kanin, the framework over lapin: its server, and the client by hand that it leaves to its users.

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Parser;
use hopline_compare::plain_client::PlainClient;
use hopline_compare::{Load, Role, Style};
use kanin::error::{FromError, HandlerError};
use kanin::extract::Msg;
use kanin::response::Respond;
use kanin::{App, HandlerConfig};
use lapin::options::QueueDeclareOptions;
use lapin::types::FieldTable;
use lapin::{Connection, ConnectionProperties};
use prost::Message;

/// RPC with kanin.
#[derive(Parser)]
struct Command {
    #[command(subcommand)]
    role: Role,
}

const REQUESTS: &str = "compare.kanin.requests";

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Command::parse().role {
        Role::Serve { url } => serve(&url).await,
        Role::Call { url, style: Style::Call, load } => call(&url, load).await,
        Role::Call { style: Style::Oneway, .. } => bail!("kanin has no client that publishes: no --style oneway"),
    }
}

/// `google.protobuf.BytesValue` both ways.
async fn echo(Msg(payload): Msg<Vec<u8>>) -> Echoed {
    Echoed(payload)
}

/// A `BytesValue` that kanin accepts as a reply: it wants to know what to send when a request cannot be read.
#[derive(Debug)]
struct Echoed(Vec<u8>);

impl Respond for Echoed {
    fn respond(self) -> Vec<u8> {
        self.0.encode_to_vec()
    }
}

impl FromError<HandlerError> for Echoed {
    fn from_error(error: HandlerError) -> Self {
        Self(error.to_string().into_bytes())
    }
}

async fn serve(url: &str) -> anyhow::Result<()> {
    // kanin's own choices, but for a durable queue: RabbitMQ 4.3 refuses one that is neither durable nor exclusive.
    let config = HandlerConfig::new().with_durable(true);
    let app = App::new(()).handler_with_config(REQUESTS, echo, config);
    tokio::select! {
        ended = app.run(url) => Ok(ended?),
        stop = announced(url) => stop,
    }
}

/// Announces the server when it consumes, which kanin does not tell.
async fn announced(url: &str) -> anyhow::Result<()> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::durable() };
    loop {
        // Asking for a queue that is not there yet ends the channel.
        let channel = connection.create_channel().await?;
        let queue = channel.queue_declare(REQUESTS.into(), passive, FieldTable::default()).await;
        if queue.is_ok_and(|queue| queue.consumer_count() > 0) {
            break;
        }
    }
    hopline_compare::announce()?;
    hopline_compare::told_to_stop().await
}

async fn call(url: &str, load: Load) -> anyhow::Result<()> {
    let client = PlainClient::connect(url, REQUESTS).await?;
    hopline_compare::run(load, move |payload: Bytes| {
        let client = client.clone();
        async move {
            let reply = client.call(&payload.encode_to_vec()).await?;
            Bytes::decode(reply.as_slice()).context("the reply is not a BytesValue")
        }
    })
    .await
}
