//! A server that moves while calls and events arrive.

use std::future::IntoFuture as _;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use futures::FutureExt as _;
use tokio::sync::mpsc;

use super::*;
use crate::Subscription;
use crate::client::Client;
use crate::context::Context;
use crate::error::Fault;
use crate::server::reading::Topology;
use crate::server::{Running, Server};
use crate::service::{Method, Service};
use crate::transport::Dial;

/// A server whose connection a test moves, and what it has run.
struct Moved {
    url: String,
    client: Client,
    running: Running,
    supervisor: Supervisor,
    runs: Arc<AtomicU64>,
    held: mpsc::UnboundedReceiver<(Context, oneshot::Sender<()>)>,
    heard: Arc<Mutex<Vec<u64>>>,
}

impl Moved {
    async fn new() -> Self {
        let url = format!("memory://{}", Uuid::new_v4());
        let running = Server::connect(&url).await.expect("in memory").start().await.expect("it serves nothing");
        let mut supervisor = Supervisor::new(running.site.clone(), Dial::parse(&url).expect("a good address"));
        let (runs, heard) = (Arc::<AtomicU64>::default(), Arc::<Mutex<Vec<u64>>>::default());
        let (hold, held) = mpsc::unbounded_channel::<(Context, oneshot::Sender<()>)>();
        let hold_event = hold.clone();
        let (counted, noted) = (runs.clone(), heard.clone());
        let service = Service::new("work", 1)
            .method(Method::new("count").oneway(), move |_: Context, (): ()| {
                let runs = counted.fetch_add(1, Ordering::SeqCst) + 1;
                async move { Ok::<_, Fault>(runs) }
            })
            .method("hold", move |context: Context, (): ()| {
                let (release, released) = oneshot::channel();
                hold.send((context, release)).expect("the test listens");
                async move { released.await.map_err(|_| Fault::new(crate::Code::Internal, "the test let go of it")) }
            });
        let events = Subscription::to("tick").prefetch(4).into_service(move |_: Context, number: u64| {
            let noted = noted.clone();
            async move {
                // Calls that arrive in the meantime wait.
                tokio::time::sleep(Duration::from_millis(3)).await;
                noted.lock().expect("no panic").push(number);
            }
        });
        let slow = Subscription::to("slow").into_service(move |context: Context, (): ()| {
            let (release, released) = oneshot::channel();
            hold_event.send((context, release)).expect("the test listens");
            async move { drop(released.await) }
        });
        let id = |service: &Service| service.id.clone().expect("a name");
        supervisor.serve(id(&service), service).expect("it can be served");
        supervisor.subscribe(id(&events), events).expect("it can be served");
        supervisor.subscribe(id(&slow), slow).expect("it can be served");
        supervisor.start().await.expect("all is new");
        let client = Client::connect(&url).await.expect("in memory");
        Self { url, client, running, supervisor, runs, held, heard }
    }

    async fn move_on(&mut self) {
        let transport = Transport::connect(&self.url, Role::Server).await.expect("in memory");
        self.supervisor.move_to(transport).await.expect("all can be had there");
    }
}

/// Waits until a connection is closed.
async fn is_left(transport: &Transport) {
    while transport.count("any").await.is_ok() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn a_server_moves_while_calls_and_events_come_and_misses_and_repeats_none() {
    let mut moved = Moved::new().await;
    let (client, instance) = (moved.client.clone(), moved.running.instance().to_owned());
    let (enough, sent) = (CancellationToken::new(), AtomicU64::new(0));
    let load = async {
        while !enough.is_cancelled() {
            let number = sent.fetch_add(1, Ordering::SeqCst);
            client.publish("tick", &number).await.expect("it is subscribed to");
            client.call::<u64>("work", "count", ()).await.expect("answered");
            client.call::<u64>("work", "count", ()).to(&instance).await.expect("answered there");
            client.oneway("work", "count", ()).send().await.expect("it is kept");
            let answers = client.call::<u64>("work", "count", ()).all().gather(Duration::from_millis(5)).await;
            assert_eq!(answers.expect("it is asked").len(), 1, "{number}");
        }
    };
    let moves = async {
        for _ in 0..5 {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let old = moved.supervisor.reading.transport.clone();
            moved.move_on().await;
            is_left(&old).await;
        }
        enough.cancel();
    };
    tokio::join!(load, moves);
    let sent = sent.into_inner();
    while moved.heard.lock().expect("no panic").len() < sent as usize {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(*moved.heard.lock().expect("no panic"), (0..sent).collect::<Vec<_>>());
    // Oneway calls may run a moment later.
    while moved.runs.load(Ordering::SeqCst) < 4 * sent {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(moved.runs.load(Ordering::SeqCst), 4 * sent);
}

#[tokio::test(start_paused = true)]
async fn what_runs_as_a_server_moves_is_answered_and_cancelled_as_before() {
    let mut moved = Moved::new().await;
    let (client, instance) = (moved.client.clone(), moved.running.instance().to_owned());
    let old = moved.supervisor.reading.transport.clone();
    let mut pending = Vec::new();
    for _ in 0..2 {
        pending.push(client.call::<()>("work", "hold", ()).start().await.expect("on its way"));
        pending.push(client.call::<()>("work", "hold", ()).to(&instance).start().await.expect("on its way"));
    }
    let mut holds = Vec::new();
    for _ in 0..4 {
        holds.push(moved.held.recv().await.expect("it runs"));
    }
    moved.move_on().await;
    let mut left = std::pin::pin!(is_left(&old));
    // All other calls take less than a minute.
    assert!(tokio::time::timeout(Duration::from_secs(10), &mut left).await.is_err(), "calls run there");
    client.call::<u64>("work", "count", ()).await.expect("answered");
    drop(pending.drain(..2));
    let mut answered = 0;
    for (context, release) in holds {
        tokio::select! {
            () = context.cancelled() => {}
            () = tokio::time::sleep(Duration::from_secs(1)) => {
                release.send(()).expect("it runs");
                answered += 1;
            }
        }
    }
    assert_eq!(answered, 2);
    for pending in pending {
        pending.await.expect("answered");
    }
    left.await;
    assert!(client.call::<u64>("work", "count", ()).into_future().now_or_never().is_none(), "it takes a moment");
    client.call::<u64>("work", "count", ()).to(&instance).await.expect("answered");
}

#[tokio::test(start_paused = true)]
async fn a_move_that_cannot_be_made_leaves_all_as_it_was() {
    let mut moved = Moved::new().await;
    let (client, instance) = (moved.client.clone(), moved.running.instance().to_owned());
    let transport = Transport::connect(&moved.url, Role::Server).await.expect("in memory");
    let topology = moved.running.site.topology().lock().keys().copied().collect::<Vec<_>>();
    // The move gets as far as it can in one step. The supervisor drops it when the old connection is lost, or the
    // server drains.
    assert!(moved.supervisor.move_to(transport.clone()).now_or_never().is_none(), "it waits for answers");
    assert_eq!(moved.running.site.topology().lock().keys().copied().collect::<Vec<_>>(), topology);
    for _ in 0..10 {
        client.call::<u64>("work", "count", ()).await.expect("answered");
        client.call::<u64>("work", "count", ()).to(&instance).await.expect("answered there");
    }
    assert_eq!(moved.runs.load(Ordering::SeqCst), 20);
    is_left(&transport).await;
    client.publish("tick", &1_u64).await.expect("it is subscribed to");
    while moved.heard.lock().expect("no panic").is_empty() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    assert_eq!(*moved.heard.lock().expect("no panic"), [1]);
}

#[tokio::test(start_paused = true)]
async fn an_event_handler_that_runs_for_long_holds_up_no_other_subscription() {
    let mut moved = Moved::new().await;
    moved.client.publish("slow", &()).await.expect("it is subscribed to");
    let (_, release) = moved.held.recv().await.expect("it runs");
    moved.move_on().await;
    moved.client.publish("slow", &()).await.expect("it is subscribed to");
    moved.client.publish("tick", &1_u64).await.expect("it is subscribed to");
    let is_heard = async {
        while moved.heard.lock().expect("no panic").is_empty() {
            tokio::time::sleep(LOOK).await;
        }
    };
    tokio::time::timeout(600 * LOOK, is_heard).await.expect("it waits for no other");
    assert!(moved.held.recv().now_or_never().is_none(), "one after the other");
    release.send(()).expect("it runs");
    moved.held.recv().await.expect("it runs");
    assert_eq!(*moved.heard.lock().expect("no panic"), [1]);
}

#[tokio::test(start_paused = true)]
async fn while_a_call_of_before_runs_on_nothing_that_comes_after_the_move_is_remembered() {
    let mut moved = Moved::new().await;
    let old = moved.supervisor.reading.transport.clone();
    let pending = moved.client.call::<()>("work", "hold", ()).start().await.expect("on its way");
    let (_, release) = moved.held.recv().await.expect("it runs");
    moved.move_on().await;
    for number in 0..50 {
        moved.client.publish("tick", &number).await.expect("it is subscribed to");
        let answers = moved.client.call::<u64>("work", "count", ()).all().gather(LOOK).await;
        assert_eq!(answers.expect("it is asked").len(), 1);
    }
    while moved.heard.lock().expect("no panic").len() < 50 {
        tokio::time::sleep(LOOK).await;
    }
    for worker in moved.supervisor.workers() {
        assert_eq!(worker.copies().as_ref().map(Copies::awaited), Some(0), "{}", worker.name);
    }
    assert!(old.count("any").await.is_ok(), "the call runs there");
    release.send(()).expect("it runs");
    pending.await.expect("answered");
    is_left(&old).await;
}

#[tokio::test(start_paused = true)]
async fn as_a_server_moves_what_is_repaired_over_a_connection_is_what_it_has() {
    let mut moved = Moved::new().await;
    let (site, old) = (moved.running.site.clone(), moved.supervisor.reading.clone());
    let declared = |topology: &Topology| format!("{:?}", *topology.lock());
    let (before, workers) = (declared(&old.topology), moved.supervisor.workers());
    let own_queue = workers[0].own_queue();
    let transport = Transport::connect(&moved.url, Role::Server).await.expect("in memory");
    {
        let mut moving = std::pin::pin!(moved.supervisor.move_to(transport));
        while workers[0].own_queue() == own_queue {
            assert!(futures::poll!(&mut moving).is_pending(), "there are queues to be declared");
            tokio::task::yield_now().await;
        }
        assert_eq!(declared(&old.topology), before);
        assert_eq!(declared(&site.topology()), before, "a drain has to do with the connection that there is");
        moving.await.expect("all can be had there");
    }
    assert_eq!(declared(&old.topology), before);
    assert_eq!(declared(&site.topology()), declared(&moved.supervisor.reading.topology));
    assert_ne!(declared(&site.topology()), before);
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_leaving_a_connection_drains() {
    let mut moved = Moved::new().await;
    for number in 0..1_000_u64 {
        moved.client.publish("tick", &number).await.expect("it is subscribed to");
    }
    let old = moved.supervisor.reading.transport.clone();
    moved.move_on().await;
    tokio::time::sleep(10 * LOOK).await;
    assert!(old.count("any").await.is_ok(), "there are events to be read");
    tokio::time::timeout(Duration::from_secs(60), moved.running.drain()).await.expect("it ends");
    assert!(old.count("any").await.is_err(), "both connections are closed");
}

#[tokio::test(start_paused = true)]
async fn queues_that_answer_one_after_the_other_have_no_longer_than_one() {
    let mut answers = Answers::new();
    for number in 1..=4 {
        let (heard, answer) = oneshot::channel();
        answers.push(answer);
        tokio::spawn(async move {
            tokio::time::sleep(number * PATIENCE * 3 / 4).await;
            heard.send(Ok(()))
        });
    }
    let begun = Instant::now();
    assert!(matches!(all(&mut answers).await, Err(Error::Broker { .. })));
    assert_eq!(begun.elapsed(), PATIENCE);
}
