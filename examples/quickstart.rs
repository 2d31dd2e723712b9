//! The whole of Hopline in one process: a typed service, called in every style.
//!
//! ```sh
//! cargo run --example quickstart
//! ```

use std::time::{Duration, Instant};

use hopline::{Client, Context, Server};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

#[derive(Debug, Serialize, Deserialize)]
struct ExpReply {
    value: i64,
    cost_nanos: u64,
}

#[hopline::service(name = "quickstart")]
trait Math {
    /// Fibonacci numbers, where fib(0) = fib(1) = 1.
    async fn fib(&self, n: u32) -> u64;
    async fn exp(&self, base: i64, exp: u32) -> ExpReply;
    async fn whoami(&self, ctx: &Context) -> String;
    #[rpc(oneway)]
    async fn log(&self, line: String);
}

struct MyMath;

impl Math for MyMath {
    async fn fib(&self, n: u32) -> u64 {
        (0..n).fold((1, 1), |(this, next), _| (next, this + next)).0
    }

    async fn exp(&self, base: i64, exp: u32) -> ExpReply {
        let started = Instant::now();
        let value = base.pow(exp);
        ExpReply { value, cost_nanos: started.elapsed().as_nanos() as u64 }
    }

    async fn whoami(&self, ctx: &Context) -> String {
        ctx.instance().to_owned()
    }

    async fn log(&self, line: String) {
        println!("the server logs: {line}");
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let url = std::env::args().nth(1).or_else(|| std::env::var("HOPLINE_URL").ok());
    let url = url.unwrap_or_else(|| "memory://".to_owned());

    // Two instances of the service; they share its calls.
    let one = Server::connect(&url).await?.serve(MathServer::new(MyMath)).start().await?;
    let two = Server::connect(&url).await?.serve(MathServer::new(MyMath)).start().await?;

    let client = Client::connect(&url).await?;
    let math = MathClient::new(&client);

    for n in 0..20 {
        println!("fib({n}) = {}", math.fib(n).await?);
    }
    for n in 0..20 {
        let ExpReply { value, cost_nanos } = math.exp(2, n).await?;
        println!("exp2({n}) = {value} cost={cost_nanos}ns");
    }

    // Wait for the result here.
    println!("sync: fib(30) = {}", math.fib(30).await?);

    // Send the call now, and collect the result later.
    let pending = math.fib(40).start().await?;
    println!("future: fib(40) = {}", pending.await?);

    // Pass the outcome to a function.
    let (done, called_back) = oneshot::channel();
    math.fib(50).then(|outcome| {
        println!("callback: fib(50) = {outcome:?}");
        let _ = done.send(());
    });
    called_back.await?;

    // A oneway call: this returns when the broker has confirmed it. Some instance runs it later.
    math.log("a oneway call".to_owned()).send().await?;

    // Broadcast: every instance answers.
    let replies = math.whoami().all().gather(Duration::from_millis(500)).await?;
    println!("broadcast: {} instances answered", replies.len());
    for reply in replies {
        println!("  instance {} says {:?}", reply.instance, reply.outcome);
    }

    // Draining finishes running calls and requeues the others. The oneway call has run, or the next server runs it.
    one.drain().await;
    two.drain().await;
    client.close().await;
    Ok(())
}
