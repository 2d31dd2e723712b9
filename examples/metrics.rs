//! Metrics for Prometheus: a server and a client, what they have counted, and where Prometheus reads it.
//!
//! With the address of a broker it goes on until Ctrl-C if `STAY` is set: `curl http://127.0.0.1:9464/metrics`.

use hopline::metrics::Metrics;
use hopline::{CallError, Client, Server};
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize)]
enum StockError {
    SoldOut,
}

#[hopline::service(name = "stock")]
trait Stock {
    async fn take(&self, item: u32) -> Result<u32, StockError>;
    #[rpc(oneway)]
    async fn refill(&self, item: u32);
}

struct Shelf;

impl Stock for Shelf {
    async fn take(&self, item: u32) -> Result<u32, StockError> {
        if item == 3 { Err(StockError::SoldOut) } else { Ok(item) }
    }

    async fn refill(&self, _item: u32) {}
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).or_else(|| std::env::var("HOPLINE_URL").ok());
    let url = url.unwrap_or_else(|| "memory://".to_owned());
    let server = Server::connect(&url).await?.serve(StockServer::new(Shelf)).start().await?;
    let client = Client::connect(&url).await?;

    let metrics = Metrics::new().server(&server).client(&client);
    let stays = std::env::var_os("STAY").is_some();
    // Port 0 is any free one, so that this runs beside anything.
    let endpoint = metrics.serve(if stays { "9464" } else { "0" }).await?;

    let stock = StockClient::new(&client);
    for item in 1..=3 {
        match stock.take(item).await {
            Ok(_) | Err(CallError::Service(StockError::SoldOut)) => {}
            Err(CallError::Failed(error)) => return Err(error.into()),
        }
    }
    stock.refill(3).send().await?;

    println!("served on this machine: {}", endpoint.address().ip().is_loopback());
    for line in metrics.render().lines().filter(|line| line.starts_with("rpc_client_call_duration_seconds_count")) {
        println!("{line}");
    }
    if stays {
        println!("http://{}/metrics", endpoint.address());
        server.run_until_signal().await;
    } else {
        server.drain().await;
    }
    endpoint.close().await;
    Ok(())
}
