//! Operating groups: what waits for each, an end to those that nobody needs, and servers that unsubscribe.

use std::ops::Range;
use std::sync::Arc;

use hopline::{
    Client, Context, DeadLetters, Error, Group, GroupCounts, Groups, Published, Replay, Running, State, Subscription,
};
use tokio::sync::{Semaphore, mpsc};

use crate::support::{Scene, soon};

type Heard = mpsc::UnboundedReceiver<u64>;

/// A server that handles events as the subscription says, and tells the test of each.
async fn hear(scene: &Scene, subscription: Subscription<u64>) -> (Running, Heard) {
    let (tell, heard) = mpsc::unbounded_channel();
    let server = scene.server().await.subscribe(subscription, told_to(tell));
    (server.start().await.expect("it can subscribe"), heard)
}

fn told_to(
    tell: mpsc::UnboundedSender<u64>,
) -> impl Fn(Context, u64) -> std::future::Ready<()> + Send + Sync + 'static {
    move |_, event| {
        // Where the test does not listen, nobody is told.
        let _ = tell.send(event);
        std::future::ready(())
    }
}

async fn groups(scene: &Scene) -> Groups {
    Groups::builder().namespace(&scene.namespace).connect(&scene.url).await.expect("the broker is there")
}

async fn publish(client: &Client, events: Range<u64>) {
    for event in events {
        assert_eq!(client.publish("order.created", &event).await.expect("the broker has it"), Published::ToAll);
    }
}

async fn hears(heard: &mut Heard, events: Range<u64>) {
    for event in events {
        assert_eq!(soon(heard.recv()).await, Some(event));
    }
}

/// Waits until a group is as it should be. The catalogue has it soon after its first server has started.
async fn until(groups: &Groups, name: &str, is_so: impl Fn(&Group, &GroupCounts) -> bool) -> Group {
    soon(async {
        loop {
            let all = groups.list().await.expect("the broker is there");
            let found = all.into_iter().find(|group| group.name == name);
            if let Some(group) = found {
                let counts = group.counts.as_ref().expect("its queues answer");
                if is_so(&group, counts) {
                    return group;
                }
            }
            tokio::task::yield_now().await;
        }
    })
    .await
}

#[track_caller]
fn is_refused<T: std::fmt::Debug>(outcome: Result<T, Error>, told: &[&str]) {
    let Err(Error::Invalid(why)) = outcome else { panic!("expected a refusal, not {outcome:?}") };
    assert!(told.iter().all(|told| why.contains(told)), "{why}");
}

#[tokio::test]
async fn a_list_tells_of_each_group_what_waits_and_who_is_up() {
    let scene = Scene::new();
    let (billing, _) = hear(&scene, Subscription::to("order.*").shared("billing")).await;
    let (_reports, mut heard) = hear(&scene, Subscription::to("order.*").shared("reports").from(Replay::Start)).await;
    let (client, groups) = (scene.client().await, groups(&scene).await);
    publish(&client, 0..4).await;
    hears(&mut heard, 0..4).await;
    until(&groups, "billing", |_, counts| counts.consumers == 1 && counts.replay.is_none()).await;
    billing.drain().await;
    publish(&client, 4..6).await;
    let billing = until(&groups, "billing", |_, counts| counts.consumers == 0 && counts.waiting == 2).await;
    assert_eq!(billing.patterns, ["order.*"]);
    let told = |counts: &GroupCounts| counts.replay.map(|replay| (replay.next, replay.last, replay.lag()));
    until(&groups, "reports", |_, counts| told(counts) == Some((Some(6), Some(5), 0)) && counts.consumers == 1).await;
    assert_eq!(groups.list().await.expect("the broker is there").len(), 2);
}

#[tokio::test]
async fn a_look_at_a_replay_does_not_make_it_begin_anew() {
    let scene = Scene::new();
    let group = || Subscription::to("order.*").shared("reports").from(Replay::Start);
    let (running, mut heard) = hear(&scene, group()).await;
    let (client, groups) = (scene.client().await, groups(&scene).await);
    publish(&client, 0..3).await;
    hears(&mut heard, 0..3).await;
    until(&groups, "reports", |_, counts| counts.replay.is_some_and(|replay| replay.next == Some(3))).await;
    running.drain().await;
    publish(&client, 3..6).await;
    // As one who looks does, and stays.
    let (transport, offsets) = (scene.transport().await, format!("{}.group:reports.offset", scene.namespace));
    let mode = hopline::transport::Mode::Settle { prefetch: 8 };
    let mut looking = transport.consume(&offsets, mode).await.expect("it is there");
    let offset = soon(looking.next()).await.expect("it has one");
    let (running, mut heard) = hear(&scene, group()).await;
    let turn = format!("{}.group:reports.turn", scene.namespace);
    soon(async {
        while transport.look_at(&turn).await.expect("an answer").is_none_or(|turn| turn.consumers == 0) {
            tokio::task::yield_now().await;
        }
    })
    .await;
    offset.settle(hopline::transport::Settle::GiveBack);
    drop(looking);
    hears(&mut heard, 3..6).await;
    running.drain().await;
}

#[tokio::test]
async fn a_group_is_removed_when_nobody_needs_it_or_by_force() {
    let scene = Scene::new();
    let (running, _) = hear(&scene, Subscription::to("order.*").shared("billing")).await;
    let (client, groups) = (scene.client().await, groups(&scene).await);
    until(&groups, "billing", |_, counts| counts.consumers == 1).await;
    is_refused(groups.remove("billing", true).await, &["1 instances are subscribed", "unsubscribe"]);
    is_refused(groups.remove("shipping", true).await, &["no group `shipping`", "`billing`"]);
    running.drain().await;
    publish(&client, 0..3).await;
    until(&groups, "billing", |_, counts| counts.waiting == 3 && counts.consumers == 0).await;
    is_refused(groups.remove("billing", false).await, &["3 events wait", "--force"]);
    // It was not touched.
    publish(&client, 3..4).await;
    until(&groups, "billing", |_, counts| counts.waiting == 4).await;
    assert_eq!(groups.remove("billing", true).await.expect("it is forced"), 4);
    assert!(groups.list().await.expect("the broker is there").is_empty());
    let published = client.publish("order.created", &4_u64).confirmed().await.expect("the broker has it");
    assert_eq!(published, Published::ToNobody);
    is_refused(groups.remove("billing", true).await, &["no group `billing`: there are none"]);
    let dead = DeadLetters::builder().namespace(&scene.namespace).connect(&scene.url, "group:billing").await;
    let dead = dead.expect("the broker is there").count().await;
    assert!(matches!(dead, Err(Error::NoService { .. })), "{dead:?}");
    // A group of that name may come again, and is a new one.
    let (_running, mut heard) = hear(&scene, Subscription::to("order.*").shared("billing")).await;
    publish(&client, 5..6).await;
    hears(&mut heard, 5..6).await;
}

#[tokio::test]
async fn a_removal_that_broke_off_is_finished_by_the_next_one() {
    let scene = Scene::new();
    let (running, _) = hear(&scene, Subscription::to("order.*").shared("billing")).await;
    let (transport, groups) = (scene.transport().await, groups(&scene).await);
    until(&groups, "billing", |_, counts| counts.consumers == 1).await;
    running.drain().await;
    publish(&scene.client().await, 0..2).await;
    scene.waiting(&transport, "group:billing.work", 2).await;
    let queue = format!("{}.group:billing.work", scene.namespace);
    assert_eq!(soon(transport.delete(&queue)).await.expect("it is there"), Some(2));
    assert_eq!(groups.remove("billing", false).await.expect("nothing is left"), 0);
    assert!(groups.list().await.expect("the broker is there").is_empty());
}

#[tokio::test]
async fn the_pattern_of_an_older_release_is_ended_and_the_other_stays() {
    let scene = Scene::new();
    let groups = groups(&scene).await;
    let (old, _) = hear(&scene, Subscription::to("order.created").shared("billing")).await;
    until(&groups, "billing", |group, _| group.patterns == ["order.created"]).await;
    old.drain().await;
    let (new, mut heard) = hear(&scene, Subscription::to("order.paid").shared("billing")).await;
    let client = scene.client().await;
    until(&groups, "billing", |group, _| group.patterns == ["order.created", "order.paid"]).await;
    is_refused(groups.unbind("billing", "order.*").await, &["no pattern `order.*`", "`order.created`, `order.paid`"]);
    groups.unbind("billing", "order.created").await.expect("nobody subscribes to it");
    is_refused(groups.unbind("billing", "order.paid").await, &["no pattern but `order.paid`"]);
    until(&groups, "billing", |group, _| group.patterns == ["order.paid"]).await;
    let published = client.publish("order.created", &1_u64).confirmed().await.expect("the broker has it");
    assert_eq!(published, Published::ToNobody);
    client.publish("order.paid", &2_u64).await.expect("the broker has it");
    hears(&mut heard, 2..3).await;
    new.drain().await;
}

#[tokio::test]
async fn what_is_kept_is_removed_when_no_group_reads_it_or_by_force() {
    let scene = Scene::new();
    let (running, mut heard) = hear(&scene, Subscription::to("order.*").shared("reports").from(Replay::Start)).await;
    let (client, groups) = (scene.client().await, groups(&scene).await);
    publish(&client, 0..3).await;
    hears(&mut heard, 0..3).await;
    until(&groups, "reports", |_, counts| counts.replay.is_some()).await;
    running.drain().await;
    is_refused(groups.remove_kept("order.*", false).await, &["kept for `reports`"]);
    groups.remove("reports", false).await.expect("nobody needs it");
    assert!(groups.remove_kept("order.*", false).await.expect("nobody reads it"));
    assert!(!groups.remove_kept("order.*", false).await.expect("it is gone"));
    let (_running, mut heard) = hear(&scene, Subscription::to("order.*").shared("reports").from(Replay::Start)).await;
    publish(&client, 3..4).await;
    hears(&mut heard, 3..4).await;
}

#[tokio::test]
async fn who_unsubscribes_ends_what_runs_and_the_group_keeps_the_rest() {
    let scene = Scene::new();
    let (begun, mut begins) = mpsc::unbounded_channel();
    let (free, (tell, mut heard)) = (Arc::new(Semaphore::new(0)), mpsc::unbounded_channel());
    let (held, done) = (free.clone(), tell.clone());
    let slow = Subscription::to("order.*").shared("billing").concurrency(1).prefetch(1);
    let server = scene.server().await.subscribe(slow, move |_: Context, event: u64| {
        let (held, done) = (held.clone(), done.clone());
        begun.send(event).expect("the test listens");
        async move {
            held.acquire().await.expect("it is open").forget();
            done.send(event).expect("the test listens");
        }
    });
    let (others, mut other) = mpsc::unbounded_channel();
    let server = server.subscribe("order.#", told_to(others));
    let running = server.start().await.expect("it can subscribe");
    let (client, groups) = (scene.client().await, groups(&scene).await);
    publish(&client, 0..1).await;
    assert_eq!(soon(begins.recv()).await, Some(0));
    until(&groups, "billing", |_, counts| counts.consumers == 1).await;
    let mut unsubscribing = Box::pin(running.unsubscribe("billing"));
    tokio::select! {
        biased;
        ended = &mut unsubscribing => panic!("{ended:?}: it waits for what runs"),
        () = publish(&client, 1..3) => {}
    }
    assert!(heard.try_recv().is_err(), "it runs");
    free.add_permits(5);
    soon(unsubscribing).await.expect("it is subscribed");
    assert_eq!(heard.try_recv(), Ok(0));
    // One that the broker had sent before it was told runs here, too.
    let left = 2 - std::iter::from_fn(|| begins.try_recv().ok()).count() as u64;
    until(&groups, "billing", |_, counts| counts.waiting == left && counts.consumers == 0).await;
    publish(&client, 3..4).await;
    until(&groups, "billing", |_, counts| counts.waiting == left + 1).await;
    hears(&mut other, 0..4).await;
    assert!(begins.try_recv().is_err(), "no more begins");
    is_refused(running.unsubscribe("billing").await, &["no subscription", "`billing`"]);
    assert_eq!(*running.state().borrow(), State::Ready);
    assert_eq!(groups.remove("billing", true).await.expect("nobody is subscribed"), left + 1);
    running.drain().await;
}

#[tokio::test]
async fn a_subscription_alone_and_one_that_replays_end_as_well() {
    let scene = Scene::new();
    let ((alone, mut heard), (replays, mut replayed)) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
    let reports = Subscription::to("order.*").shared("reports").from(Replay::Start);
    let past = Subscription::to("order.#").from(Replay::Start);
    let server = scene.server().await.subscribe("order.created", told_to(alone));
    let server = server.subscribe(reports, told_to(replays.clone())).subscribe(past, told_to(replays));
    let running = server.start().await.expect("it can subscribe");
    let client = scene.client().await;
    publish(&client, 7..8).await;
    hears(&mut heard, 7..8).await;
    assert_eq!([soon(replayed.recv()).await, soon(replayed.recv()).await], [Some(7), Some(7)]);
    for name in ["order.created", "reports", "order.#"] {
        soon(running.unsubscribe(name)).await.expect("it is subscribed");
    }
    is_refused(running.unsubscribe("order.#").await, &["no subscription"]);
    publish(&client, 8..9).await;
    let (_next, mut next) = hear(&scene, Subscription::to("order.*").shared("reports").from(Replay::Start)).await;
    hears(&mut next, 8..9).await;
    running.drain().await;
    assert!(heard.try_recv().is_err() && replayed.try_recv().is_err());
}

#[tokio::test]
async fn who_has_unsubscribed_stays_so_over_the_next_connection() {
    let (scene, broker) = Scene::alone();
    let (group, mut of_group) = mpsc::unbounded_channel();
    let (alone, mut of_alone) = mpsc::unbounded_channel();
    let (stays, mut of_other) = mpsc::unbounded_channel();
    let server = scene.server().await.subscribe(Subscription::to("order.*").shared("billing"), told_to(group));
    let server = server.subscribe("order.created", told_to(alone)).subscribe("order.#", told_to(stays));
    let running = server.start().await.expect("it can subscribe");
    soon(running.unsubscribe("billing")).await.expect("it is subscribed");
    soon(running.unsubscribe("order.created")).await.expect("it is subscribed");
    let mut state = running.state();
    broker.take_down();
    soon(state.wait_for(|state| *state != State::Ready)).await.expect("it runs");
    broker.restore();
    soon(state.wait_for(|state| *state == State::Ready)).await.expect("it runs");
    let client = scene.client().await;
    publish(&client, 0..2).await;
    hears(&mut of_other, 0..2).await;
    running.drain().await;
    assert!(of_group.try_recv().is_err() && of_alone.try_recv().is_err());
}

#[tokio::test]
async fn an_ordered_group_is_not_unsubscribed_since_its_order_would_be_lost() {
    let scene = Scene::new();
    let ordered = Subscription::to("order.*").shared("billing").ordered_by(|event: &u64| *event);
    let (running, _) = hear(&scene, ordered).await;
    is_refused(running.unsubscribe("billing").await, &["`billing` is ordered", "drain"]);
}
