//! Asks every instance of `demo` who it is. If nobody serves it, the example starts three servers.
//!
//! ```sh
//! cargo run --example broadcast
//! ```

#[allow(dead_code, reason = "only one method of it is called")]
mod demo;

use std::time::Duration;

use demo::{DemoClient, DemoServer, Service};
use futures::StreamExt;
use hopline::{Client, Error, Server};

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = demo::url("memory://");
    let client = Client::connect(&url).await?;
    let demo = DemoClient::new(&client);

    let mut servers = Vec::new();
    let window = Duration::from_millis(500);
    let mut replies = match demo.whoami().all().gather(window).await {
        Err(Error::NoService { .. }) => Vec::new(),
        replies => replies?,
    };
    if replies.is_empty() {
        for _ in 0..3 {
            servers.push(Server::connect(&url).await?.serve(DemoServer::new(Service)).start().await?);
        }
        replies = demo.whoami().all().gather(window).await?;
    }
    println!("{} replies", replies.len());
    for reply in &replies {
        println!("instance {} says it is {}", reply.instance, reply.outcome.as_ref().map_err(ToString::to_string)?);
    }

    // The same as a stream. This takes the first reply; dropping the stream cancels the call on the others.
    let first = demo.whoami().all().replies(Duration::from_secs(1)).await?.next().await;
    println!("first: {}", first.ok_or("no instance answered")?.instance);

    for server in servers {
        server.drain().await;
    }
    Ok(())
}
