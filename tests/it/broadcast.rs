//! A call to every instance.

use std::collections::{BTreeSet, HashSet};
use std::time::Duration;

use futures::StreamExt;
use futures::future::join_all;
use hopline::{CallError, Code, Context, DeadLetters, Error, Fault, Method, Service};

use crate::support::{Calculator, Held, MathClient, MathError, MathServer, Scene, code, hold, later, soon};

#[tokio::test]
async fn every_instance_answers_a_broadcast_with_its_id() {
    let scene = Scene::new();
    let client = scene.client().await;
    let math = MathClient::new(&client);
    let mut servers = Vec::new();
    for _ in 0..3 {
        servers.push(scene.serve(MathServer::new(Calculator)).await);
    }
    let mut answers = BTreeSet::new();
    let mut replies = math.whoami().all().replies(Duration::from_secs(30)).await.expect("on its way");
    for _ in 0..3 {
        let reply = soon(replies.next()).await.expect("one from each");
        assert_eq!(reply.outcome.expect("its id"), reply.instance);
        answers.insert(reply.instance);
    }
    let expected: BTreeSet<_> = servers.iter().map(|server| server.instance().to_owned()).collect();
    assert_eq!(answers, expected);
}

#[tokio::test]
async fn gathering_ends_with_its_window_and_says_what_each_answered() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let quick = scene.serve(service).await;
    let slow = Held::new();
    let _slow = scene.serve(slow.service).await;
    let client = scene.client().await;
    let window = Duration::from_secs(5);
    let gathering = tokio::spawn(hold(&client, 5).all().gather(window));
    soon(arrived.recv()).await.expect("it runs").release();
    soon(async {
        while client.traffic().replies_received == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    let replies = later(window, gathering).await.expect("no panic").expect("somebody is there");
    let answered: Vec<_> =
        replies.into_iter().filter_map(|reply| reply.outcome.ok().map(|n| (reply.instance, n))).collect();
    assert_eq!(answered, [(quick.instance().to_owned(), 5)]);
}

#[tokio::test]
async fn errors_of_single_instances_are_gathered_like_results() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let mut replies =
        MathClient::new(&client).div(1, 0).all().replies(Duration::from_secs(30)).await.expect("on its way");
    match soon(replies.next()).await.expect("it answers").outcome {
        Err(CallError::Service(MathError::DivisionByZero { dividend: 1 })) => {}
        other => panic!("{other:?}"),
    }
    let mut replies =
        client.call::<()>("math", "absent", [(); 0]).all().replies(Duration::from_secs(30)).await.expect("on its way");
    assert_eq!(code(soon(replies.next()).await.expect("it answers").outcome), Code::Unimplemented);
}

#[tokio::test]
async fn gathering_on_a_connection_that_is_lost_says_so() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let client = scene.client().await;
    let gathering = tokio::spawn(hold(&client, 1).all().gather(Duration::from_secs(600)));
    let _running = soon(arrived.recv()).await.expect("it runs");
    client.close().await;
    match soon(gathering).await.expect("no panic") {
        Err(Error::Disconnected { may_have_run: true, .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn broadcasts_to_any_number_of_services_that_nobody_serves_cost_no_connection() {
    let scene = Scene::new();
    let client = scene.client().await;
    let mut state = client.state();
    state.borrow_and_update();
    for round in 0..30 {
        let gather = |number| {
            let service = format!("made-up-{round}-{number}");
            client.call::<()>(&service, "call", [(); 0]).all().gather(Duration::from_secs(600))
        };
        for outcome in soon(futures::future::join_all((0..100).map(gather))).await {
            assert!(matches!(outcome, Err(Error::NoService { .. })), "{outcome:?}");
        }
        let sent = soon(client.oneway(&format!("made-up-{round}"), "call", [(); 0]).all().send()).await;
        assert!(matches!(sent, Err(Error::NoService { .. })), "{sent:?}");
    }
    assert!(!state.has_changed().expect("it is there"), "{:?}", *state.borrow());
}

#[tokio::test]
async fn a_broadcast_to_nobody_is_known_at_once() {
    let scene = Scene::new();
    let client = scene.client().await;
    let math = MathClient::new(&client);
    let window = Duration::from_secs(600);
    let nobody = |outcome: Result<_, Error>| match outcome {
        Err(Error::NoService { service, .. }) => assert_eq!(service, "math.v1"),
        other => panic!("{other:?}"),
    };
    nobody(soon(math.nothing().all().gather(window)).await.map(|replies| replies.len()));
    scene.serve(MathServer::new(Calculator)).await.drain().await;
    nobody(soon(math.nothing().all().gather(window)).await.map(|replies| replies.len()));
    let _server = scene.serve(MathServer::new(Calculator)).await;
    assert_eq!(math.add(1, 2).await.expect("the connection is as good as before"), 3);
}

#[tokio::test]
async fn a_burst_of_oneway_broadcasts_runs_on_every_instance_whatever_it_can_run_at_once() {
    const BURST: u64 = 5000;
    let scene = Scene::new();
    let (ran, mut runs) = tokio::sync::mpsc::unbounded_channel();
    let mut servers = Vec::new();
    for instance in 0..2 {
        let ran = ran.clone();
        let service = Service::new("burst", 1).method(Method::new("note"), move |_: Context, (n,): (u64,)| {
            let ran = ran.clone();
            async move {
                tokio::task::yield_now().await;
                ran.send((instance, n)).expect("the test listens");
                Ok::<_, Fault>(())
            }
        });
        servers.push(scene.serve(service.concurrency(2)).await);
    }
    let client = scene.client().await;
    let notes = (0..BURST).map(|n| client.oneway("burst", "note", (n,)).all().send());
    soon(join_all(notes)).await.into_iter().for_each(|sent| sent.expect("the broker has it"));
    let mut seen = HashSet::new();
    while seen.len() < 2 * usize::try_from(BURST).expect("a few") {
        assert!(seen.insert(soon(runs.recv()).await.expect("they serve")), "it ran twice");
    }
    for server in servers {
        soon(server.drain()).await;
    }
    let letters = DeadLetters::builder()
        .namespace(&scene.namespace)
        .connect(&scene.url, "burst")
        .await
        .expect("the broker is there");
    assert!(matches!(letters.count().await, Ok(0) | Err(Error::NoService { .. })), "none is lost among dead letters");
}
