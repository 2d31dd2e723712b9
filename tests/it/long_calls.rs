//! Calls that take longer than a second send signs of life. So a caller that gives up knows where to send the cancel,
//! and a dead worker is noticed.

use std::time::Duration;

use hopline::transport::{Consumer, Mode, Properties, Publication, Transport};
use hopline::{Client, Code, Codec, Method};
use tokio::time::Instant;
use uuid::Uuid;

use crate::stranger::{KEEP_ALIVE, overheard};
use crate::support::{Held, Scene, code, frame, hold, soon};

const CANCEL: u8 = 7;
/// How long an instance that runs a call may be silent.
const SILENCE: Duration = Duration::from_secs(15);

/// Waits until the client has received something since `before`.
async fn heard(client: &Client, before: u64) {
    let mut look = tokio::time::interval(Duration::from_millis(10));
    while client.traffic().messages_received == before {
        look.tick().await;
    }
}

#[tokio::test]
async fn a_call_that_has_reported_in_is_cancelled_where_it_runs() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _one = scene.serve(service).await;
    let Held { service, arrived: mut elsewhere } = Held::new();
    let _other = scene.serve(service).await;
    let client = scene.client().await;
    let pending = hold(&client, 1).start().await.expect("on its way");
    let running = soon(async {
        tokio::select! {
            running = arrived.recv() => running,
            running = elsewhere.recv() => running,
        }
    });
    let running = running.await.expect("it runs");
    let transport = scene.transport().await;
    let key = format!("held.v1@{}", running.context.instance());
    let mut to_it = overheard(&transport, &format!("{}.rpc", scene.namespace), &key).await;
    soon(heard(&client, 0)).await;
    drop(pending);
    let cancel = soon(to_it.next()).await.expect("a cancel");
    assert_eq!((cancel.body[4], &cancel.body[8..24]), (CANCEL, &running.context.request_id().as_bytes()[..]));
    soon(running.context.cancelled()).await;
}

/// An instance that accepts a call, says that it runs it, and is silent from then on.
async fn takes_and_reports(scene: &Scene, transport: &Transport, calls: &mut Consumer) -> Uuid {
    let call = soon(calls.next()).await.expect("a call");
    let id = Uuid::from_slice(&call.body[8..24]).expect("16 bytes");
    let publication = Publication {
        exchange: String::new(),
        key: call.properties.reply_to.clone().expect("somebody waits"),
        mandatory: true,
        properties: Properties::default(),
        body: frame(KEEP_ALIVE, Codec::Raw, id, &scene.namespace[..3], &[]).into(),
    };
    transport.publish(publication).await.expect("published");
    // It is dropped without being settled, so the broker does not deliver it again.
    drop(call);
    id
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_stops_reporting_in_ends_a_call_long_before_its_deadline() {
    let scene = Scene::in_memory();
    let served = scene.serve(Held::new().service.prefetch(1)).await;
    let (transport, client) = (scene.transport().await, scene.client().await);
    let queue = format!("{}.held.v1.calls", scene.namespace);
    let mut calls = transport.consume(&queue, Mode::Settle { prefetch: 1 }).await.expect("it is there");
    served.drain().await;
    let pending = hold(&client, 1).timeout(Duration::from_secs(3600)).start().await.expect("on its way");
    takes_and_reports(&scene, &transport, &mut calls).await;
    let since = Instant::now();
    assert_eq!(code(pending.await), Code::Aborted);
    assert!((SILENCE..SILENCE * 2).contains(&since.elapsed()), "{:?}", since.elapsed());
}

#[tokio::test(start_paused = true)]
async fn a_call_that_may_run_twice_is_sent_again_when_its_instance_stops_reporting_in() {
    let scene = Scene::in_memory();
    let Held { service, mut arrived } = Held::of(Method::new("hold").idempotent());
    let served = scene.serve(Held::of(Method::new("hold").idempotent()).service).await;
    let (transport, client) = (scene.transport().await, scene.client().await);
    let queue = format!("{}.held.v1.calls", scene.namespace);
    let mut calls = transport.consume(&queue, Mode::Settle { prefetch: 1 }).await.expect("it is there");
    served.drain().await;
    let call = hold(&client, 7).timeout(Duration::from_secs(3600)).idempotent();
    let pending = call.start().await.expect("on its way");
    let id = takes_and_reports(&scene, &transport, &mut calls).await;
    let _alive = scene.serve(service).await;
    let again = arrived.recv().await.expect("it runs");
    assert_eq!((again.number, again.context.request_id()), (7, id));
    assert!(again.context.remaining().is_some_and(|left| left < Duration::from_secs(3600) - SILENCE));
    again.release();
    assert_eq!(pending.await.expect("answered"), 7);
}

#[tokio::test(start_paused = true)]
async fn an_instance_that_reports_in_is_waited_for() {
    let scene = Scene::in_memory();
    let Held { service, mut arrived } = Held::new();
    let _served = scene.serve(service).await;
    let client = scene.client().await;
    let pending = hold(&client, 1).timeout(Duration::from_secs(3600)).start().await.expect("on its way");
    let running = arrived.recv().await.expect("it runs");
    // The time is virtual. It is many times as long as an instance may be silent.
    tokio::time::sleep(SILENCE * 20).await;
    running.release();
    assert_eq!(pending.await.expect("answered"), 1);
}
