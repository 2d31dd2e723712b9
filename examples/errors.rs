//! What can go wrong with a call, and which error the caller gets.

use std::time::Duration;

use hopline::{CallError, Client, Error, Server};
use serde::{Deserialize, Serialize};

#[derive(Debug, Serialize, Deserialize)]
enum AccountError {
    Overdrawn { missing_cents: u64 },
}

#[hopline::service(name = "errors")]
trait Account {
    async fn withdraw(&self, cents: u64) -> Result<u64, AccountError>;
    async fn crash(&self);
    async fn never(&self);
}

struct Savings;

impl Account for Savings {
    async fn withdraw(&self, cents: u64) -> Result<u64, AccountError> {
        100_u64.checked_sub(cents).ok_or(AccountError::Overdrawn { missing_cents: cents - 100 })
    }

    async fn crash(&self) {
        panic!("a bug");
    }

    async fn never(&self) {
        std::future::pending().await
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).or_else(|| std::env::var("HOPLINE_URL").ok());
    let url = url.unwrap_or_else(|| "memory://".to_owned());
    let server = Server::connect(&url).await?.serve(AccountServer::new(Savings)).start().await?;
    let client = Client::connect(&url).await?;
    let account = AccountClient::new(&client);

    // The method's own error, as its own type.
    match account.withdraw(150).await {
        Err(CallError::Service(AccountError::Overdrawn { missing_cents })) => {
            println!("overdrawn by {missing_cents} cents")
        }
        other => println!("{other:?}"),
    }
    // Every other error prints as a sentence that says what to do.
    tell("a panic", account.crash().await);
    tell("a deadline", account.never().timeout(Duration::from_millis(100)).await);
    tell("a method that is not there", client.call::<()>("errors", "withdrew", (1,)).await);
    tell("arguments that do not fit", client.call::<u64>("errors", "withdraw", ("much",)).await);
    tell("a service that is not there", client.call::<()>("nobody", "home", ()).await);
    tell("a name that cannot be", client.call::<()>("no body", "home", ()).await);
    tell("too much", client.call::<()>("errors", "withdraw", ("x".repeat(20_000_000),)).await);

    server.drain().await;
    Ok(())
}

fn tell<T: std::fmt::Debug>(what: &str, outcome: Result<T, Error>) {
    match outcome {
        Ok(value) => println!("{what}: {value:?}"),
        Err(error) => println!("{what}: {error}"),
    }
}
