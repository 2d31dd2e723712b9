//! Replay: subscriptions that begin with events of the past, alone and in groups.

use std::time::{Duration, Instant};

use hopline::{Client, Context, DeadLetters, Error, Fault, Published, Replay, Running, Subscription, WhichLetters};
use tokio::sync::mpsc;

use crate::support::{Scene, soon};

type Heard = mpsc::UnboundedReceiver<u64>;

fn orders() -> Subscription<u64> {
    Subscription::to("order.*")
}

/// A server that handles events as the subscription says, and tells the test of each.
async fn hear(scene: &Scene, subscription: Subscription<u64>) -> (Running, Heard) {
    let (tell, heard) = mpsc::unbounded_channel();
    let server = scene.server().await.subscribe(subscription, move |_: Context, event: u64| {
        let told = tell.send(event);
        async move { told.map_err(|_| Fault::new(hopline::Code::Aborted, "the test has ended")) }
    });
    (server.start().await.expect("it can subscribe"), heard)
}

async fn publish(client: &Client, events: std::ops::Range<u64>) {
    for event in events {
        assert_eq!(client.publish("order.created", &event).await.expect("the broker has it"), Published::ToAll);
    }
}

/// Hears exactly these events, in this order.
async fn hears(heard: &mut Heard, events: std::ops::Range<u64>) {
    for event in events {
        assert_eq!(soon(heard.recv()).await, Some(event));
    }
}

#[tokio::test]
async fn who_begins_at_the_start_hears_all_that_is_kept_in_order_and_what_comes_later() {
    let scene = Scene::new();
    let (first, mut early) = hear(&scene, orders().from(Replay::Start)).await;
    let client = scene.client().await;
    publish(&client, 0..50).await;
    client.publish("invoice.paid", &99_u64).await.expect("the broker has it");
    hears(&mut early, 0..50).await;
    let (_second, mut late) = hear(&scene, orders().from(Replay::Start)).await;
    hears(&mut late, 0..50).await;
    publish(&client, 50..60).await;
    hears(&mut late, 50..60).await;
    hears(&mut early, 50..60).await;
    first.drain().await;
    assert!(late.try_recv().is_err() && early.try_recv().is_err());
}

#[tokio::test]
async fn a_replay_begins_at_the_position_or_the_time_or_the_end_that_it_says() {
    let scene = Scene::new();
    let (keeper, _) = hear(&scene, orders().from(Replay::Start)).await;
    keeper.drain().await;
    let client = scene.client().await;
    publish(&client, 0..20).await;
    let until = Instant::now() + Duration::from_millis(30);
    while Instant::now() < until {
        tokio::task::yield_now().await;
    }
    let between = Instant::now() - Duration::from_millis(15);
    publish(&client, 20..30).await;
    let since = orders().from(Replay::Ago(between.elapsed()));
    let to_begin = [(since, 20..30), (orders().from(Replay::Offset(7)), 7..30), (orders().from(Replay::Last), 29..30)];
    for (subscription, events) in to_begin {
        let (running, mut heard) = hear(&scene, subscription).await;
        hears(&mut heard, events).await;
        running.drain().await;
        assert!(heard.try_recv().is_err(), "nothing else is heard");
    }
}

#[tokio::test]
async fn a_group_goes_on_where_it_was_whoever_of_it_is_up() {
    let scene = Scene::new();
    let group = || orders().shared("reports").from(Replay::Start);
    let (running, mut heard) = hear(&scene, group()).await;
    let client = scene.client().await;
    publish(&client, 0..10).await;
    hears(&mut heard, 0..10).await;
    running.drain().await;
    publish(&client, 10..20).await;
    // Where it is to begin counts at its first start only.
    let (one, mut first) = hear(&scene, group()).await;
    hears(&mut first, 10..20).await;
    let (_two, mut second) = hear(&scene, group()).await;
    let (_other, mut other) = hear(&scene, orders().shared("others").from(Replay::Start)).await;
    hears(&mut other, 0..20).await;
    publish(&client, 20..30).await;
    hears(&mut first, 20..30).await;
    one.drain().await;
    publish(&client, 30..40).await;
    hears(&mut second, 30..40).await;
    hears(&mut other, 20..40).await;
    assert!(first.try_recv().is_err() && second.try_recv().is_err() && other.try_recv().is_err());
}

#[tokio::test]
async fn another_instance_takes_over_from_one_that_dies_and_no_event_is_left_out() {
    let scene = Scene::new();
    let group = || orders().shared("reports").from(Replay::Start);
    let (one, mut first) = hear(&scene, group()).await;
    let client = scene.client().await;
    publish(&client, 0..10).await;
    hears(&mut first, 0..10).await;
    let (_two, mut second) = hear(&scene, group()).await;
    drop(one);
    publish(&client, 10..20).await;
    let mut next = soon(second.recv()).await.expect("it takes over");
    assert!(next <= 10, "{next}: what was handled a moment before may come again, and nothing is left out");
    while next < 19 {
        assert_eq!(soon(second.recv()).await, Some(next + 1));
        next += 1;
    }
}

#[tokio::test]
async fn an_event_of_a_stream_that_always_fails_is_kept_and_the_others_follow() {
    let scene = Scene::new();
    let (tell, mut heard) = mpsc::unbounded_channel();
    let group = orders().shared("reports").from(Replay::Start).attempts(3).pause(Duration::from_millis(2));
    let server = scene.server().await.subscribe(group, move |ctx: Context, event: u64| {
        tell.send((event, ctx.attempt())).expect("the test listens");
        async move { if event == 3 { Err("three is too many") } else { Ok(()) }.map_err(str::to_owned) }
    });
    let _running = server.start().await.expect("it can subscribe");
    let client = scene.client().await;
    publish(&client, 0..5).await;
    for expected in [(0, 1), (1, 1), (2, 1), (3, 1), (3, 2), (3, 3), (4, 1)] {
        assert_eq!(soon(heard.recv()).await, Some(expected));
    }
    let dead = DeadLetters::builder().namespace(&scene.namespace).connect(&scene.url, "group:reports").await;
    let dead = dead.expect("the broker is there");
    let letters = dead.list(10).await.expect("it is there").letters;
    assert_eq!(letters.len(), 1, "it is kept before the next one begins");
    assert!(letters[0].reason.contains("three is too many"), "{}", letters[0].reason);
    dead.replay(&WhichLetters::All, |_| {}).await.expect("the broker is there");
    assert_eq!(soon(heard.recv()).await, Some((3, 1)), "the group gets it again");
}

#[tokio::test]
async fn streams_are_kept_as_everybody_says_or_the_difference_is_told() {
    let scene = Scene::new();
    let (_running, _heard) = hear(&scene, orders().from(Replay::Start).keep_bytes(1_000_000)).await;
    let handler = |_: Context, _: u64| async {};
    let refused = async |subscription: Subscription<u64>| {
        scene.server().await.subscribe(subscription, handler).start().await.expect_err("it cannot")
    };
    let error = refused(orders().from(Replay::Start)).await;
    assert!(matches!(&error, Error::Mismatch { .. }), "{error}");
    assert!(error.to_string().contains("kept:order.*"), "{error}");
    let error = refused(orders().keep_bytes(5)).await.to_string();
    assert!(error.contains("`order.*` has `keep_for` or `keep_bytes`") && error.contains("`from`"), "{error}");
    let long = "x".repeat(200);
    let error = refused(Subscription::to(long.clone()).from(Replay::Last)).await.to_string();
    assert!(error.contains(&long) && error.contains("180 bytes"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replay_in_the_order_of_keys_runs_several_at_once_and_keeps_how_far_all_of_them_are() {
    let scene = Scene::new();
    let group = || orders().shared("reports").from(Replay::Start).ordered_by(|event: &u64| event % 4).concurrency(4);
    let (running, mut heard) = hear(&scene, group()).await;
    let client = scene.client().await;
    publish(&client, 0..40).await;
    let mut of_key: [Vec<u64>; 4] = Default::default();
    for _ in 0..40 {
        let event = soon(heard.recv()).await.expect("it is handled");
        of_key[usize::try_from(event % 4).expect("small")].push(event);
    }
    assert!(of_key.iter().all(|events| events.len() == 10 && events.is_sorted()), "{of_key:?}");
    running.drain().await;
    publish(&client, 40..41).await;
    let (_next, mut heard) = hear(&scene, group()).await;
    hears(&mut heard, 40..41).await;
}

#[tokio::test]
async fn a_group_whose_stream_was_deleted_reads_the_new_one_from_its_start() {
    let scene = Scene::new();
    let group = || orders().shared("reports").from(Replay::Start);
    let (running, mut heard) = hear(&scene, group()).await;
    let client = scene.client().await;
    publish(&client, 0..10).await;
    hears(&mut heard, 0..10).await;
    running.drain().await;
    let stream = format!("{}.kept:order.*", scene.namespace);
    assert!(scene.transport().await.delete(&stream).await.expect("an answer").is_some());
    let (keeper, _heard) = hear(&scene, orders().from(Replay::Start)).await;
    publish(&client, 10..13).await;
    let (_running, mut heard) = hear(&scene, group()).await;
    hears(&mut heard, 10..13).await;
    keeper.drain().await;
}
