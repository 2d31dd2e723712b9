//! A call that its caller gives up is ended on the server too.

use std::time::Duration;

use futures::StreamExt;
use hopline::Error;

use crate::stranger::overheard;
use crate::support::{Held, Scene, has_read, hold, later, soon};

#[tokio::test]
async fn dropping_a_call_cancels_its_handler() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let client = scene.client().await;
    let pending = hold(&client, 1).start().await.expect("on its way");
    let running = soon(arrived.recv()).await.expect("it runs");
    assert!(!running.context.is_cancelled());
    drop(pending);
    soon(running.context.cancelled()).await;
}

#[tokio::test]
async fn dropping_a_call_to_one_instance_cancels_it_there() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let server = scene.serve(service).await;
    let client = scene.client().await;
    let pending = hold(&client, 1).to(server.instance()).start().await.expect("on its way");
    let running = soon(arrived.recv()).await.expect("it runs");
    drop(pending);
    soon(running.context.cancelled()).await;
}

#[tokio::test]
async fn a_call_cancelled_while_it_waits_is_never_run() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let server = scene.serve(service.prefetch(1).concurrency(1)).await;
    let (client, transport) = (scene.client().await, scene.transport().await);
    let mut cancels = overheard(&transport, &format!("{}.rpc", scene.namespace), "held.v1@*").await;
    let first = hold(&client, 1).start().await.expect("on its way");
    let busy = soon(arrived.recv()).await.expect("it runs");
    let unwanted = hold(&client, 2).start().await.expect("on its way");
    scene.waiting(&transport, "held.v1.calls", 1).await;
    drop(unwanted);
    soon(cancels.next()).await.expect("a cancel");
    has_read(&client, "held", server.instance()).await;
    busy.release();
    first.await.expect("answered");
    let last = hold(&client, 3).start().await.expect("on its way");
    let next = soon(arrived.recv()).await.expect("it runs");
    assert_eq!(next.number, 3, "the cancelled call was run");
    next.release();
    last.await.expect("answered");
}

#[tokio::test]
async fn a_cancel_that_nobody_hears_reaches_the_server_that_comes_back() {
    let scene = Scene::new();
    soon(scene.serve(Held::new().service).await.drain()).await;
    let client = scene.client().await;
    drop(hold(&client, 1).timeout(Duration::from_secs(3600)).start().await.expect("it waits in the queue"));
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    // This call arrives before the cancel, or not at all.
    let pending = hold(&client, 2).start().await.expect("on its way");
    let mut next = soon(arrived.recv()).await.expect("it runs");
    if next.number == 1 {
        soon(next.context.cancelled()).await;
        next = soon(arrived.recv()).await.expect("it runs");
    }
    next.release();
    assert_eq!(pending.await.expect("answered"), 2);
}

#[tokio::test]
async fn dropping_a_broadcast_cancels_it_everywhere() {
    let scene = Scene::new();
    let (mut one, mut two) = (Held::new(), Held::new());
    let _one = scene.serve(one.service).await;
    let _two = scene.serve(two.service).await;
    let client = scene.client().await;
    let replies = hold(&client, 1).all().replies(Duration::from_secs(30)).await.expect("on its way");
    let first = soon(one.arrived.recv()).await.expect("it runs");
    let second = soon(two.arrived.recv()).await.expect("it runs");
    drop(replies);
    soon(first.context.cancelled()).await;
    soon(second.context.cancelled()).await;
}

#[tokio::test]
async fn a_broadcast_ends_with_its_deadline() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let client = scene.client().await;
    let time = Duration::from_secs(5);
    let mut replies = hold(&client, 1).timeout(Duration::from_secs(600)).all().replies(time).await.expect("on its way");
    let running = soon(arrived.recv()).await.expect("it runs");
    // The instance may still report that the time is over. Then the stream ends.
    let ends = async {
        while let Some(reply) = replies.next().await {
            assert!(matches!(reply.outcome, Err(Error::Fault(_))), "{reply:?}");
        }
    };
    later(time, ends).await;
    soon(running.context.cancelled()).await;
}
