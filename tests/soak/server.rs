//! The process that serves. It records each run before it does anything, and drains when it is told to end.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use hopline::{Context, Error, Fault, Server, Service};
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
            let started = async { Server::connect(url).await?.serve(service(&records, queues)).start().await };
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

fn service(records: &Arc<Records>, queues: Queues) -> Service {
    let mut service = Service::new(SERVICE, 1);
    if queues == Queues::Quorum {
        service = service.quorum();
    }
    for method in Method::ALL {
        let described = hopline::Method::new(method.name());
        let described = match method {
            Method::Count => described,
            Method::Note => described.oneway(),
            Method::CountIdempotent => described.idempotent(),
            Method::NoteOnce => described.oneway().dedup(MEMORY),
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
