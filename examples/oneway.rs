//! Oneway calls wait in a durable queue. They can be sent while no server is running, and none is lost.

use hopline::{Client, Context, Error, Fault, Method, Server, Service};
use tokio::sync::mpsc;

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).or_else(|| std::env::var("HOPLINE_URL").ok());
    let url = url.unwrap_or_else(|| "memory://".to_owned());
    let client = Client::connect(&url).await?;
    let (lines, mut printed) = mpsc::unbounded_channel();

    // The first server of a service declares the queue. It stays when that server ends.
    serve(&url, &lines).await?.drain().await;
    for n in 1..=3 {
        client.oneway("oneway", "print", (format!("line {n}"),)).send().await?;
        println!("the broker has line {n}");
    }

    let server = serve(&url, &lines).await?;
    for _ in 1..=3 {
        println!("a server prints {}", printed.recv().await.ok_or("the server ended")?);
    }
    server.drain().await;
    Ok(())
}

async fn serve(url: &str, lines: &mpsc::UnboundedSender<String>) -> Result<hopline::Running, Error> {
    let lines = lines.clone();
    let print = move |_: Context, (line,): (String,)| {
        let printed = lines.send(line);
        async move { printed.map_err(|error| Fault::new(hopline::Code::Unavailable, error.to_string())) }
    };
    let service = Service::new("oneway", 1).method(Method::new("print").oneway(), print);
    Server::connect(url).await?.serve(service).start().await
}
