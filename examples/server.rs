//! A process that serves `demo` version 1 until SIGTERM or Ctrl-C, then drains.
//!
//! ```sh
//! cargo run --example server -- "$(scripts/broker up)"
//! ```

#[allow(dead_code, reason = "a client uses the other half of it")]
mod demo;

use std::process::ExitCode;

use demo::{DemoServer, Service};
use hopline::{Context, Error, Server, Subscription};
use tracing_subscriber::EnvFilter;

#[tokio::main]
async fn main() -> ExitCode {
    // lapin logs every returned message in full, and errors of connections that are closed on purpose. Hopline itself
    // logs those that matter.
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("warn,lapin=off"));
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).init();

    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("server: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), Error> {
    let running = serve(&demo::url("amqp://localhost")).await?;
    let instance = running.instance().to_owned();
    // Whoever reads that it is ready may send a signal at once.
    let ended = running.run_until_signal();
    println!("ready {instance}");
    ended.await;
    Ok(())
}

async fn serve(url: &str) -> Result<hopline::Running, Error> {
    // PREFETCH=1 shares slow calls evenly among several servers.
    let prefetch = std::env::var("PREFETCH").ok().and_then(|number| number.parse().ok()).unwrap_or(64);
    let mut server = Server::connect(url).await?.serve(DemoServer::new(Service).prefetch(prefetch));
    // GROUP=NAME handles the events `demo.*` as well, as an instance of this group.
    if let Ok(group) = std::env::var("GROUP") {
        let print = |ctx: Context, number: u64| async move { println!("event: {} {number}", ctx.method()) };
        server = server.subscribe(Subscription::to("demo.*").shared(group), print);
    }
    server.start().await
}
