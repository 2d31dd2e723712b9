//! Moving: a server that is connected to another than its first address returns there when it can, while calls run.
//!
//! Everything is declared and consumed over the new connection first. If that fails, the new connection is closed, and
//! the server stays where it is. Otherwise replies are sent over the new connection. The old one is closed when
//! everything that it has delivered is done.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures::StreamExt as _;
use futures::future::join_all;
use tokio::sync::oneshot;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, info};
use uuid::Uuid;

use super::Site;
use super::copies::Copies;
use super::keeper::{Away, Start, bindings};
use super::message::Source;
use super::reading::{Place, Reading};
use super::supervisor::{Answers, Supervisor};
use super::worker::Worker;
use crate::codec::Codec;
use crate::error::Error;
use crate::frame::{Frame, Kind, Metadata};
use crate::route::to_queue;
use crate::state::State;
use crate::topology::{Declaration, Queue};
use crate::transport::{Properties, Publication, Role, Transport, next_look_back};

/// How long the broker may take to declare all queues, and then to begin all consumers. If it takes longer, the server
/// stays where it is. This is shorter than the time after which the state would tell of it.
const PATIENCE: Duration = Duration::from_secs(2);
/// How often the server checks whether an instance's own queue on the old connection is empty.
const LOOK: Duration = Duration::from_millis(100);

/// A move that is going on. If it is given up, the new connection is left in the same way as the old one is after a
/// success.
struct Move {
    site: Arc<Site>,
    workers: Vec<Arc<Worker>>,
    /// The connection to move to.
    new: Arc<Reading>,
    /// Ends the tasks of the new connection, unless the move succeeds.
    lost: CancellationToken,
    /// One for each worker. It is cancelled when all events of the old connection are handled; only then are those of
    /// the new one consumed, so that events stay in order.
    old_events_are_read: Vec<CancellationToken>,
    /// The instance's own queues on the old connection. `None` after a success.
    before: Option<Vec<Arc<str>>>,
}

impl Move {
    /// Begins a move. From now on calls may arrive over both connections, so copies are looked for.
    fn between(old: &Reading, new: Arc<Reading>, site: Arc<Site>, workers: Vec<Arc<Worker>>) -> Self {
        let before = Some(workers.iter().map(|worker| worker.own_queue()).collect());
        for worker in &workers {
            *worker.copies() = Some(Copies::of(old.connection, new.connection));
        }
        let old_events_are_read = workers.iter().map(|_| CancellationToken::new()).collect();
        let lost = CancellationToken::new();
        Self { site, workers, new, lost, old_events_are_read, before }
    }

    /// The move has succeeded: leaves the old connection. Returns what ends the tasks of the new one.
    fn succeeded(mut self, old: Arc<Reading>) -> CancellationToken {
        self.before = None;
        self.leave(old);
        self.lost.clone()
    }

    /// Leaves a connection on a task.
    fn leave(&self, reading: Arc<Reading>) {
        let events_are_read = self.old_events_are_read.iter().map(|read| read.clone().drop_guard()).collect();
        let leaving = Leaving { reading, workers: self.workers.clone() };
        self.site.own.spawn(leaving.leave(events_are_read));
    }
}

impl Drop for Move {
    /// Gives the move up, unless it has succeeded.
    fn drop(&mut self) {
        let Some(own_queues) = self.before.take() else { return };
        self.lost.cancel();
        for (worker, queue) in self.workers.iter().zip(&own_queues) {
            worker.answers_at(queue);
        }
        self.leave(self.new.clone());
    }
}

impl Supervisor {
    /// Moves to the first address if it can be reached and everything can be served there. Otherwise, and if this
    /// future is dropped, the server stays where it is.
    pub(super) async fn go_back(&mut self) {
        let site = self.site.clone();
        self.look_at = next_look_back();
        // This is not the time to move if something is wrong.
        if !self.dial.is_elsewhere(&self.reading.transport) || *site.health.state.borrow() != State::Ready {
            return;
        }
        let moved = match self.dial.connect_to_first(Role::Server).await {
            Ok(transport) => self.move_to(transport).await,
            Err(error) => Err(error),
        };
        match moved {
            Ok(()) => info!(name = &*site.name, broker = site.transport().broker(), "moved back to the first address"),
            Err(error) => debug!(name = &*site.name, %error, "the first address is not used yet"),
        }
    }

    /// Moves to this connection.
    async fn move_to(&mut self, transport: Transport) -> Result<(), Error> {
        let site = self.site.clone();
        let events = transport.events();
        if let Some(reason) = transport.blocked() {
            return Err(Error::Broker { operation: "take messages".to_owned(), reason: reason.to_string() });
        }
        transport.declare(&site.namespace.exchanges()).await?;
        // A drain unbinds everything that is in the topology. So it must not begin while this declares.
        let declaring = site.declaring.read().await;
        let new = self.reading_over(transport);
        // They are declared before the move, so they are dropped after it. The move's drop ends the keepers first.
        // Otherwise a keeper would see that nobody waits for its answer, and go on.
        let (mut declared, mut consumed) = (Answers::new(), Answers::new());
        let moving = Move::between(&self.reading, new.clone(), site.clone(), self.workers());

        let heard = |answers: &Answers| {
            let (heard, answer) = oneshot::channel();
            answers.push(answer);
            heard
        };
        let all_declared = CancellationToken::new();
        for keeper in self.keepers(&new) {
            let (all_declared, consumed) = match keeper.source {
                Source::Events => (moving.old_events_are_read[keeper.at].clone(), oneshot::channel().0),
                Source::Calls | Source::Work | Source::Instance => (all_declared.clone(), heard(&consumed)),
            };
            let start = Start { declared: heard(&declared), all_declared, consumed, away: Away::Refused };
            Self::until(&moving.lost, keeper.start(start));
        }
        all(&mut declared).await?;
        all_declared.cancel();
        all(&mut consumed).await?;

        // From here on the server serves over the new connection.
        self.events = events;
        let old = std::mem::replace(&mut self.reading, new);
        std::mem::replace(&mut self.lost, moving.succeeded(old)).cancel();
        site.serves_over(&self.reading);
        drop(declaring);
        self.keep_all_dead_letters();
        self.look_after();
        self.enter_ready();
        Ok(())
    }
}

/// Waits for the answers about all queues.
///
/// # Errors
/// The first refusal, or `Broker` if an answer does not come in time.
async fn all(answers: &mut Answers) -> Result<(), Error> {
    let late = |_| {
        let reason = format!("a queue has not answered within {PATIENCE:?}");
        Error::Broker { operation: "have all queues read there".to_owned(), reason }
    };
    let until = Instant::now() + PATIENCE;
    while let Some(answer) = tokio::time::timeout_at(until, answers.next()).await.map_err(late)? {
        // A keeper that tells nothing has ended with its connection, which is noticed elsewhere.
        answer.unwrap_or(Ok(()))?;
    }
    Ok(())
}

/// A connection that the server leaves.
struct Leaving {
    reading: Arc<Reading>,
    workers: Vec<Arc<Worker>>,
}

impl Leaving {
    /// Reads what is left in queues that only this server consumes, waits for running calls, and closes the connection.
    /// Each worker's events are consumed over the other connection when its guard is dropped.
    async fn leave(self, events_are_read: Vec<DropGuard>) {
        let own = async {
            let bindings = {
                let declared = self.reading.topology.lock();
                let own =
                    declared.iter().filter(|((_, source), _)| matches!(source, Source::Instance | Source::Events));
                bindings(own.flat_map(|(_, declared)| &declared.parts))
            };
            // If this fails, the queues end with the connection, and so does what is in them.
            let is_unbound = self.reading.transport.unbind(&bindings).await.is_ok();
            let each = events_are_read.into_iter().enumerate().map(async |(at, events_are_read)| {
                match self.workers[at].service.pattern {
                    Some(_) => self.leave_events((at, Source::Events), is_unbound).await,
                    None => self.leave_instance((at, Source::Instance), is_unbound).await,
                }
                drop(events_are_read);
            });
            join_all(each).await;
        };
        // The own queue is consumed until the calls have ended, since cancels and questions about these calls arrive
        // there.
        tokio::join!(own, self.end(Source::Calls), self.end(Source::Work));
        self.end(Source::Instance).await;
        (0..self.workers.len()).for_each(|at| self.is_left(at));
        self.reading.transport.close().await;
    }

    /// Reads the rest of a subscription's queue, and ends its consumption.
    async fn leave_events(&self, place: Place, is_unbound: bool) {
        if is_unbound {
            self.is_read_empty(place).await;
        }
        self.reading.part(place).end().await;
        self.is_left(place.0);
    }

    /// Reads the instance's own queue until it is empty. It is then still consumed, for what is sent directly to it.
    async fn leave_instance(&self, place: Place, is_unbound: bool) {
        if !is_unbound {
            return;
        }
        let Some(queue) = self.is_read_empty(place).await else { return self.is_left(place.0) };
        let last = Uuid::new_v4();
        if let Some(copies) = self.workers[place.0].copies().as_mut() {
            copies.is_left_after(last, self.reading.connection);
        }
        // This message is behind all copies in the queue. When it arrives, all copies have been seen.
        let body = Frame::new(Kind::Cancel, last, Codec::Raw, Metadata::default(), Bytes::new()).to_body();
        // If it is lost, the copies are forgotten when the connection ends.
        let told = Publication { mandatory: false, ..to_queue(queue, Properties::default(), body) };
        drop(self.reading.transport.publish(told));
    }

    /// Waits until an instance's own queue is empty, and returns its name. `None` if it is not consumed any more.
    async fn is_read_empty(&self, place: Place) -> Option<String> {
        let queue = self.reading.topology.lock().get(&place).and_then(|declared| {
            declared.parts.iter().find_map(|part| match part {
                Declaration::Queue(Queue { name, .. }) => Some(name.clone()),
                Declaration::Exchange(_) | Declaration::Binding(_) => None,
            })
        })?;
        let part = self.reading.part(place);
        part.tasks.close();
        let is_empty = async {
            while matches!(self.reading.transport.count(&queue).await, Ok(Some(1..))) {
                tokio::time::sleep(LOOK).await;
            }
        };
        tokio::select! {
            biased;
            () = part.stop.cancelled() => None,
            () = part.tasks.wait() => None,
            () = is_empty => Some(queue),
        }
    }

    /// Ends the consumption of all queues of a kind, and waits until everything from them is done.
    async fn end(&self, source: Source) {
        join_all((0..self.workers.len()).map(async |at| self.reading.part((at, source)).end().await)).await;
    }

    /// Nothing more arrives over this connection for a worker, so its copies are forgotten.
    fn is_left(&self, at: usize) {
        if let Some(copies) = self.workers[at].copies().as_mut() {
            copies.is_left(self.reading.connection);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::IntoFuture as _;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicU64, Ordering};

    use futures::FutureExt as _;
    use tokio::sync::mpsc;

    use super::*;
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
            let events = Service::new("events", 1)
                .event(super::super::worker::EVENT, move |_: Context, number: u64| {
                    let noted = noted.clone();
                    async move {
                        // Calls that arrive in the meantime wait.
                        tokio::time::sleep(Duration::from_millis(3)).await;
                        noted.lock().expect("no panic").push(number);
                    }
                })
                .prefetch(4)
                .dispatch(crate::Dispatch::Inline)
                .of_pattern("tick");
            let slow = Service::new("events", 1)
                .event(super::super::worker::EVENT, move |context: Context, (): ()| {
                    let (release, released) = oneshot::channel();
                    hold_event.send((context, release)).expect("the test listens");
                    async move { drop(released.await) }
                })
                .dispatch(crate::Dispatch::Inline)
                .of_pattern("slow");
            let id = |service: &Service| service.id.clone().expect("a name");
            supervisor.serve(id(&service), service).expect("it can be served");
            supervisor.subscribe("tick".to_owned(), id(&events), events).expect("it can be served");
            supervisor.subscribe("slow".to_owned(), id(&slow), slow).expect("it can be served");
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
}
