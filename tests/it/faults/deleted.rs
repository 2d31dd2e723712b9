//! Things that an operator deletes while servers run: exchanges, bindings, the queue of dead letters. The servers
//! notice and repair it.

use std::time::Duration;

use bytes::Bytes;
use hopline::transport::{Confirm, Mode, Properties, Publication, Settle};
use hopline::{Client, Code, Context, DeadLetters, Error, Fault, Method, Running, Service, State, WhichLetters};
use tokio::sync::mpsc;

use super::LONG;
use super::node::{Shared, shared};
use crate::node::{Queue, when};
use crate::support::{Held, Scene, hold, soon};

/// How long a broadcast waits for answers.
const WINDOW: Duration = Duration::from_millis(500);

/// A server with a service and a subscription, and the calls and events that reach them.
struct Site {
    running: Running,
    held: Held,
    events: mpsc::UnboundedReceiver<String>,
}

async fn site(scene: &Scene) -> Site {
    let (tell, events) = mpsc::unbounded_channel();
    let held = Held::new();
    let Held { service, arrived } = held;
    let server = scene.server().await.serve(service).subscribe("order.#", move |_: Context, event: String| {
        tell.send(event).expect("the test listens");
        async {}
    });
    let running = server.start().await.expect("it can be served");
    Site { running, held: Held { service: Service::new("none", 1), arrived }, events }
}

/// Checks that everything that goes through an exchange works again after a while.
async fn all_works(client: &Client, site: &mut Site) {
    let arrived = &mut site.held.arrived;
    let release = async {
        while let Some(arrival) = arrived.recv().await {
            arrival.release();
        }
    };
    let instance = site.running.instance().to_owned();
    let works = async {
        while hold(client, 1).await.is_err() {}
        while hold(client, 2).to(&instance).await.is_err() {}
        while client.oneway("held", "hold", (3,)).send().await.is_err() {}
        while !matches!(&*hold(client, 4).all().gather(WINDOW).await.unwrap_or_default(), [reply] if reply.outcome.is_ok())
        {
        }
        while client.registry().total(WINDOW).services().await.unwrap_or_default().is_empty() {}
    };
    tokio::select! {
        () = soon(works) => {}
        () = release => panic!("it serves"),
    }
    // A publisher is not told whether anybody subscribes.
    let events = &mut site.events;
    let published = async {
        loop {
            // If the exchange is gone, the publisher gets an error.
            let _ = client.publish("order.created", "again").await;
            if tokio::time::timeout(WINDOW, events.recv()).await.is_ok() {
                return;
            }
        }
    };
    soon(published).await;
    // A cancel goes to all instances, through an exchange.
    let pending = hold(client, 5).timeout(LONG).start().await.expect("on its way");
    let arrival = loop {
        let arrival = soon(site.held.arrived.recv()).await.expect("it serves");
        if arrival.number == 5 {
            break arrival;
        }
    };
    drop(pending);
    soon(arrival.context.cancelled()).await;
}

/// The queue in a namespace that belongs to one connection, as the broker lists it.
async fn own_queue(node: &Shared, scene: &Scene, part: &str) -> String {
    let begins = format!("{}.{part}", scene.namespace);
    let is_it = |queue: &&Queue| queue.name.starts_with(&begins);
    let queues = node.queues_when(|queues| queues.iter().any(|queue| is_it(&queue))).await;
    queues.iter().find(is_it).expect("it was there").name.clone()
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn exchanges_that_are_deleted_are_there_again_with_all_that_was_bound() {
    let node = shared().await;
    let scene = node.scene();
    let mut site = site(&scene).await;
    let client = scene.client().await;
    all_works(&client, &mut site).await;
    for exchange in ["rpc", "oneway", "events", "discovery"] {
        node.delete_exchange(&format!("{}.{exchange}", scene.namespace)).await;
        all_works(&client, &mut site).await;
        // A client that connects in the meantime is served as well.
        all_works(&scene.client().await, &mut site).await;
    }
    drop(client);
    soon(site.running.drain()).await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn bindings_that_are_deleted_are_there_again() {
    let node = shared().await;
    let scene = node.scene();
    let mut site = site(&scene).await;
    let client = scene.client().await;
    let name = |part: &str| format!("{}.{part}", scene.namespace);
    let (own, events) = (own_queue(&node, &scene, "held.v1@").await, own_queue(&node, &scene, "events@").await);
    let instance = format!("held.v1@{}", site.running.instance());
    for (exchange, key, queue) in [
        ("rpc", "held.v1", name("held.v1.calls")),
        ("rpc", &instance, own.clone()),
        ("oneway", "held.v1.hold", name("held.v1.work")),
        ("events", "order.#", events),
        ("rpc", "held.v1@*", own.clone()),
        ("rpc", "held.v1@?", own.clone()),
        ("discovery", "ask", own),
    ] {
        node.unbind(&name(exchange), key, &queue).await;
        all_works(&client, &mut site).await;
    }
    drop(client);
    soon(site.running.drain()).await;
    node.nothing_left().await;
}

/// A service whose oneway calls fail in a way that no other attempt can help.
fn hopeless() -> Service {
    let refuse = |_: Context, _: (u64,)| async { Err::<(), _>(Fault::new(Code::InvalidArgument, "never")) };
    Service::new("hopeless", 1).method(Method::new("job").oneway(), refuse)
}

async fn dead_letters(scene: &Scene) -> DeadLetters {
    DeadLetters::builder()
        .namespace(&scene.namespace)
        .connect(&scene.url, "hopeless")
        .await
        .expect("the broker is there")
}

async fn counted(dead: &DeadLetters) -> u64 {
    match dead.count().await {
        Err(Error::NoService { .. }) => 0,
        count => count.expect("the broker answers"),
    }
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_dead_letter_is_kept_though_its_queue_was_deleted() {
    let node = shared().await;
    let scene = node.scene();
    let running = scene.serve(hopeless()).await;
    node.delete_queue(&format!("{}.hopeless.v1.dead", scene.namespace)).await;
    let client = scene.client().await;
    client.oneway("hopeless", "job", (1,)).send().await.expect("the broker has it");
    let dead = dead_letters(&scene).await;
    when(async || counted(&dead).await, |count| *count == 1).await;
    drop(client);
    dead.close().await;
    soon(running.drain()).await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_service_whose_queue_of_dead_letters_was_deleted_is_counted_when_it_has_ended() {
    let node = shared().await;
    let scene = node.scene();
    let transport = scene.transport().await;
    let ask = |_: Context, _: [(); 0]| async { Ok::<_, Fault>(()) };
    // One service always has the queue of dead letters, the other only after its first letter.
    let service = Service::new("asked", 1).method("ask", ask);
    let running = scene.server().await.serve(hopeless()).serve(service).start().await.expect("it can be served");
    let client = scene.client().await;
    client.oneway("asked", "absent", [(); 0]).all().send().await.expect("the broker has it");
    scene.waiting(&transport, "asked.v1.dead", 1).await;
    for queue in ["asked.v1.dead", "hopeless.v1.dead", "services"] {
        node.delete_queue(&format!("{}.{queue}", scene.namespace)).await;
    }
    client.oneway("asked", "absent", [(); 0]).all().send().await.expect("the broker has it");
    scene.waiting(&transport, "asked.v1.dead", 1).await;
    // The server looks for the other queue every 30 s.
    scene.waiting(&transport, "services", 2).await;
    soon(running.drain()).await;
    assert_eq!(scene.counts().await, [("asked.v1".to_owned(), 1), ("hopeless.v1".to_owned(), 0)]);
    drop(client);
    transport.close().await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_dead_letter_that_its_queue_refuses_waits_until_it_is_taken_and_the_state_says_so() {
    let node = shared().await;
    let scene = node.scene();
    let running = scene.serve(hopeless()).await;
    let name = format!("{}.hopeless.v1.dead", scene.namespace);
    let full = r#"{"max-length": 2, "overflow": "reject-publish"}"#;
    node.ctl(&["set_policy", "full", &format!("^{}$", name.replace('.', "\\.")), full, "--apply-to", "queues"]).await;
    let client = scene.client().await;
    let mut state = running.state();
    let dead = dead_letters(&scene).await;
    let told = |state: &State| matches!(state, State::Degraded { reason, .. } if reason.contains(&name));
    // How many more messages a broker accepts before it refuses depends on the broker.
    let mut sent = 0;
    loop {
        client.oneway("hopeless", "job", (1,)).send().await.expect("the broker has it");
        sent += 1;
        tokio::select! {
            is_told = soon(state.wait_for(told)) => break drop(is_told.expect("it serves")),
            _ = when(async || counted(&dead).await, |count| *count == sent) => {}
        }
        assert!(sent < 100, "the queue takes everything");
    }
    // An operator makes room.
    soon(dead.discard(&WhichLetters::All, |_| {})).await.expect("they go");
    when(async || counted(&dead).await, |count| *count > 0).await;
    soon(state.wait_for(|state| *state == State::Ready)).await.expect("it serves");
    drop(client);
    dead.close().await;
    soon(running.drain()).await;
    node.ctl(&["clear_policy", "full"]).await;
    node.nothing_left().await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn what_the_broker_gives_up_itself_waits_for_the_queue_of_dead_letters_to_come_back() {
    let node = shared().await;
    // By default the broker tries again only every three minutes.
    node.eval("application:set_env(rabbit, dead_letter_worker_publisher_confirm_timeout, 1000).").await;
    let scene = node.scene();
    soon(scene.serve(hopeless()).await.drain()).await;
    node.delete_queue(&format!("{}.hopeless.v1.dead", scene.namespace)).await;
    let work = format!("{}.hopeless.v1.work", scene.namespace);
    let transport = scene.transport().await;
    let publication = Publication {
        exchange: String::new(),
        key: work.clone(),
        mandatory: true,
        properties: Properties { persistent: true, ..Properties::default() },
        body: Bytes::from_static(b"no frame"),
    };
    assert_eq!(soon(transport.publish(publication)).await, Ok(Confirm::Accepted));
    let mut consumer = transport.consume(&work, Mode::Settle { prefetch: 1 }).await.expect("it is there");
    soon(consumer.next()).await.expect("it comes").settle(Settle::Discard);
    consumer.cancel();
    assert!(soon(consumer.next()).await.is_none());
    let running = scene.serve(hopeless()).await;
    let dead = dead_letters(&scene).await;
    when(async || counted(&dead).await, |count| *count == 1).await;
    dead.close().await;
    transport.close().await;
    soon(running.drain()).await;
    node.nothing_left().await;
}
