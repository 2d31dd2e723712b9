//! Whether a server takes calls, as a probe sees it.

use hopline::{Readiness, Server, ServerHealth, Service, State};

use crate::support::{Held, Scene, hold, soon};

/// Waits until the health is as it should be.
async fn until(health: &ServerHealth, state: &mut tokio::sync::watch::Receiver<State>, is_so: fn(&Readiness) -> bool) {
    soon(async {
        while !is_so(&health.now()) {
            state.changed().await.expect("the server is there");
        }
    })
    .await;
}

#[tokio::test]
async fn a_server_is_away_without_its_broker_and_comes_back_by_itself() {
    let (scene, broker) = Scene::alone();
    let Held { service, arrived: _arrived } = Held::new();
    let server = scene.serve(service).await;
    let (health, mut state) = (server.health(), server.state());
    assert_eq!((health.now(), health.now().to_string().as_str()), (Readiness::Ready, "ready"));
    broker.alarm("low on memory");
    until(&health, &mut state, |now| !now.is_ready()).await;
    assert_eq!(health.now().to_string(), "away: the broker accepts no messages: low on memory");
    broker.restore();
    until(&health, &mut state, Readiness::is_ready).await;
    broker.take_down();
    until(&health, &mut state, |now| !now.is_ready()).await;
    assert!(health.now().reason().is_some_and(|reason| !reason.is_empty()), "{health:?}");
    broker.restore();
    until(&health, &mut state, |now| *now == Readiness::Ready).await;
}

#[tokio::test]
async fn a_server_that_waits_for_its_broker_is_away() {
    let (scene, broker) = Scene::alone();
    broker.take_down();
    let server = Server::builder().namespace(&scene.namespace).connect_lazy(&scene.url).expect("a good address");
    let server = server.serve(Service::new("later", 1)).start().await.expect("it waits");
    let (health, mut state) = (server.health(), server.state());
    assert!(matches!(health.now(), Readiness::Away { .. }), "{health:?}");
    broker.restore();
    until(&health, &mut state, Readiness::is_ready).await;
}

#[tokio::test]
async fn a_server_that_drains_says_so_until_it_has_ended() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let server = scene.serve(service).await;
    let client = scene.client().await;
    let pending = hold(&client, 1).start().await.expect("on its way");
    let call = soon(arrived.recv()).await.expect("it runs");
    let health = server.health();
    let draining = tokio::spawn(server.drain());
    soon(async {
        while health.now() != Readiness::Draining {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(!health.now().is_ready());
    call.release();
    pending.await.expect("it is answered");
    soon(draining).await.expect("no panic");
    assert_eq!(health.now(), Readiness::Closed);
}
