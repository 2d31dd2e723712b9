//! Calls from threads without a runtime, and clients and servers whose runtime has ended.

use std::future::IntoFuture;
use std::time::Duration;

use futures::StreamExt;
use futures::executor::block_on;
use hopline::{Client, Error, State};
use tokio::runtime::{Builder, Runtime};
use tokio::sync::mpsc;

use crate::support::{Calculator, Held, MathClient, MathServer, Scene, hold, soon};

const WINDOW: Duration = Duration::from_millis(200);

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(1).enable_all().build().expect("a runtime")
}

#[test]
fn calls_in_every_style_can_be_made_where_there_is_no_runtime() {
    let (scene, runtime) = (Scene::new(), runtime());
    let connected = async { (scene.serve(MathServer::new(Calculator)).await, scene.client().await) };
    let (server, client) = runtime.block_on(connected);
    let math = MathClient::new(&client);
    let (told, heard) = std::sync::mpsc::channel();
    math.add(2, 3).then(move |outcome| told.send(outcome).expect("the test listens"));
    assert_eq!(heard.recv_timeout(Duration::from_secs(60)).expect("it is called").expect("answered"), 5);
    assert_eq!(block_on(math.add(3, 4).into_future()).expect("answered"), 7);
    block_on(math.heard().send()).expect("the broker has it");
    block_on(client.publish("something.happened", &1)).expect("the broker has it");
    let replies = block_on(math.whoami().all().gather(WINDOW)).expect("it is there");
    assert!(replies.len() <= 1, "it may take longer than the window: {replies:?}");
    let mut replies = block_on(math.whoami().all().replies(Duration::from_secs(30))).expect("it is there");
    assert_eq!(block_on(replies.next()).expect("it answers").instance, server.instance());
    block_on(client.registry().total(WINDOW).services()).expect("they are asked");
    runtime.block_on(server.drain());
}

/// Checks that an outcome says whether `held.v1.hold` has run, and that its runtime has ended.
fn is_over<T: std::fmt::Debug>(outcome: Result<T, Error>, ran: bool) {
    match outcome {
        Err(Error::Disconnected { method, may_have_run, reason, .. }) => {
            assert_eq!((method.as_deref(), may_have_run), (Some("held.v1.hold"), ran));
            assert_eq!(reason, "the runtime in which the client connected has ended");
        }
        other => panic!("{other:?}"),
    }
}

fn call_back(client: &Client) -> mpsc::UnboundedReceiver<Result<u64, Error>> {
    let (told, heard) = mpsc::unbounded_channel();
    hold(client, 7).then(move |outcome| told.send(outcome).expect("the test listens"));
    heard
}

#[test]
fn a_client_whose_runtime_has_ended_says_so_to_every_call() {
    let (scene, theirs, ours) = (Scene::new(), runtime(), runtime());
    let Held { service, mut arrived } = Held::new();
    let _server = ours.block_on(scene.serve(service));
    let client = theirs.block_on(scene.client());
    let waiting = ours.block_on(hold(&client, 1).start()).expect("on its way");
    let mut called_back = call_back(&client);
    let _running = [(); 2].map(|()| ours.block_on(soon(arrived.recv())).expect("it runs"));
    drop(theirs);
    ours.block_on(soon(async {
        is_over(waiting.await, true);
        is_over(called_back.recv().await.expect("it is called"), true);
        is_over(hold(&client, 2).await, false);
        is_over(call_back(&client).recv().await.expect("it is called"), false);
        is_over(client.oneway("held", "hold", (3,)).send().await, false);
        is_over(hold(&client, 4).all().gather(WINDOW).await, false);
        client.publish("something.happened", &1).await.expect_err("nobody takes it");
        client.registry().total(WINDOW).services().await.expect_err("nobody is asked");
        assert_eq!((*client.state().borrow()).clone(), State::Closed);
        client.close().await;
    }));
}

#[test]
fn a_server_whose_runtime_has_ended_drains_at_once() {
    let (scene, theirs, ours) = (Scene::new(), runtime(), runtime());
    let Held { service, mut arrived } = Held::new();
    let server = theirs.block_on(scene.serve(service));
    let client = ours.block_on(scene.client());
    let _waiting = ours.block_on(hold(&client, 1).start()).expect("on its way");
    let _running = ours.block_on(soon(arrived.recv())).expect("it runs");
    let mut state = server.state();
    drop(theirs);
    ours.block_on(soon(async {
        state.wait_for(|state| *state == State::Closed).await.expect("it is told");
        // The broker has 30 s for an answer, and does not give it.
        let drained = tokio::time::timeout(Duration::from_secs(20), server.drain());
        drained.await.expect("there is nothing to wait for");
    }));
}

#[test]
fn clients_and_servers_can_be_dropped_where_there_is_no_runtime() {
    let (scene, runtime) = (Scene::new(), runtime());
    let connected =
        async { (scene.server().await, scene.serve(MathServer::new(Calculator)).await, scene.client().await) };
    let (idle, running, client) = runtime.block_on(connected);
    let pending = runtime.block_on(hold(&client, 1).to(running.instance()).start()).expect("on its way");
    let states = [client.state(), running.state()];
    drop((pending, idle, running, client));
    for mut state in states {
        runtime.block_on(soon(state.wait_for(|state| *state == State::Closed))).expect("it is told");
    }
}
