//! RPC with tarpc straight from client to server, over TCP: its own serde transport, with bincode.

use std::net::SocketAddr;

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Parser;
use futures::StreamExt;
use hopline_compare::{Load, Role, Style};
use tarpc::serde_transport::tcp;
use tarpc::server::{BaseChannel, Channel};
use tarpc::tokio_serde::formats::Bincode;
use tarpc::{client, context};

/// RPC with tarpc.
#[derive(Parser)]
struct Command {
    #[command(subcommand)]
    role: Role,
}

/// The service.
#[tarpc::service]
trait Echo {
    /// Sends the payload back. A `Vec<u8>` would be written byte by byte.
    async fn echo(payload: Bytes) -> Bytes;
}

/// Its server.
#[derive(Clone)]
struct EchoServer;

impl Echo for EchoServer {
    async fn echo(self, _: context::Context, payload: Bytes) -> Bytes {
        payload
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Command::parse().role {
        Role::Serve { url } => serve(address(&url)?).await,
        Role::Call { url, style: Style::Call, load } => call(address(&url)?, load).await,
        Role::Call { style: Style::Oneway, .. } => bail!("tarpc has no durable queues, and no --style oneway"),
    }
}

fn address(url: &str) -> anyhow::Result<SocketAddr> {
    let address = url.strip_prefix("tcp://").with_context(|| format!("--url {url} does not begin with tcp://"))?;
    address.parse().with_context(|| format!("--url {url} is not tcp://IP:PORT"))
}

async fn serve(address: SocketAddr) -> anyhow::Result<()> {
    let mut incoming = tcp::listen(address, Bincode::default).await?;
    tokio::spawn(async move {
        while let Some(Ok(transport)) = incoming.next().await {
            // As gRPC has it: tarpc leaves the choice to its user.
            if let Err(error) = transport.get_ref().set_nodelay(true) {
                eprintln!("tarpc: a connection keeps its delay: {error}");
            }
            let calls = BaseChannel::with_defaults(transport).execute(EchoServer.serve());
            tokio::spawn(calls.for_each(async |call| drop(tokio::spawn(call))));
        }
    });
    hopline_compare::announce()?;
    hopline_compare::told_to_stop().await
}

async fn call(address: SocketAddr, load: Load) -> anyhow::Result<()> {
    let transport = tcp::connect(address, Bincode::default).await?;
    transport.get_ref().set_nodelay(true)?;
    let client = EchoClient::new(client::Config::default(), transport).spawn();
    hopline_compare::run(load, move |payload| {
        let client = client.clone();
        async move { Ok(client.echo(context::current(), payload).await?) }
    })
    .await
}
