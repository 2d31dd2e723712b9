//! Rules: settings of calls that are changed while clients run.
//!
//! With `follow` behind the address it tells what it heeds until it is stopped: try `hopline rules set demo.add timeout=2s`.

use std::error::Error;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use hopline::Client;

#[tokio::main]
async fn main() -> Result<(), Box<dyn Error>> {
    let url = std::env::args().nth(1).or_else(|| std::env::var("HOPLINE_URL").ok());
    let url = url.unwrap_or_else(|| "memory://".to_owned());
    let client = Client::builder().rules().connect(&url).await?;
    let mut heeded = client.rules().heeded();
    if std::env::args().nth(2).as_deref() == Some("follow") {
        loop {
            let now = client.rules().heeded();
            if now != heeded {
                let at = SystemTime::now().duration_since(UNIX_EPOCH)?.as_millis();
                let set = now.iter().map(|set| format!("{}: {}", set.target, set.rule)).collect::<Vec<_>>();
                println!("{at} {set:?}");
                heeded = now;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    client.rules().set("example-of-rules.order", &"timeout=2s breaker=open".parse()?).await?;
    // A running client hears of it at once.
    while client.rules().heeded() == heeded {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let refused = client.call::<u64>("example-of-rules", "order", ("pen",)).await;
    println!("with the rule: {}", refused.expect_err("no call passes"));
    client.rules().unset("example-of-rules.order", &[]).await?;
    while client.rules().heeded() != heeded {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let nobody = client.call::<u64>("example-of-rules", "order", ("pen",)).await;
    println!("without it: {}", nobody.expect_err("nobody serves it"));
    Ok(())
}
