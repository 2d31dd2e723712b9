//! The process that serves. It records each run before it does anything, and drains when it is told to end.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use hopline::{Context, Error, Fault, Replay, Server, Service, Subscription};
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::sleep;

use crate::record::{Id, Method, Records, answer};
use crate::{Queues, SERVICE, say};

/// The pause after an attempt to connect that failed.
const PAUSE: Duration = Duration::from_millis(200);
/// How long a server remembers what it has run. The broker delivers every message again in less time.
const MEMORY: Duration = Duration::from_secs(600);

pub(crate) async fn run(number: u32, url: &str, queues: Queues, folder: &Path) {
    let records = Arc::new(Records::create(&folder.join(format!("server-{number}.records"))));
    end_with_input();
    let mut terminated = signal(SignalKind::terminate()).expect("signals can be handled");
    let serving = async {
        loop {
            let started = async {
                let server = Server::connect(url).await?.serve(service(&records, queues));
                // What reads a stream is in the order of its publisher.
                let replayed = Subscription::to("soak.replay").shared("replayed").from(Replay::Start);
                let replayed = replayed.ordered_by(|(client, ..): &Event| *client).concurrency(16);
                let server =
                    server.subscribe(Subscription::to("soak.group").shared("soak"), heard(&records, Method::Group));
                server.subscribe(replayed, heard(&records, Method::Replay)).start().await
            };
            match started.await {
                Ok(running) => return running,
                Err(error @ (Error::Invalid(_) | Error::Mismatch { .. })) => panic!("{error}"),
                Err(_) => sleep(PAUSE).await,
            }
        }
    };
    let running = tokio::select! {
        running = serving => running,
        _ = terminated.recv() => return,
    };
    say("ready");
    terminated.recv().await;
    running.drain().await;
}

/// The client, its number for the event, and how long the handler takes, in milliseconds.
type Event = (u32, u32, u64);

/// The handler of an event.
fn heard(records: &Arc<Records>, method: Method) -> impl Fn(Context, Event) -> BoxFuture<'static, ()> + use<> {
    let records = records.clone();
    move |context: Context, (client, sequence, millis): Event| {
        records.run(method, (client, sequence), context.redelivered());
        // Events in order wait for each other.
        let millis = if method == Method::Replay { millis.min(5) } else { millis };
        Box::pin(sleep(Duration::from_millis(millis)))
    }
}

fn service(records: &Arc<Records>, queues: Queues) -> Service {
    let mut service = Service::new(SERVICE, 1);
    if queues == Queues::Quorum {
        service = service.quorum();
    }
    for method in Method::ALL.into_iter().filter(|method| method.key().is_none()) {
        let described = hopline::Method::new(method.name());
        let described = match method {
            Method::Count => described,
            Method::Note => described.oneway(),
            Method::CountIdempotent => described.idempotent(),
            Method::NoteOnce => described.oneway().dedup(MEMORY),
            Method::Group | Method::Replay => unreachable!("these are events"),
        };
        let records = records.clone();
        service = service.method(described, move |context: Context, (client, sequence, millis): (u32, u32, u64)| {
            let id: Id = (client, sequence);
            records.run(method, id, context.redelivered());
            async move {
                sleep(Duration::from_millis(millis)).await;
                Ok::<u64, Fault>(answer(id))
            }
        });
    }
    service
}

/// Ends this process when its input is closed, since nobody controls it any more.
fn end_with_input() {
    std::thread::spawn(|| {
        // An error means that the input is closed as well.
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        std::process::exit(1);
    });
}
