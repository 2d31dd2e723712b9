//! A steady load on a cluster: a server and a client at each node, and services whose calls wait on different nodes.

use std::future::IntoFuture as _;
use std::sync::Arc;
use std::time::Duration;

use futures::future::join_all;
use hopline::{Client, Code, Context, DeadLetters, Fault, Method, Running, Server, Service, State};
use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::super::LONG;
use super::ledger::{Kind, Ledger, Lost, Place};
use super::table::{HEADER, Row};
use crate::cluster::Cluster;
use crate::support::{PATIENCE, Scene, soon};

/// How long each call may take.
pub(super) const DEADLINE: Duration = Duration::from_secs(5);
/// How long it may take until everything is `Ready` after a node has come back.
const READY: Duration = Duration::from_secs(60);
/// The pause between two calls of one client to one service, and between two events.
const PACE: Duration = Duration::from_millis(50);
const EVENTS: Duration = Duration::from_millis(200);
/// The kinds of calls that one client makes, one after the other.
const MIX: [Kind; 20] = {
    use Kind::{Bad, Get, Note, Once};
    [Get, Once, Get, Get, Note, Get, Once, Get, Get, Note, Get, Once, Get, Get, Note, Get, Once, Get, Get, Bad]
};
/// How long the load runs before something is broken, and after everything is well again.
const CALM: Duration = Duration::from_secs(5);

/// What kind of queue the calls of a service wait in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Queue {
    /// The kind that its place says.
    Agreed,
    Quorum,
}

pub(super) struct Load {
    pub(super) scene: Scene,
    pub(super) ledger: Arc<Ledger>,
    pub(super) servers: Vec<(Place, Running)>,
    clients: Vec<Client>,
    stop: CancellationToken,
    calls: TaskTracker,
}

/// The name of the service whose calls wait there.
pub(super) fn name(place: Place) -> String {
    match place {
        Place::Quorum => "quorum".to_owned(),
        Place::On(node) => format!("on-{node}"),
        Place::Apart { from } => format!("apart-from-{from}"),
        Place::Changing => "changing".to_owned(),
    }
}

/// The service whose calls wait there. Its methods take a moment, so that a fault finds running calls.
pub(super) fn service(place: Place, ledger: &Arc<Ledger>) -> Service {
    let run = |ledger: &Arc<Ledger>| {
        let ledger = ledger.clone();
        move |_: Context, (number,): (usize,)| {
            ledger.runs(number);
            async move {
                tokio::time::sleep(Duration::from_millis(20)).await;
                Ok::<_, Fault>(number)
            }
        }
    };
    let refuse =
        |_: Context, (_,): (usize,)| async { Err::<(), _>(Fault::new(Code::InvalidArgument, "as it is asked")) };
    let service = Service::new(&name(place), 1)
        .method(Method::new("get").idempotent(), run(ledger))
        .method("once", run(ledger))
        .method(Method::new("note").oneway(), run(ledger))
        .method(Method::new("bad").oneway(), refuse);
    if place == Place::Quorum { service.quorum() } else { service }
}

impl Load {
    /// Starts a load at all nodes of a cluster: a service with a quorum queue, and one with its queue on each of the
    /// nodes. They share servers and clients. A further service, `more`, has its own.
    pub(super) async fn start(cluster: &Cluster, more: Option<Place>) -> Self {
        Self::by_way_of([0, 1, 2].map(|node| cluster.url(node)), more).await
    }

    /// The same with these URLs. Each begins with another node.
    pub(super) async fn by_way_of(urls: [String; 3], more: Option<Place>) -> Self {
        let scene = Scene::at(&*urls[0]);
        let mut groups = vec![vec![Place::Quorum, Place::On(0), Place::On(1), Place::On(2)]];
        groups.extend(more.map(|place| vec![place]));
        let ledger = Ledger::new(groups.concat());
        for &place in ledger.places() {
            // A classic queue is on the node where it was declared, and stays for its grace period.
            let node = match place {
                Place::On(node) => node,
                Place::Apart { from } => (from + 1) % 3,
                Place::Quorum | Place::Changing => continue,
            };
            let there = scene.by_way_of(&urls[node]);
            soon(there.serve(service(place, &ledger)).await.drain()).await;
        }
        let mut load = Self {
            scene,
            ledger,
            servers: Vec::new(),
            clients: Vec::new(),
            stop: CancellationToken::new(),
            calls: TaskTracker::new(),
        };
        let spots: Vec<_> =
            groups.iter().flat_map(|group| urls.iter().enumerate().map(move |at| (group, at))).collect();
        let spots = spots.into_iter().filter(|(group, (node, _))| **group != [Place::Apart { from: *node }]);
        let spots: Vec<_> = spots.collect();
        for (group, (node, url)) in &spots {
            load.serve(*node, url, group, Queue::Agreed).await;
        }
        for (group, (node, url)) in &spots {
            let client = load.scene.by_way_of(*url).client().await;
            for &place in *group {
                load.calls.spawn(load.caller(client.clone()).call(place));
            }
            if group.contains(&Place::Quorum) {
                load.calls.spawn(load.caller(client.clone()).publish(*node));
            }
            load.clients.push(client);
        }
        let (ledger, stop) = (load.ledger.clone(), load.stop.clone());
        load.calls.spawn(async move { ledger.control(&stop).await });
        load.calm().await;
        load
    }

    /// A server with the services of these places, and with a subscription.
    async fn serve(&mut self, node: usize, url: &str, places: &[Place], queue: Queue) {
        let server = Server::builder().namespace(&self.scene.namespace).name(format!("at-{node}"));
        let mut server = server.connect(url).await.expect("the node is there");
        for &place in places {
            let service = service(place, &self.ledger);
            server = server.serve(if queue == Queue::Quorum { service.quorum() } else { service });
        }
        let is_for_all = places.contains(&Place::Quorum);
        if is_for_all {
            let ledger = self.ledger.clone();
            server = server.subscribe("event", move |_: Context, number: usize| {
                ledger.hears(number, node);
                async {}
            });
        }
        let server = server.start().await.expect("all can be served");
        if is_for_all {
            let (ledger, state) = (self.ledger.clone(), server.state());
            tokio::spawn(async move { ledger.watch(node, state).await });
        }
        self.servers.push((places[0], server));
    }

    fn caller(&self, client: Client) -> Caller {
        Caller { client, ledger: self.ledger.clone(), stop: self.stop.clone(), calls: self.calls.clone() }
    }

    /// Starts instances of a service at all nodes, now with a quorum queue.
    pub(super) async fn serves_as_quorum(&mut self, cluster: &Cluster, place: Place) {
        for node in 0..3 {
            self.serve(node, &cluster.url(node), &[place], Queue::Quorum).await;
        }
    }

    /// Drains the instances of a service that has its own servers.
    pub(super) async fn drains(&mut self, place: Place) {
        let (gone, stay) = std::mem::take(&mut self.servers).into_iter().partition(|(of, _)| *of == place);
        self.servers = stay;
        let drained: Vec<(Place, Running)> = gone;
        join_all(drained.into_iter().map(|(_, server)| soon(server.drain()))).await;
    }

    /// Lets the load run for this time: so long does a fault last.
    pub(super) async fn goes_on(&self, time: Duration) {
        tokio::time::sleep(time).await;
    }

    pub(super) async fn calm(&self) {
        self.goes_on(CALM).await;
    }

    /// Records that this is missing from now on, until [`is_back`](Self::is_back).
    pub(super) fn loses(&self, lost: Lost) {
        self.ledger.loses(lost);
    }

    /// Records that it is back. Waits until everything is `Ready`, at most a minute, and lets the load run a little
    /// longer.
    pub(super) async fn is_back(&self) {
        let since = Instant::now();
        let states =
            self.servers.iter().map(|(_, server)| server.state()).chain(self.clients.iter().map(Client::state));
        let ready = states.map(async |mut state: watch::Receiver<State>| {
            let up = timeout(READY, state.wait_for(|state| *state == State::Ready)).await.map(drop);
            assert!(up.is_ok(), "after {READY:?} it still is {:?}", *state.borrow());
        });
        join_all(ready).await;
        self.ledger.is_back(since);
        self.calm().await;
    }

    /// Ends the load, waits for the outcomes, and sums them up.
    ///
    /// # Panics
    /// If a promise was broken that has to hold whatever happens to a cluster.
    pub(super) async fn ends(self, what: &str) -> Row {
        self.stop.cancel();
        self.calls.close();
        soon(self.calls.wait()).await;
        // RabbitMQ 4.3 keeps the deliveries of a lost consumer for it for a minute.
        let is_run = timeout(LONG, self.ledger.is_run()).await;
        let is_heard = timeout(PATIENCE, self.ledger.is_heard()).await;
        let is_kept = timeout(LONG, self.is_kept()).await;
        let row = self.ledger.row(what);
        println!("{HEADER}\n{row:#}");
        is_run.unwrap_or_else(|_| panic!("oneway calls are lost: {row}"));
        is_heard.unwrap_or_else(|_| panic!("events are lost: {}: {row}", row.missed));
        is_kept.unwrap_or_else(|_| panic!("dead letters are lost: {row}"));
        row.no_promise_is_broken();
        drop(self.clients);
        for (_, server) in self.servers {
            soon(server.drain()).await;
        }
        row
    }

    /// Waits until all oneway calls that cannot be run are dead letters.
    async fn is_kept(&self) {
        let builder = || DeadLetters::builder().namespace(&self.scene.namespace);
        for place in self.ledger.places() {
            let dead = builder().connect(&self.scene.url, &name(*place)).await.expect("a node is there");
            let mut pause = interval(Duration::from_secs(1));
            loop {
                pause.tick().await;
                let letters = dead.list(usize::MAX).await.expect("it answers");
                let numbers =
                    letters.letters.iter().map(|letter| letter.arguments.as_ref().and_then(|of| of[0].as_u64()));
                let numbers = numbers.map(|number| number.expect("it can be read"));
                if self.ledger.keeps(*place, numbers.map(|number| usize::try_from(number).expect("a number of ours"))) {
                    break;
                }
            }
        }
    }
}

/// A client, and how it calls.
struct Caller {
    client: Client,
    ledger: Arc<Ledger>,
    stop: CancellationToken,
    calls: TaskTracker,
}

impl Caller {
    /// Does something at a steady pace, whatever happens.
    async fn steadily(&self, pace: Duration, mut each: impl FnMut()) {
        let mut pace = interval(pace);
        pace.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = self.stop.cancelled() => return,
                _ = pace.tick() => each(),
            }
        }
    }

    /// Calls the service of one place.
    async fn call(self, place: Place) {
        let (service, mut mix) = (name(place), MIX.into_iter().cycle());
        let each = || {
            let kind = mix.next().expect("it is endless");
            let (number, ledger) = (self.ledger.sends(place, kind), self.ledger.clone());
            match kind {
                Kind::Get | Kind::Once => {
                    let method = if kind == Kind::Get { "get" } else { "once" };
                    let call = self.client.call::<usize>(&service, method, (number,)).timeout(DEADLINE);
                    let call = if kind == Kind::Get { call.idempotent() } else { call };
                    let call = call.into_future();
                    self.calls.spawn(async move {
                        let outcome = call.await.map(|answer| assert_eq!(answer, number));
                        ledger.ends(number, outcome);
                    });
                }
                Kind::Note | Kind::Bad => {
                    let method = if kind == Kind::Note { "note" } else { "bad" };
                    let call = self.client.oneway(&service, method, (number,)).timeout(DEADLINE);
                    self.calls.spawn(async move { ledger.ends(number, call.send().await) });
                }
            }
        };
        self.steadily(PACE, each).await;
    }

    /// Publishes events from a node.
    async fn publish(self, node: usize) {
        let each = || {
            let (ledger, client) = (self.ledger.clone(), self.client.clone());
            let number = ledger.publishes(node);
            self.calls.spawn(async move { ledger.is_published(number, client.publish("event", &number).await) });
        };
        self.steadily(EVENTS, each).await;
    }
}
