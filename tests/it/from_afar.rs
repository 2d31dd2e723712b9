//! A server is drained from afar by those whom it allows to, and by nobody else.

use std::future::pending;

use hopline::testing;
use hopline::{Client, Code, Error, Readiness, Server};

use crate::stranger::Stranger;
use crate::support::{Calculator, Held, MathServer, Scene, hold, soon};

/// The fault that a question was answered with.
#[track_caller]
fn refused(outcome: Result<(), Error>) -> (Code, String) {
    match outcome {
        Err(Error::Fault(fault)) => (fault.code, fault.message),
        other => panic!("it is not refused: {other:?}"),
    }
}

#[tokio::test]
async fn nobody_drains_a_server_that_has_not_said_who_may() {
    let scene = Scene::new();
    let server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let (code, why) = refused(soon(client.registry().drain("math", server.instance())).await);
    assert_eq!(code, Code::PermissionDenied);
    assert!(why.contains("`Server::allow_drain`") && why.contains("SIGTERM"), "{why}");
    assert_eq!(server.health().now(), Readiness::Ready);
    let absent = soon(client.registry().drain("math", "nobody")).await;
    assert!(matches!(absent, Err(Error::NoService { .. })), "{absent:?}");
}

#[tokio::test]
async fn the_rule_decides_by_the_user_and_the_other_rule_is_asked_too() {
    let broker = testing::broker();
    let as_user = |user: &str| broker.url().replace("memory://", &format!("memory://{user}@"));
    let server = Server::connect(broker.url()).await.expect("in memory").serve(MathServer::new(Calculator));
    let server = server.allow_drain(|caller| matches!(caller.user, Some("operator" | "guest")));
    let server = server.allow(|caller, what| caller.user == Some("operator") || what != "math.v1.hopline.drain");
    let server = server.start().await.expect("it can be served");
    for user in ["mallory", "guest"] {
        let client = Client::connect(as_user(user)).await.expect("in memory");
        let (code, why) = refused(soon(client.registry().drain("math", server.instance())).await);
        assert_eq!(code, Code::PermissionDenied, "{user}");
        assert!(why.contains(&format!("the user `{user}` may not call `math.v1.hopline.drain`")), "{why}");
    }
    assert_eq!(server.health().now(), Readiness::Ready);
    let operator = Client::connect(as_user("operator")).await.expect("in memory");
    soon(operator.registry().drain("math", server.instance())).await.expect("it is allowed");
    let mut state = server.state();
    soon(state.wait_for(|state| *state == hopline::State::Closed)).await.expect("it ends");
    assert_eq!(server.health().now(), Readiness::Closed);
    // It has drained, so this has nothing to do.
    soon(server.drain()).await;
}

#[tokio::test]
async fn a_drain_from_afar_loses_no_call_and_ends_whoever_serves_until_something_else() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let server = scene.server().await.serve(service).allow_drain(|_| true);
    let serving = tokio::spawn(server.run_until(pending::<()>()));
    let client = scene.client().await;
    let (service, instance) = soon(async {
        loop {
            let services = client.registry().services().await.expect("it asks");
            if let Some(told) = services.into_values().flatten().next() {
                break (told.service, told.instance);
            }
        }
    })
    .await;
    // Its own queue is there before it replies.
    let pending = hold(&client, 1).to(&instance).start().await.expect("on its way");
    let call = soon(arrived.recv()).await.expect("it runs");
    soon(client.registry().drain(&service, &instance)).await.expect("it is allowed");
    soon(async {
        while !client.registry().instances(&service).await.expect("it asks").iter().any(|told| told.draining) {}
    })
    .await;
    assert!(!serving.is_finished(), "it waits for what runs");
    call.release();
    soon(pending).await.expect("it is answered");
    soon(serving).await.expect("no panic").expect("it has served");
}

#[tokio::test]
async fn only_one_instance_is_asked_at_a_time() {
    let scene = Scene::new();
    let server = scene.server().await.serve(MathServer::new(Calculator)).allow_drain(|_| true);
    let server = server.start().await.expect("it can be served");
    let mut stranger = Stranger::new(&scene).await;
    // {1: "hopline.drain"}, and the empty array.
    let (id, metadata) = (uuid::Uuid::new_v4(), [b"\xa1\x01\x6d", &b"hopline.drain"[..]].concat());
    let mut request = b"HL\x01\x01\x01\0\0\0".to_vec();
    request.extend_from_slice(id.as_bytes());
    request.extend_from_slice(&(metadata.len() as u32).to_be_bytes());
    request.extend_from_slice(&1_u32.to_be_bytes());
    request.extend_from_slice(&metadata);
    request.push(0x80);
    for (exchange, key) in [("rpc", "math.v1@*"), ("discovery", "ask")] {
        stranger.send(exchange, key, request.clone(), Some(stranger.reply_to.clone()), Some(id)).await;
        let (replied, status, _) = stranger.answer().await;
        assert_eq!((replied, status), (id, Code::InvalidArgument as u8), "{key}");
    }
    assert_eq!(server.health().now(), Readiness::Ready);
}
