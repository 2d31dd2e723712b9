//! `hopline bench serve`: serves the calls of a benchmark.

use std::future::Future;
use std::pin::pin;
use std::time::{Duration, Instant};

use clap::Args;
use hopline::{Context, Error, Fault, Method, Running, Service};
use serde_bytes::ByteBuf;
use tokio::task::JoinSet;

use super::{Broker, instances, methods, process};
use crate::failed::Failed;
use crate::printed::{json, print};
use crate::signals;

/// The name of the service, as callers write it.
pub(super) const SERVICE: &str = "bench.v1";
/// The oneway method.
pub(super) const NOTE: &str = "note";
/// What `hopline bench serve` prints when all methods can be called.
pub(super) const READY: &str = "serving";
/// Tokio's timers count in milliseconds. A shorter time is spent in a busy loop.
const SHORTEST_SLEEP: Duration = Duration::from_millis(1);

/// Serve what `hopline bench call` calls, until Ctrl-C or SIGTERM.
///
/// The service is `bench.v1`: `echo` returns the bytes that it gets, and the oneway method `note` ignores them. Prints
/// `serving` when both can be called. Exits with 0 after it was told to end, with 1 and a one-line error on stderr when
/// it cannot serve, and with 2 on wrong usage.
#[derive(Args)]
#[command(
    after_help = "Examples:\n  hopline bench serve --url amqp://localhost\n  hopline bench serve --instances 4 --work-us 2000"
)]
pub(crate) struct Serve {
    #[command(flatten)]
    broker: Broker,
    #[command(flatten)]
    offer: Offer,
    /// End with the process that holds the other end of the standard input
    #[arg(long, hide = true)]
    until_input_ends: bool,
}

/// The options of the server side.
#[derive(Args)]
pub(super) struct Offer {
    /// How many servers share the calls, each with connections of its own
    #[arg(long, default_value = "1", value_parser = instances)]
    pub(super) instances: usize,
    /// How long a call takes to handle, in microseconds: busy below 1000, asleep from there
    #[arg(long, default_value_t = 0)]
    pub(super) work_us: u32,
    /// How many methods echo: `echo`, `echo1`, `echo2` and so on
    #[arg(long, default_value = "1", value_parser = methods)]
    pub(super) methods: usize,
    /// Have calls wait in a quorum queue, as `Service::quorum` does
    #[arg(long)]
    pub(super) quorum: bool,
}

impl Serve {
    pub(super) async fn run(self) -> Result<(), Failed> {
        let Self { broker, offer, until_input_ends } = self;
        if broker.address.in_memory() {
            return Err(Failed::usage(
                "nobody else could call what is served at `memory://`, which ends with this process: `hopline bench \
                 call` serves for itself there"
                    .to_owned(),
            ));
        }
        let signal = signals::told_to_end().map_err(|error| Failed::at("cannot hear of signals", error))?;
        let end = async {
            tokio::select! {
                () = signal => {}
                () = process::input_ended(), if until_input_ends => {}
            }
        };
        serve(&broker, &offer, end).await
    }
}

async fn serve(broker: &Broker, offer: &Offer, end: impl Future<Output = ()>) -> Result<(), Failed> {
    let mut end = pin!(end);
    let serving = tokio::select! {
        serving = Serving::start(broker, offer) => serving?,
        () = &mut end => return Ok(()),
    };
    print(&if broker.json { json(&serde_json::json!({ READY: SERVICE })) } else { READY.to_owned() })?;
    end.await;
    serving.drain().await;
    Ok(())
}

/// Running servers. They end at once when this is dropped.
pub(super) struct Serving(Vec<Running>);

impl Serving {
    /// Starts the servers. All methods can be called when this returns.
    pub(super) async fn start(broker: &Broker, offer: &Offer) -> Result<Self, Error> {
        let mut servers = Vec::with_capacity(offer.instances);
        for _ in 0..offer.instances {
            let server = broker.server().await?;
            servers.push(server.serve(service(offer)).start().await?);
        }
        Ok(Self(servers))
    }

    pub(super) async fn drain(self) {
        let draining: JoinSet<()> = self.0.into_iter().map(Running::drain).collect();
        draining.join_all().await;
    }
}

/// The name of the echo method with this number.
pub(super) fn echo(number: usize) -> String {
    if number == 0 { "echo".to_owned() } else { format!("echo{number}") }
}

fn service(offer: &Offer) -> Service {
    let work = Duration::from_micros(offer.work_us.into());
    // A caller should notice soon that the last server has gone, and not wait for the next benchmark.
    let mut service = Service::new("bench", 1).grace(Duration::from_secs(1));
    for number in 0..offer.methods {
        let method = Method::new(echo(number)).signature(format!("{}(payload: bytes) -> bytes", echo(number)));
        service = service.method(method, move |_: Context, (payload,): (ByteBuf,)| async move {
            take(work).await;
            Ok::<_, Fault>(payload)
        });
    }
    if offer.quorum {
        service = service.quorum();
    }
    let note = Method::new(NOTE).oneway().signature("note(payload: bytes)");
    service.method(note, |_: Context, (_,): (ByteBuf,)| async { Ok::<(), Fault>(()) })
}

async fn take(work: Duration) {
    if work >= SHORTEST_SLEEP {
        return tokio::time::sleep(work).await;
    }
    let began = Instant::now();
    while began.elapsed() < work {
        std::hint::spin_loop();
    }
}
