//! A process that calls the `demo` service of another: start `server` first.
//!
//! ```sh
//! cargo run --example client -- "$(scripts/broker url)"
//! ```

#[allow(dead_code, reason = "a server uses the other half of it")]
mod demo;

use std::process::ExitCode;

use demo::{DemoClient, MathError};
use hopline::{CallError, Client};

#[tokio::main]
async fn main() -> ExitCode {
    match run().await {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("client: {error}");
            ExitCode::FAILURE
        }
    }
}

async fn run() -> Result<(), Box<dyn std::error::Error>> {
    let client = Client::connect(&demo::url("amqp://localhost")).await?;
    let demo = DemoClient::new(&client);

    println!("answered by {}", demo.whoami().await?);
    println!("fib(10) = {}", demo.fib(10).await?);
    println!("exp(2, 10) = {}", demo.exp(2, 10).await?.value);
    println!("add(2, 3) = {}", demo.add(2, 3).await?);
    println!("echo of {} bytes", demo.echo(vec![7; 1024]).await?.len());
    match demo.div(1, 0).await {
        Err(CallError::Service(MathError::DivisionByZero)) => println!("div(1, 0): division by zero"),
        other => return Err(format!("div(1, 0) gave {other:?}").into()),
    }
    demo.note("hello from a client".to_owned()).send().await?;

    client.close().await;
    Ok(())
}
