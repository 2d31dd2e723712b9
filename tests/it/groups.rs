//! Groups: the broker keeps their events, and each is handled by one instance.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use hopline::transport::{Confirm, Properties, Publication, Settle};
use hopline::{
    Client, Code, Codec, Context, DeadLetters, Error, Fate, Fault, LetterKind, Published, Running, Service,
    Subscription, WhichLetters,
};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::support::{Scene, frame, soon};

/// An event as a subscriber heard it: the key, the event, the attempt.
type HeardEvent = (String, u64, u64);

/// A server that handles events as the subscription says, and tells the test of each.
async fn hear(scene: &Scene, subscription: Subscription<u64>) -> (Running, mpsc::UnboundedReceiver<HeardEvent>) {
    let (tell, heard) = mpsc::unbounded_channel();
    let server = scene.server().await.subscribe(subscription, move |ctx: Context, event: u64| {
        let told = tell.send((ctx.method().to_owned(), event, ctx.attempt()));
        async move { told.map_err(|_| Fault::new(Code::Aborted, "the test has ended")) }
    });
    (server.start().await.expect("it can subscribe"), heard)
}

/// Publishes the events `from..to`, each alone.
async fn publish(client: &Client, key: &str, events: std::ops::Range<u64>) {
    for event in events {
        assert_eq!(client.publish(key, &event).await.expect("the broker has it"), Published::ToAll);
    }
}

async fn dead(scene: &Scene, group: &str) -> DeadLetters {
    let dead = DeadLetters::builder().namespace(&scene.namespace).connect(&scene.url, group);
    dead.await.expect("the broker is there")
}

async fn until_dead(dead: &DeadLetters, count: u64) {
    soon(async {
        while dead.count().await.expect("it is there") != count {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn each_event_goes_to_one_instance_of_each_group() {
    let scene = Scene::new();
    let billing = || Subscription::to("order.*").shared("billing");
    let (_one, mut first) = hear(&scene, billing()).await;
    let (_two, mut second) = hear(&scene, billing()).await;
    let (_other, mut shipping) = hear(&scene, Subscription::to("order.created").shared("shipping")).await;
    let client = scene.client().await;
    publish(&client, "order.created", 0..50).await;
    publish(&client, "order.paid", 50..60).await;
    publish(&client, "invoice.paid", 60..61).await;
    let (mut of_both, mut of_other) = (BTreeMap::new(), Vec::new());
    while of_both.len() < 60 {
        let (key, event, attempt) = tokio::select! {
            Some(heard) = soon(first.recv()) => heard,
            Some(heard) = second.recv() => heard,
        };
        assert_eq!((attempt, of_both.insert(event, key)), (1, None), "event {event} goes to one instance");
    }
    for _ in 0..50 {
        of_other.push(soon(shipping.recv()).await.expect("it is subscribed").1);
    }
    of_other.sort_unstable();
    assert_eq!(of_other, (0..50).collect::<Vec<_>>());
    assert!(of_both.iter().all(|(event, key)| (*event < 50) == (key == "order.created")));
    assert!(first.try_recv().is_err() && second.try_recv().is_err() && shipping.try_recv().is_err());
}

#[tokio::test]
async fn events_wait_for_a_group_while_none_of_it_is_up() {
    let scene = Scene::new();
    let (running, heard) = hear(&scene, Subscription::to("order.#").shared("billing")).await;
    running.drain().await;
    drop(heard);
    let client = scene.client().await;
    publish(&client, "order.created", 0..20).await;
    let transport = scene.transport().await;
    scene.waiting(&transport, "group:billing.work", 20).await;
    let (_running, mut heard) = hear(&scene, Subscription::to("order.#").shared("billing")).await;
    let mut all = Vec::new();
    for _ in 0..20 {
        all.push(soon(heard.recv()).await.expect("they waited").1);
    }
    all.sort_unstable();
    assert_eq!(all, (0..20).collect::<Vec<_>>());
}

#[tokio::test(start_paused = true)]
async fn events_wait_for_a_group_that_nobody_serves_for_a_day() {
    let scene = Scene::in_memory();
    let (running, heard) = hear(&scene, Subscription::to("order.#").shared("billing")).await;
    running.drain().await;
    drop(heard);
    // A broker in memory lasts as long as somebody is connected to it.
    let client = scene.client().await;
    publish(&client, "order.created", 0..3).await;
    tokio::time::sleep(Duration::from_secs(24 * 3600)).await;
    let (_running, mut heard) = hear(&scene, Subscription::to("order.#").shared("billing")).await;
    let mut all = Vec::new();
    for _ in 0..3 {
        all.push(soon(heard.recv()).await.expect("they waited").1);
    }
    all.sort_unstable();
    assert_eq!(all, [0, 1, 2]);
}

#[tokio::test]
async fn a_handler_that_panics_has_failed_and_another_release_may_change_what_only_this_group_says() {
    let scene = Scene::new();
    let (tell, mut heard) = mpsc::unbounded_channel();
    let group = Subscription::to("n").shared("frail").attempts(2).pause(Duration::from_millis(2)).max_queue(100);
    let server = scene.server().await.subscribe(group, move |ctx: Context, event: u64| {
        tell.send((event, ctx.attempt())).expect("the test listens");
        async move { assert!(event != 13, "as the test asks") }
    });
    let running = server.start().await.expect("it can subscribe");
    let client = scene.client().await;
    publish(&client, "n", 13..14).await;
    assert_eq!(soon(heard.recv()).await, Some((13, 1)));
    assert_eq!(soon(heard.recv()).await, Some((13, 2)));
    let letters = dead(&scene, "group:frail").await;
    until_dead(&letters, 1).await;
    let letter = letters.list(10).await.expect("it is there").letters.remove(0);
    assert!(letter.reason.contains("panicked") && letter.reason.contains("as the test asks"), "{}", letter.reason);
    running.drain().await;
    // How the queue is declared must stay.
    let handler = |_: Context, _: u64| async {};
    let other = scene.server().await.subscribe(Subscription::to("n").shared("frail").max_queue(7), handler);
    let error = other.start().await.expect_err("the queue is there with other arguments");
    assert!(matches!(error, Error::Mismatch { .. }), "{error}");
    for said in ["group:frail.work", "100", "7"] {
        assert!(error.to_string().contains(said), "{error}");
    }
}

#[tokio::test]
async fn what_has_not_begun_when_a_group_drains_goes_to_the_next_instance_and_what_runs_ends() {
    let scene = Scene::new();
    let (begun, mut begins) = mpsc::unbounded_channel();
    let (ended, ends) = (Arc::new(AtomicUsize::new(0)), Arc::new(tokio::sync::Semaphore::new(0)));
    let (done, free) = (ended.clone(), ends.clone());
    let slow = Subscription::to("n").shared("slow").concurrency(2).prefetch(8);
    let server = scene.server().await.subscribe(slow, move |_: Context, event: u64| {
        let (done, free) = (done.clone(), free.clone());
        begun.send(event).expect("the test listens");
        async move {
            free.acquire().await.expect("it is open").forget();
            done.fetch_add(1, Ordering::SeqCst);
        }
    });
    let running = server.start().await.expect("it can subscribe");
    let client = scene.client().await;
    publish(&client, "n", 0..10).await;
    let mut first = [soon(begins.recv()).await, soon(begins.recv()).await].map(|event| event.expect("it runs"));
    let drained = tokio::spawn(running.drain());
    let (_next, mut heard) = hear(&scene, Subscription::to("n").shared("slow")).await;
    let mut rest = Vec::new();
    for _ in 0..8 {
        rest.push(soon(heard.recv()).await.expect("it was given back").1);
    }
    assert_eq!(ended.load(Ordering::SeqCst), 0, "the two still run");
    ends.add_permits(2);
    soon(drained).await.expect("no panic");
    assert_eq!(ended.load(Ordering::SeqCst), 2);
    first.sort_unstable();
    rest.extend(first);
    rest.sort_unstable();
    assert_eq!(rest, (0..10).collect::<Vec<_>>());
    assert!(heard.try_recv().is_err());
}

#[tokio::test]
async fn an_event_that_fails_is_tried_again_and_ends_as_a_dead_letter_of_its_group_alone() {
    let scene = Scene::new();
    let (tell, mut heard) = mpsc::unbounded_channel();
    let works = Arc::new(AtomicBool::new(false));
    let is_mended = works.clone();
    let fails = Subscription::to("order.*").shared("billing").attempts(3).pause(Duration::from_millis(5));
    let server = scene.server().await.subscribe(fails, move |ctx: Context, event: u64| {
        tell.send((event, ctx.attempt())).expect("the test listens");
        let works = is_mended.load(Ordering::SeqCst);
        async move { if works { Ok(()) } else { Err(format!("no price for {event}")) } }
    });
    let _running = server.start().await.expect("it can subscribe");
    let (_other, mut elsewhere) = hear(&scene, Subscription::to("order.*").shared("shipping")).await;
    let client = scene.client().await;
    publish(&client, "order.created", 7..8).await;
    for attempt in 1..=3 {
        assert_eq!(soon(heard.recv()).await, Some((7, attempt)));
    }
    let letters = dead(&scene, "group:billing").await;
    until_dead(&letters, 1).await;
    let letter = letters.list(10).await.expect("it is there").letters.remove(0);
    assert_eq!(
        (letter.kind, letter.method.as_deref(), letter.attempts),
        (LetterKind::Event, Some("order.created"), Some(3))
    );
    assert_eq!((letter.service.as_str(), letter.arguments), ("group:billing", Some(7.into())));
    assert!(letter.reason.contains("no price for 7"), "{}", letter.reason);
    assert!(scene.counts().await.contains(&("group:billing".to_owned(), 1)));
    assert_eq!(soon(elsewhere.recv()).await, Some(("order.created".to_owned(), 7, 1)));

    works.store(true, Ordering::SeqCst);
    let handled = letters.replay(&WhichLetters::All, |_| {}).await.expect("the broker is there");
    assert!(matches!(&handled[..], [one] if one.fate == Fate::Replayed), "{handled:?}");
    assert_eq!(soon(heard.recv()).await, Some((7, 1)));
    publish(&client, "order.created", 8..9).await;
    assert_eq!(
        soon(elsewhere.recv()).await,
        Some(("order.created".to_owned(), 8, 1)),
        "the replayed one came to one group"
    );
    until_dead(&letters, 0).await;
}

#[tokio::test]
async fn an_event_that_cannot_be_read_is_kept_with_its_key_and_its_sender() {
    let scene = Scene::new();
    let (_running, mut heard) = hear(&scene, Subscription::to("order.*").shared("billing")).await;
    let client = scene.client().await;
    client.publish("order.created", "seven").await.expect("the broker has it");
    let letters = dead(&scene, "group:billing").await;
    until_dead(&letters, 1).await;
    let letter = letters.list(10).await.expect("it is there").letters.remove(0);
    assert_eq!((letter.method.as_deref(), letter.attempts), (Some("order.created"), Some(1)));
    assert_eq!(letter.caller.as_deref(), Some(client.instance()));
    assert!(letter.reason.contains("event") && letter.reason.contains("u64"), "{}", letter.reason);
    publish(&client, "order.created", 8..9).await;
    assert_eq!(soon(heard.recv()).await, Some(("order.created".to_owned(), 8, 1)));
}

#[hopline::event(key = "order.created", version = 2)]
#[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
struct OrderCreated {
    items: Vec<u32>,
}

#[tokio::test]
async fn a_group_takes_events_of_a_type_and_keeps_those_of_another_version_or_form() {
    let scene = Scene::new();
    let (tell, mut heard) = mpsc::unbounded_channel();
    let group = Subscription::event().shared("billing");
    let server = scene.server().await.subscribe(group, move |_: Context, event: OrderCreated| {
        tell.send(event).expect("the test listens");
        async {}
    });
    let _running = server.start().await.expect("it can subscribe");
    let client = scene.client().await;
    assert_eq!(
        client.emit(&OrderCreated { items: vec![1] }).required().await.expect("a group is there"),
        Published::ToAll
    );
    assert_eq!(soon(heard.recv()).await, Some(OrderCreated { items: vec![1] }));
    // One of version 1, and one that has another form.
    client.publish("order.created", &OrderCreated { items: vec![2] }).await.expect("the broker has it");
    let letters = dead(&scene, "group:billing").await;
    until_dead(&letters, 1).await;
    let letter = letters.list(10).await.expect("it is there").letters.remove(0);
    for said in ["version 1 of `order.created`", client.instance(), "takes version 2"] {
        assert!(letter.reason.contains(said), "{said}: {}", letter.reason);
    }
    assert!(matches!(client.publish("nobody.here", &1).required().await, Err(Error::NoSubscriber { .. })));
}

#[tokio::test]
async fn calls_and_foreign_messages_are_not_handled_as_events() {
    let scene = Scene::new();
    let (running, mut heard) = hear(&scene, Subscription::to("order.*").shared("billing")).await;
    let client = scene.client().await;
    let called = client.call::<()>("group:billing", "event", (7_u64,)).to(running.instance()).await;
    assert!(matches!(&called, Err(Error::Fault(fault)) if fault.code == Code::Unimplemented), "{called:?}");
    assert!(matches!(client.call::<()>("group:billing", "event", (7_u64,)).await, Err(Error::NoService { .. })));
    // A oneway call, and an event that names another key than the one it was published with.
    let transport = scene.transport().await;
    for (kind, method) in [(3, "event"), (4, "order.paid")] {
        let publication = Publication {
            exchange: format!("{}.events", scene.namespace),
            key: "order.created".to_owned(),
            mandatory: true,
            properties: Properties::default(),
            body: frame(kind, Codec::Json, Uuid::new_v4(), method, b"7").into(),
        };
        assert_eq!(soon(transport.publish(publication)).await, Ok(Confirm::Accepted));
    }
    let letters = dead(&scene, "group:billing").await;
    until_dead(&letters, 2).await;
    assert!(heard.try_recv().is_err());
}

#[tokio::test]
async fn what_only_a_group_has_is_refused_without_one_and_a_server_is_once_in_each_group() {
    let scene = Scene::new();
    let handler = |_: Context, _: u64| async {};
    let refused = async |subscriptions: Vec<Subscription<u64>>| {
        let server = scene.server().await;
        let server = subscriptions.into_iter().fold(server, |server, one| server.subscribe(one, handler));
        match server.start().await {
            Err(Error::Invalid(why)) => why,
            other => panic!("{other:?}"),
        }
    };
    let why = refused(vec![Subscription::to("n").attempts(3).max_queue(5)]).await;
    assert!(why.contains("`n` has `attempts`, `max_queue`") && why.contains("shared"), "{why}");
    let why = refused(vec![Subscription::to("n").shared("a"), Subscription::to("m").shared("a")]).await;
    assert!(why.contains("twice as the group `a`"), "{why}");
    let why = refused(vec![Subscription::to("n").shared("a.b")]).await;
    assert!(why.contains("group `a.b`"), "{why}");
    let why = refused(vec![Subscription::to("n..m").shared("a")]).await;
    assert!(why.contains("empty word"), "{why}");
}

#[tokio::test]
async fn an_event_of_another_releases_pattern_waits_for_an_instance_that_wants_it() {
    let scene = Scene::new();
    let new = || Subscription::to("order.created").shared("billing").pause(Duration::ZERO).attempts(1000);
    let (_new, mut of_new) = hear(&scene, new()).await;
    let old = Subscription::to("order.*").shared("billing").pause(Duration::from_millis(5));
    let (old, mut of_old) = hear(&scene, old).await;
    let client = scene.client().await;
    publish(&client, "order.paid", 0..20).await;
    let mut all = Vec::new();
    for _ in 0..20 {
        all.push(soon(of_old.recv()).await.expect("the old release is there").1);
    }
    all.sort_unstable();
    assert_eq!(all, (0..20).collect::<Vec<_>>());
    assert!(of_new.try_recv().is_err());
    old.drain().await;
    drop(_new);
    // When no instance wants it, it is kept.
    let (_new, mut of_new) = hear(&scene, new().attempts(2)).await;
    publish(&client, "order.paid", 20..21).await;
    let letters = dead(&scene, "group:billing").await;
    until_dead(&letters, 1).await;
    let letter = letters.list(10).await.expect("it is there").letters.remove(0);
    assert!(letter.reason.contains("`order.paid` does not match `order.created`"), "{}", letter.reason);
    assert!(letter.reason.contains("hopline groups unbind billing"), "{}", letter.reason);
    assert!(of_new.try_recv().is_err());
}

#[tokio::test]
async fn an_event_that_comes_twice_is_handled_once_with_dedup() {
    let scene = Scene::new();
    let subscription = Subscription::to("n").shared("once").dedup(Duration::from_secs(600));
    let (_running, mut heard) = hear(&scene, subscription).await;
    let (transport, id) = (scene.transport().await, Uuid::new_v4());
    for event in [id, id, Uuid::new_v4()] {
        let publication = Publication {
            exchange: format!("{}.events", scene.namespace),
            key: "n".to_owned(),
            mandatory: true,
            properties: Properties::default(),
            body: frame(4, Codec::Json, event, "n", if event == id { b"1" } else { b"2" }).into(),
        };
        assert_eq!(soon(transport.publish(publication)).await, Ok(Confirm::Accepted));
    }
    let mut all = [soon(heard.recv()).await, soon(heard.recv()).await].map(|heard| heard.expect("it is there").1);
    all.sort_unstable();
    assert_eq!(all, [1, 2]);
    scene.waiting(&transport, "group:once.work", 0).await;
    assert!(heard.try_recv().is_err());
}

#[tokio::test]
async fn a_groups_full_queue_refuses_events_and_its_publisher_hears_it() {
    let scene = Scene::new();
    let of = || Subscription::to("n").shared("small").max_queue(3);
    let (running, heard) = hear(&scene, of()).await;
    running.drain().await;
    drop(heard);
    let (client, mut taken) = (scene.client().await, 0);
    // How many more messages a broker accepts before it refuses depends on the broker.
    while client.publish("n", &taken).await.expect("an answer") == Published::ToAll {
        taken += 1;
        assert!(taken < 100, "the queue takes everything");
    }
    assert!(taken >= 3);
    let (_running, mut heard) = hear(&scene, of()).await;
    let mut all = Vec::new();
    for _ in 0..taken {
        all.push(soon(heard.recv()).await.expect("it waited").1);
    }
    all.sort_unstable();
    assert_eq!(all, (0..taken).collect::<Vec<_>>());
    soon(async { while client.publish("n", &100_u64).await.expect("an answer") != Published::ToAll {} }).await;
}

#[tokio::test]
async fn a_group_is_seen_by_the_registry_and_its_instance_can_be_asked() {
    let scene = Scene::new();
    let (running, _heard) = hear(&scene, Subscription::to("order.*").shared("billing")).await;
    let client = scene.client().await;
    let found = client.registry().instances("group:billing").await.expect("the broker is there");
    assert_eq!(found.len(), 1, "{found:?}");
    assert_eq!(found[0].instance, running.instance());
    let plain =
        scene.serve(Service::new("plain", 1).method("m", |_: Context, (): ()| async { Ok::<_, Fault>(()) })).await;
    assert!(client.registry().instances("plain").await.expect("an answer").len() == 1);
    plain.drain().await;
}

/// Events of 16 customers, published by one client, and how they were handled.
struct InOrder {
    /// What was heard of each customer.
    heard: Arc<std::sync::Mutex<BTreeMap<u64, Vec<u64>>>>,
    most_at_once: Arc<AtomicUsize>,
    running: Running,
    /// Told after each event.
    handled: mpsc::UnboundedReceiver<()>,
}

const CUSTOMERS: u64 = 16;

async fn in_order(scene: &Scene, group: Option<&str>) -> InOrder {
    let subscription = Subscription::to("n").ordered_by(|event: &u64| event % CUSTOMERS).concurrency(16);
    let subscription = match group {
        Some(group) => subscription.shared(group).pause(Duration::from_millis(2)).attempts(5),
        None => subscription,
    };
    let (heard, most_at_once) =
        (Arc::<std::sync::Mutex<BTreeMap<u64, Vec<u64>>>>::default(), Arc::<AtomicUsize>::default());
    let (tell, handled) = mpsc::unbounded_channel();
    let (all, most, now) = (heard.clone(), most_at_once.clone(), Arc::<AtomicUsize>::default());
    let fails = group.is_some();
    let server = scene.server().await.subscribe(subscription, move |ctx: Context, event: u64| {
        let (all, most, now, tell) = (all.clone(), most.clone(), now.clone(), tell.clone());
        async move {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            // Others have the chance to overtake it.
            for _ in 0..event % 7 {
                tokio::task::yield_now().await;
            }
            now.fetch_sub(1, Ordering::SeqCst);
            if fails && event.is_multiple_of(5) && ctx.attempt() < 3 {
                return Err(format!("attempt {} of {event}", ctx.attempt()));
            }
            all.lock().expect("no panic").entry(event % CUSTOMERS).or_default().push(event / CUSTOMERS);
            tell.send(()).map_err(|_| "the test has ended".to_owned())
        }
    });
    InOrder { heard, most_at_once, running: server.start().await.expect("it can subscribe"), handled }
}

impl InOrder {
    fn check(&self, each: u64) {
        let heard = self.heard.lock().expect("no panic");
        for customer in 0..CUSTOMERS {
            assert_eq!(heard[&customer], (0..each).collect::<Vec<_>>(), "customer {customer}");
        }
        assert!(self.most_at_once.load(Ordering::SeqCst) > 1, "the events of others run beside them");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_of_one_key_are_handled_in_order_while_others_run_beside_them_also_when_some_fail() {
    for group in [None, Some("ordered")] {
        let scene = Scene::new();
        let mut one = in_order(&scene, group).await;
        let client = scene.client().await;
        // All at once, so that they share messages.
        let all = (0..CUSTOMERS * 30).map(|event| {
            let client = &client;
            async move { client.publish("n", &event).await.expect("the broker has it") }
        });
        futures::future::join_all(all).await;
        for _ in 0..CUSTOMERS * 30 {
            soon(one.handled.recv()).await.expect("it is handled");
        }
        one.check(30);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_in_order_stay_in_order_when_one_instance_drains_and_the_next_takes_over() {
    let scene = Scene::new();
    let mut first = in_order(&scene, Some("ordered")).await;
    let mut second = in_order(&scene, Some("ordered")).await;
    let client = scene.client().await;
    for event in 0..CUSTOMERS * 20 {
        client.publish("n", &event).await.expect("the broker has it");
    }
    for _ in 0..CUSTOMERS * 4 {
        soon(first.handled.recv()).await.expect("the first one is active");
    }
    assert!(second.handled.try_recv().is_err(), "one instance at a time");
    let before = first.heard.clone();
    soon(first.running.drain()).await;
    let before = before.lock().expect("no panic").clone();
    let handled: usize = before.values().map(Vec::len).sum();
    for _ in handled..usize::try_from(CUSTOMERS).expect("small") * 20 {
        soon(second.handled.recv()).await.expect("the second one takes over");
    }
    let after = second.heard.lock().expect("no panic").clone();
    for customer in 0..CUSTOMERS {
        let all = [before.get(&customer), after.get(&customer)].into_iter().flatten().flatten().copied();
        assert_eq!(all.collect::<Vec<_>>(), (0..20).collect::<Vec<_>>(), "customer {customer}");
    }
    let transport = scene.transport().await;
    scene.waiting(&transport, "group:ordered.work", 0).await;
    assert!(transport.get(&format!("{}.group:ordered.dead", scene.namespace)).await.expect("it is there").is_none_or(
        |letter| {
            letter.settle(Settle::GiveBack);
            false
        }
    ));
}
