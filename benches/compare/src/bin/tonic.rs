//! Unary gRPC with tonic, straight from client to server: what `tonic-build` generates, written by hand.

use std::convert::Infallible;
use std::future::ready;
use std::net::SocketAddr;

use anyhow::{Context, bail};
use bytes::Bytes;
use clap::Parser;
use hopline_compare::{Load, Role, Style};
use tonic::body::Body;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::codegen::{BoxFuture, Service, http};
use tonic::server::NamedService;
use tonic::transport::server::TcpIncoming;
use tonic::transport::{Channel, Server};
use tonic::{Request, Response, Status};
use tonic_prost::ProstCodec;

/// RPC with tonic.
#[derive(Parser)]
struct Command {
    #[command(subcommand)]
    role: Role,
}

/// The most calls that are with the server at once; further ones wait in the client. With some thousands the server
/// closes the connection, since too many of their streams end before all of them was read.
const STREAMS: usize = 1000;

/// `google.protobuf.BytesValue` both ways.
type EchoCodec = ProstCodec<Bytes, Bytes>;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Command::parse().role {
        Role::Serve { url } => serve(&url).await,
        Role::Call { url, style: Style::Call, load } => call(&url, load).await,
        Role::Call { style: Style::Oneway, .. } => bail!("gRPC has no durable queues: tonic has no --style oneway"),
    }
}

async fn serve(url: &str) -> anyhow::Result<()> {
    let address = url.strip_prefix("http://").with_context(|| format!("--url {url} does not begin with http://"))?;
    let address: SocketAddr = address.parse().with_context(|| format!("--url {url} is not http://IP:PORT"))?;
    // As `Server::serve` would do it, which does not tell when it listens.
    let incoming = TcpIncoming::bind(address)?.with_nodelay(Some(true));
    hopline_compare::announce()?;
    tokio::select! {
        ended = Server::builder().add_service(EchoService).serve_with_incoming(incoming) => Ok(ended?),
        stop = hopline_compare::told_to_stop() => stop,
    }
}

/// Serves `/compare.Echo/Echo`.
#[derive(Clone)]
struct EchoService;

impl NamedService for EchoService {
    const NAME: &'static str = "compare.Echo";
}

impl Service<http::Request<Body>> for EchoService {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut std::task::Context<'_>) -> std::task::Poll<Result<(), Infallible>> {
        std::task::Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(async move { Ok(tonic::server::Grpc::new(EchoCodec::default()).unary(Echo, request).await) })
    }
}

/// The one method.
struct Echo;

impl tonic::server::UnaryService<Bytes> for Echo {
    type Response = Bytes;
    type Future = std::future::Ready<Result<Response<Bytes>, Status>>;

    fn call(&mut self, request: Request<Bytes>) -> Self::Future {
        ready(Ok(Response::new(request.into_inner())))
    }
}

async fn call(url: &str, load: Load) -> anyhow::Result<()> {
    let channel = Channel::from_shared(url.to_owned())?.concurrency_limit(STREAMS).connect().await?;
    let client = tonic::client::Grpc::new(channel);
    hopline_compare::run(load, move |payload| {
        let mut client = client.clone();
        async move {
            client.ready().await?;
            let path = PathAndQuery::from_static("/compare.Echo/Echo");
            Ok(client.unary(Request::new(payload), path, EchoCodec::default()).await?.into_inner())
        }
    })
    .await
}
