//! The services with dead letters are found, whether they run or not, and whatever others do to the catalogue at the
//! same time.

use std::time::Duration;

use hopline::topology::{Declaration, Queue, QueueKind};
use hopline::transport::{Confirm, Properties, Publication, Settle, Transport};
use hopline::{Code, Context, Fault, Method, Service, State};

use crate::support::{Scene, soon};

/// A service with a oneway method that always fails.
fn mail() -> Service {
    let refuse = |_: Context, _: (u64,)| async { Err::<(), _>(Fault::new(Code::InvalidArgument, "no address")) };
    Service::new("mail", 1).method(Method::new("send").oneway(), refuse)
}

/// A service without oneway methods. It has a queue of dead letters only after a message came that nobody can be told
/// about.
fn asked() -> Service {
    Service::new("asked", 2).method("ask", |_: Context, _: [(); 0]| async { Ok::<_, Fault>(()) })
}

async fn assert_counts(scene: &Scene, wanted: &[(&str, u64)]) {
    let wanted: Vec<_> = wanted.iter().map(|(service, count)| ((*service).to_owned(), *count)).collect();
    assert_eq!(scene.counts().await, wanted);
}

fn services(scene: &Scene) -> String {
    format!("{}.services", scene.namespace)
}

/// Declares a queue with this name in the scene's namespace, as a foreign program might.
async fn declare(scene: &Scene, transport: &Transport, queue: &str, kind: QueueKind) {
    let delivery_limit = (kind == QueueKind::Quorum).then_some(2_000_000_000);
    let queue = Queue { delivery_limit, ..Queue::new(format!("{}.{queue}", scene.namespace), kind) };
    transport.declare(&[Declaration::Queue(queue)]).await.expect("it is nobody's");
}

/// Publishes to a queue, and waits for the confirm.
async fn publish(scene: &Scene, transport: &Transport, queue: &str, body: &str) {
    let publication = Publication {
        exchange: String::new(),
        key: format!("{}.{queue}", scene.namespace),
        mandatory: true,
        properties: Properties::default(),
        body: body.to_owned().into(),
    };
    assert_eq!(soon(transport.publish(publication)).await, Ok(Confirm::Accepted));
}

#[tokio::test]
async fn services_that_do_not_run_are_counted_too() {
    let scene = Scene::new();
    assert_counts(&scene, &[]).await;
    let transport = scene.transport().await;
    let mut servers = vec![scene.serve(mail()).await];
    scene.waiting(&transport, "services", 1).await;
    for service in [mail(), mail(), asked()] {
        servers.push(scene.serve(service).await);
    }
    assert_counts(&scene, &[("mail.v1", 0)]).await;
    // A service without oneway methods is entered with its first dead letter.
    let client = scene.client().await;
    client.oneway("asked.v2", "unheard_of", [(); 0]).all().send().await.expect("the broker has it");
    client.oneway("mail", "send", (1,)).send().await.expect("the broker has it");
    for dead in ["asked.v2.dead", "mail.v1.dead"] {
        scene.waiting(&transport, dead, 1).await;
    }
    for server in servers {
        server.drain().await;
    }
    assert_counts(&scene, &[("asked.v2", 1), ("mail.v1", 1)]).await;
    scene.waiting(&transport, "services", 2).await;
    // A foreign program that publishes nonsense to the catalogue does no harm.
    publish(&scene, &transport, "services", "not a.service").await;
    publish(&scene, &transport, "services", "mail.v1").await;
    assert_counts(&scene, &[("asked.v2", 1), ("mail.v1", 1)]).await;
    scene.waiting(&transport, "services", 2).await;
}

#[tokio::test(start_paused = true)]
async fn what_another_reader_holds_is_counted_once_it_is_back() {
    let scene = Scene::in_memory();
    let transport = scene.transport().await;
    declare(&scene, &transport, "services", QueueKind::Classic).await;
    for service in ["mail.v1", "post.v1", "post.v2"] {
        declare(&scene, &transport, &format!("{service}.dead"), QueueKind::Quorum).await;
        publish(&scene, &transport, "services", service).await;
    }
    let all = [("mail.v1", 0), ("post.v1", 0), ("post.v2", 0)];
    // Another reader holds all entries for long, or one entry for as long as reading takes.
    for (held, time) in [(3, 1000), (1, 100)] {
        let mut out = Vec::new();
        for _ in 0..held {
            out.push(transport.get(&services(&scene)).await.expect("an answer").expect("it is there"));
        }
        let back = async {
            // The time is virtual: it is how long the other reader holds the entries.
            tokio::time::sleep(Duration::from_millis(time)).await;
            out.into_iter().for_each(|entry| entry.settle(Settle::GiveBack));
        };
        tokio::join!(assert_counts(&scene, &all), back);
    }
}

#[tokio::test(start_paused = true)]
async fn an_empty_catalogue_is_waited_for_but_not_for_long() {
    let scene = Scene::in_memory();
    let transport = scene.transport().await;
    declare(&scene, &transport, "services", QueueKind::Classic).await;
    let begun = tokio::time::Instant::now();
    assert_counts(&scene, &[]).await;
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());
}

#[tokio::test]
async fn a_service_whose_queue_is_missing_is_counted_again_once_it_is_back() {
    let scene = Scene::new();
    let transport = scene.transport().await;
    declare(&scene, &transport, "services", QueueKind::Classic).await;
    publish(&scene, &transport, "services", "mail.v1").await;
    assert_counts(&scene, &[]).await;
    declare(&scene, &transport, "mail.v1.dead", QueueKind::Quorum).await;
    assert_counts(&scene, &[("mail.v1", 0)]).await;
}

#[tokio::test]
async fn a_server_that_cannot_enter_for_an_alarm_keeps_nobody_from_reading() {
    let (scene, broker) = Scene::alone();
    let _mail = scene.serve(mail()).await;
    let transport = scene.transport().await;
    scene.waiting(&transport, "services", 1).await;
    declare(&scene, &transport, "asked.v2.dead", QueueKind::Quorum).await;
    broker.alarm("low on memory");
    let server = scene.serve(asked()).await;
    // The server has published its entry.
    soon(server.state().wait_for(|state| matches!(state, State::Blocked { .. }))).await.expect("it serves");
    assert_counts(&scene, &[("mail.v1", 0)]).await;
    broker.restore();
    scene.waiting(&transport, "services", 2).await;
    assert_counts(&scene, &[("asked.v2", 0), ("mail.v1", 0)]).await;
}

#[tokio::test]
async fn a_service_without_oneway_methods_enters_if_it_has_dead_letters_of_an_earlier_time() {
    let scene = Scene::new();
    let transport = scene.transport().await;
    declare(&scene, &transport, "services", QueueKind::Classic).await;
    declare(&scene, &transport, "asked.v2.dead", QueueKind::Quorum).await;
    publish(&scene, &transport, "asked.v2.dead", "noise").await;
    let server = scene.serve(asked()).await;
    scene.waiting(&transport, "services", 1).await;
    server.drain().await;
    assert_counts(&scene, &[("asked.v2", 1)]).await;
}

#[tokio::test(start_paused = true)]
async fn a_server_that_could_not_enter_tries_again_after_a_few_seconds() {
    let scene = Scene::in_memory();
    let (transport, other) = (scene.transport().await, scene.transport().await);
    declare(&scene, &other, "services", QueueKind::Exclusive).await;
    let _server = scene.serve(mail()).await;
    // The time is virtual, here and below. The server tries at once, and then after the pause that is tested.
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(other.count(&services(&scene)).await.expect("an answer"), Some(0), "it could not enter");
    other.close().await;
    // This is longer than that pause.
    tokio::time::sleep(Duration::from_secs(6)).await;
    assert_eq!(transport.count(&services(&scene)).await.expect("an answer"), Some(1));
}
