//! Calls while no instance is there. Some wait for one and others do not; the outcome says which.

use std::future::IntoFuture;
use std::time::Duration;

use futures::future::join_all;
use hopline::topology::{Binding, Declaration, Queue, QueueKind};
use hopline::transport::Mode;
use hopline::{Absent, Client, Error, Service, State, Unanswered};

use crate::support::{Calculator, Held, MathClient, MathServer, Scene, hold, soon};

const LONG: Duration = Duration::from_secs(3600);

/// Starts and drains a server, so that only the queue of its service is left.
async fn gone(scene: &Scene, service: Service) {
    soon(scene.serve(service).await.drain()).await;
}

#[tokio::test]
async fn a_call_that_nobody_was_there_to_take_says_so_at_its_deadline() {
    let scene = Scene::new();
    gone(&scene, MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let math = MathClient::new(&client);
    // Each call asks the broker. How soon that answers depends on the machine.
    let told = async {
        loop {
            let error = math.add(1, 2).timeout(Duration::from_millis(200)).await.expect_err("nobody is there");
            match &error {
                Error::Timeout { why: Unanswered::Unserved, method, .. } => {
                    assert_eq!(method, "math.v1.add");
                    break assert!(error.to_string().contains("start an instance"), "{error}");
                }
                Error::Timeout { why: Unanswered::Unknown | Unanswered::Gone, .. } => {}
                other => panic!("{other:?}"),
            }
        }
    };
    soon(told).await;
    let _server = scene.serve(MathServer::new(Calculator)).await;
    assert_eq!(math.add(1, 2).await.expect("answered"), 3);
    // The client now knows that there is an instance.
    match math.add(1, 2).to("nobody").timeout(LONG).await {
        Err(Error::NoService { .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_call_that_somebody_runs_at_its_deadline_is_not_said_to_be_nobodys() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let client = scene.client().await;
    for number in 0..2 {
        let pending = hold(&client, number).timeout(Duration::from_secs(3)).start().await.expect("on its way");
        let _runs = soon(arrived.recv()).await.expect("it runs");
        let late = soon(pending).await;
        assert!(matches!(late, Err(Error::Timeout { why: Unanswered::Unknown, .. })), "{late:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_whose_only_instance_died_is_not_said_to_be_nobodys() {
    let (scene, _broker) = Scene::alone();
    let client = scene.client().await;
    let Held { service, mut arrived } = Held::new();
    let server = scene.serve(service).await;
    let pending = hold(&client, 1).timeout(Duration::from_secs(10)).start().await.expect("on its way");
    soon(arrived.recv()).await.expect("it runs").release();
    soon(pending).await.expect("answered");
    let other = hold(&client, 2).timeout(Duration::from_secs(10)).start().await.expect("on its way");
    let taken = hold(&client, 3).timeout(Duration::from_secs(10)).start().await.expect("on its way");
    let (first, _second) = (soon(arrived.recv()).await.expect("it runs"), soon(arrived.recv()).await.expect("it runs"));
    let first_number = first.number;
    first.release();
    let (answered, late) = if first_number == 2 { (other, taken) } else { (taken, other) };
    soon(answered).await.expect("answered");
    // A later call was answered, so an instance was there and may have received this one.
    drop(server);
    let late = late.await;
    assert!(matches!(late, Err(Error::Timeout { why: Unanswered::Gone, .. })), "{late:?}");
    let alone = hold(&client, 4).timeout(Duration::from_secs(10)).await;
    assert!(matches!(alone, Err(Error::Timeout { why: Unanswered::Unserved, .. })), "{alone:?}");
}

#[tokio::test]
async fn an_instance_that_drains_is_none_for_calls_that_do_not_wait() {
    let scene = Scene::new();
    let client = scene.client().await;
    let Held { service, mut arrived } = Held::new();
    let server = scene.serve(service).await;
    let runs = hold(&client, 1).timeout(LONG).start().await.expect("on its way");
    let held = soon(arrived.recv()).await.expect("it runs");
    let drain = tokio::spawn(server.drain());
    let is_gone = async {
        loop {
            match hold(&client, 2).absent(Absent::Fail).timeout(Duration::from_millis(100)).await {
                Err(Error::NoService { .. }) => break,
                Err(Error::Timeout { .. }) => {}
                other => panic!("{other:?}"),
            }
        }
    };
    soon(is_gone).await;
    held.release();
    assert_eq!(soon(runs).await.expect("answered"), 1);
    soon(drain).await.expect("no panic");
}

#[tokio::test]
async fn a_call_that_is_not_to_wait_for_an_instance_ends_at_once_and_never_runs() {
    let scene = Scene::new();
    gone(&scene, Held::new().service).await;
    let builder = Client::builder().namespace(&scene.namespace).timeout(LONG).absent(Absent::Fail);
    let hasty = builder.connect(&scene.url).await.expect("the broker is there");
    let patient = scene.client().await;
    for client in [&hasty, &patient] {
        for outcome in soon(join_all((0..10).map(|n| hold(client, n).absent(Absent::Fail).into_future()))).await {
            match outcome {
                Err(Error::NoService { service, .. }) => assert_eq!(service, "held.v1"),
                other => panic!("{other:?}"),
            }
        }
    }
    match soon(hold(&hasty, 1).into_future()).await {
        Err(Error::NoService { .. }) => {}
        other => panic!("{other:?}"),
    }
    let waiting = hold(&hasty, 77).absent(Absent::Wait).start().await.expect("it waits");
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let first = soon(arrived.recv()).await.expect("it runs");
    assert_eq!(first.number, 77, "the others have not left");
    first.release();
    assert_eq!(waiting.await.expect("answered"), 77);
    let next = hold(&hasty, 78).start().await.expect("on its way");
    soon(arrived.recv()).await.expect("it runs").release();
    assert_eq!(next.await.expect("answered"), 78);
}

#[tokio::test]
async fn a_service_that_was_never_served_is_known_whether_its_calls_would_wait_or_not() {
    let scene = Scene::new();
    let client = scene.client().await;
    for absent in [Absent::Wait, Absent::Fail] {
        match soon(hold(&client, 1).timeout(LONG).absent(absent).into_future()).await {
            Err(Error::NoService { service, .. }) => assert_eq!(service, "held.v1"),
            other => panic!("{other:?}"),
        }
    }
}

#[tokio::test]
async fn asking_whether_somebody_is_there_does_not_make_the_grace_period_longer() {
    let scene = Scene::new();
    gone(&scene, Held::new().service.grace(Duration::from_secs(3))).await;
    let client = scene.client().await;
    // They ask from time to time whether there is an instance.
    let _waiting = hold(&client, 1).timeout(LONG).start().await.expect("it waits");
    let is_over = async {
        loop {
            match hold(&client, 2).timeout(Duration::from_millis(300)).await {
                Err(Error::NoService { .. }) => break,
                Err(Error::Timeout { .. }) => {}
                other => panic!("{other:?}"),
            }
        }
    };
    soon(is_over).await;
}

#[tokio::test(start_paused = true)]
async fn any_number_of_calls_that_wait_ask_once_every_few_seconds() {
    let (scene, _broker) = Scene::alone();
    let server = scene.serve(Held::new().service).await;
    // Whoever receives these questions counts as an instance.
    let listening = [
        Declaration::Queue(Queue::new("ear", QueueKind::Exclusive)),
        Declaration::Binding(Binding {
            exchange: format!("{}.rpc", scene.namespace),
            key: "held.v1@?".to_owned(),
            queue: "ear".to_owned(),
        }),
    ];
    let transport = scene.transport().await;
    transport.declare(&listening).await.expect("a new queue");
    let mut heard = transport.consume("ear", Mode::NoAck).await.expect("it is there");
    soon(server.drain()).await;
    let client = scene.client().await;
    let waiting = join_all((0..100).map(|number| hold(&client, number).timeout(Duration::from_secs(30)).into_future()));
    let outcomes = tokio::time::timeout(Duration::from_secs(40), waiting).await.expect("their time is over");
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Err(Error::Timeout { why: Unanswered::Unknown, .. }))));
    let mut questions = 0;
    while let Ok(Some(question)) = tokio::time::timeout(Duration::from_secs(1), heard.next()).await {
        questions += usize::from(question.body[8..24] == [0; 16]);
    }
    assert!((1..=7).contains(&questions), "{questions} questions");
}

#[tokio::test(start_paused = true)]
async fn a_call_that_waits_for_an_answer_is_blocked_and_unconnected_as_any_other() {
    let (scene, broker) = Scene::alone();
    let _server = scene.serve(Held::new().service).await;
    let builder = || Client::builder().namespace(&scene.namespace).timeout(LONG).absent(Absent::Fail);
    let client = builder().connect(&scene.url).await.expect("the broker is there");
    broker.alarm("low on memory");
    match soon(hold(&client, 1).into_future()).await {
        Err(Error::Blocked { may_have_run: false, .. }) => {}
        other => panic!("{other:?}"),
    }
    broker.restore();
    soon(client.state().wait_for(|state| *state == State::Ready)).await.expect("it is told");
    let pending = hold(&client, 2).start().await.expect("on its way");
    client.close().await;
    match soon(pending).await {
        Err(Error::Disconnected { method, .. }) => assert_eq!(method.as_deref(), Some("held.v1.hold")),
        other => panic!("{other:?}"),
    }
}
