//! What each policy costs a call that it has nothing to do for: many calls at once, with it and without, in turn.
//!
//! `cargo bench -p hopline-benches --bench policies` prints how many nanoseconds more a call takes, client, server and the
//! broker in this process together, on one thread. With `--url amqp://localhost` it calls over a RabbitMQ.

use std::env;
use std::time::{Duration, Instant};

use futures::future::try_join_all;
use hopline::{
    Adaptive, Client, ClientBuilder, Context, Error, FairShare, Fault, Method, Quarantine, RateLimit, Running, Server,
    Service, Shedding,
};

/// That of `hopline bench`, which no real service uses.
const NAMESPACE: &str = "hopline-bench";
const AT_ONCE: i64 = 64;
/// How many rounds there are. Each measures everything.
const ROUNDS: usize = 41;
/// How many times `AT_ONCE` calls are made in a round, over all of which a middle is taken.
const TIMES: i64 = 100;
/// A rate that is never reached.
const HUGE: u32 = 1_000_000_000;

const USAGE: &str = "usage: cargo bench -p hopline-benches --bench policies [-- --url URL]";

/// A policy, and who calls with it.
struct Policy {
    name: &'static str,
    client: Client,
    service: String,
    /// The argument of a call with this number.
    argument: fn(i64) -> i64,
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let Some(url) = told(env::args().skip(1)) else { return Err(USAGE.into()) };
    let (server, policies) = (serve(&url).await?, policies(&url).await?);
    let mut more = vec![Vec::new(); policies.len()];
    let mut plain = Vec::new();
    for round in 0..=ROUNDS {
        let mut times = vec![Duration::ZERO; policies.len()];
        for turn in 0..policies.len() {
            // Each is first as often as any other.
            let at = (turn + round) % policies.len();
            times[at] = policies[at].takes(round).await?;
        }
        // The first round warms up.
        if round == 0 {
            continue;
        }
        plain.push(times[0].as_nanos() as f64);
        for (more, time) in more.iter_mut().zip(&times) {
            more.push(time.as_nanos() as f64 - times[0].as_nanos() as f64);
        }
    }
    let refused = refused(&url).await?;
    println!("A call with no policy takes {:.0} ns, {AT_ONCE} at once.", middle(&mut plain));
    println!("| policy | ns more a call |\n| --- | ---: |");
    for (policy, more) in policies.iter().zip(&mut more).skip(1) {
        println!("| {} | {:.0} |", policy.name, middle(more));
    }
    println!(
        "A call that an open breaker refuses takes {:.1?}; of 10 000, 99 % take {:.1?} at most.",
        refused[0], refused[1]
    );
    for policy in &policies {
        policy.client.close().await;
    }
    server.drain().await;
    Ok(())
}

fn told(mut arguments: impl Iterator<Item = String>) -> Option<String> {
    let mut url = "memory://".to_owned();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            // Cargo's own.
            "--bench" => {}
            "--url" => url = arguments.next()?,
            _ => return None,
        }
    }
    Some(url)
}

fn middle(numbers: &mut [f64]) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers[numbers.len() / 2]
}

impl Policy {
    /// How long a call takes, of very many.
    async fn takes(&self, round: usize) -> Result<Duration, Error> {
        let since = Instant::now();
        for time in 0..TIMES {
            let first = (i64::try_from(round).unwrap_or_default() * TIMES + time) * AT_ONCE;
            let calls = (first..first + AT_ONCE)
                .map(|number| self.client.call::<i64>(&self.service, "next", ((self.argument)(number),)).idempotent());
            try_join_all(calls.map(IntoFuture::into_future)).await?;
        }
        Ok(since.elapsed().div_f64((TIMES * AT_ONCE) as f64))
    }
}

/// How long calls take that an open breaker refuses: half of them at most, and 99 %.
async fn refused(url: &str) -> Result<[Duration; 2], Box<dyn std::error::Error>> {
    let client = Client::builder().namespace(NAMESPACE).breaker().connect(url).await?;
    client.open_breaker("plain.v1", "next", Duration::from_secs(3_600))?;
    let mut times = Vec::new();
    for number in 0..10_000_i64 {
        let since = Instant::now();
        let outcome = client.call::<i64>("plain.v1", "next", (number,)).await;
        times.push(since.elapsed());
        if !matches!(outcome, Err(Error::CircuitOpen { .. })) {
            return Err(format!("the breaker lets a call through: {outcome:?}").into());
        }
    }
    times.sort();
    client.close().await;
    Ok([times[times.len() / 2], times[times.len() * 99 / 100]])
}

/// Each service has one policy, or none.
async fn serve(url: &str) -> Result<Running, Error> {
    let plain = |name: &str| {
        let next = |_: Context, (number,): (i64,)| async move { Ok::<_, Fault>(number.wrapping_add(1)) };
        Service::new(name, 1).method(Method::new("next").idempotent(), next)
    };
    let server = Server::builder().namespace(NAMESPACE).connect(url).await?;
    let server = server.serve(plain("plain"));
    let server = server.serve(plain("rate").with(RateLimit::per_user(f64::from(HUGE)).burst(HUGE)));
    let server = server.serve(plain("share").with(FairShare::by_caller(1_000)));
    let server = server.serve(plain("shedding").with(Shedding::default()));
    let server = server.serve(plain("adaptive").with(Adaptive::between(1_000, 2_000).start(1_000)));
    let server = server.serve(plain("quarantine").with(Quarantine::default()));
    server.start().await
}

async fn policies(url: &str) -> Result<Vec<Policy>, Error> {
    let of_client = |name, client: ClientBuilder| (name, "plain.v1", client);
    let of_server = |name, service| (name, service, Client::builder());
    let all = [
        of_client("none", Client::builder()),
        of_client("none, measured again", Client::builder()),
        of_client("`retry`", Client::builder().retry(2)),
        of_client("`breaker`", Client::builder().breaker()),
        of_client("`hedge`", Client::builder().hedge()),
        of_client("`rate`", Client::builder().rate("plain", HUGE)),
        of_client("`cache`, a miss", Client::builder().cache(Duration::from_secs(3_600))),
        of_client("`cache`, a hit", Client::builder().cache(Duration::from_secs(3_600))),
        of_client("`retry`, `breaker` and `hedge`", Client::builder().retry(2).breaker().hedge()),
        of_client("`rules`, none of them set", Client::builder().rules()),
        of_server("`RateLimit`", "rate.v1"),
        of_server("`FairShare`", "share.v1"),
        of_server("`Shedding`", "shedding.v1"),
        of_server("`Adaptive`", "adaptive.v1"),
        of_server("`Quarantine`", "quarantine.v1"),
    ];
    let mut policies = Vec::new();
    for (name, service, client) in all {
        let client = client.namespace(NAMESPACE).connect(url).await?;
        // From the first reply on, the client knows that these calls are quick, and may share a message.
        client.call::<i64>(service, "next", (-1,)).await?;
        let argument = if name.ends_with("hit") { |_| 7 } else { |number| number };
        policies.push(Policy { name, client, service: service.to_owned(), argument });
    }
    Ok(policies)
}
