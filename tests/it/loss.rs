//! What becomes of calls when connections, channels, queues and exchanges are lost, on a broker in memory whose time is
//! virtual: each path is walked without a node, and nothing waits in vain.

use std::future::IntoFuture as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures::future::join_all;
use futures::{FutureExt as _, StreamExt as _};
use hopline::testing::Broker;
use hopline::transport::{ConsumerEnd, memory};
use hopline::{
    Client, Code, Context, DeadLetters, Error, Fault, Invocation, Method, Middleware, Pending, Running, Service, State,
};
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::support::{Arrival, Held, Scene, code, hold, soon};

/// Longer than any test takes, of the time that passes in it.
const LONG: Duration = Duration::from_secs(3600);

/// A service whose calls a test holds, its server, and a client; and their broker.
struct Stage {
    scene: Scene,
    broker: Broker,
    server: Running,
    client: Client,
    arrived: mpsc::UnboundedReceiver<Arrival>,
}

impl Stage {
    async fn new(method: Method) -> Self {
        Self::with(method, "").await
    }

    /// A server that is logged in as this user, with its `@`.
    async fn with(method: Method, user: &str) -> Self {
        let (scene, broker) = Scene::alone();
        let Held { service, arrived } = Held::of(method);
        let url = broker.url().replace("memory://", &format!("memory://{user}"));
        let server = scene.by_way_of(url).serve(service).await;
        let client = Client::builder().namespace(&scene.namespace).timeout(LONG).connect(&broker).await;
        Self { scene, broker, server, client: client.expect("it is there"), arrived }
    }

    /// Methods that may run twice, or not, and oneway ones.
    async fn of_requests() -> Self {
        Self::new(Method::new("hold")).await
    }

    /// The same, and the server is logged in as `worker`, so that its connections can be cut alone.
    async fn of_a_worker() -> Self {
        Self::with(Method::new("hold").oneway(), "worker@").await
    }

    /// What no program does to its broker.
    fn innards(&self) -> Arc<memory::MemoryBroker> {
        memory::MemoryBroker::named(self.broker.url().trim_start_matches("memory://"))
    }

    fn queue(&self, name: &str) -> String {
        format!("{}.{name}", self.scene.namespace)
    }

    async fn arrival(&mut self) -> Arrival {
        soon(self.arrived.recv()).await.expect("it runs")
    }

    /// Lets the next call that arrives run, which is to be this one.
    async fn runs(&mut self, pending: Pending<u64>, number: u64) {
        let arrival = self.arrival().await;
        assert_eq!(arrival.number, number, "no other one runs");
        arrival.release();
        assert_eq!(soon(pending).await.expect("answered"), number);
    }

    /// Waits until the client and the server are connected.
    async fn are_back(&self) {
        for mut state in [self.client.state(), self.server.state()] {
            soon(state.wait_for(|state| *state == State::Ready)).await.expect("it is told");
        }
    }

    /// Loses all connections, and waits until both sides have heard it.
    async fn cut(&self) {
        both_hear(&self.client, &self.server, || self.broker.cut()).await;
    }

    /// The same, and nobody can connect.
    async fn take_down(&self) {
        both_hear(&self.client, &self.server, || self.broker.take_down()).await;
    }
}

/// Waits until a client and a server have heard of the loss of their connections.
async fn both_hear(client: &Client, server: &Running, loss: impl FnOnce()) {
    let mut states = [client.state(), server.state()];
    states.iter_mut().for_each(|state| drop(state.borrow_and_update()));
    loss();
    for mut state in states {
        soon(state.changed()).await.expect("it is told");
    }
}

/// Waits until a server has heard of the loss of its connections.
async fn hears(server: &Running, loss: impl FnOnce()) {
    let mut state = server.state();
    state.borrow_and_update();
    loss();
    soon(state.changed()).await.expect("it is told");
}

fn may_have_run<T>(outcome: Result<T, Error>) -> bool {
    match outcome {
        Err(Error::Disconnected { may_have_run, .. }) => may_have_run,
        Err(other) => panic!("not for want of a connection: {other:?}"),
        Ok(_) => panic!("it was answered"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_call_that_a_handler_runs_at_a_cut_goes_again_if_it_may_and_ends_at_once_if_not() {
    let mut stage = Stage::of_requests().await;
    let again = hold(&stage.client, 1).idempotent().start().await.expect("on its way");
    let once = hold(&stage.client, 2).start().await.expect("on its way");
    let running = [stage.arrival().await, stage.arrival().await];
    let began = Instant::now();
    stage.cut().await;
    assert!(may_have_run(soon(once).await));
    assert!(began.elapsed() < Duration::from_secs(5), "it waits for nothing: {:?}", began.elapsed());
    stage.are_back().await;
    running.into_iter().for_each(Arrival::release);
    // It comes to the same server again, which may run it once more.
    let mut answer = Box::pin(soon(again));
    let answered = loop {
        tokio::select! {
            answered = &mut answer => break answered,
            Some(arrival) = stage.arrived.recv() => arrival.release(),
        }
    };
    assert_eq!(answered.expect("answered"), 1);
}

#[tokio::test(start_paused = true)]
async fn what_has_not_left_waits_for_a_connection_until_its_deadline_and_has_not_run() {
    let mut stage = Stage::of_requests().await;
    stage.take_down().await;
    let patient = hold(&stage.client, 1).start().await.expect("it waits");
    // Before the queue is gone that nobody has consumed for a minute.
    let hasty = hold(&stage.client, 2).timeout(Duration::from_secs(20)).start().await.expect("it waits");
    assert!(!may_have_run(hasty.await));
    stage.broker.restore();
    stage.runs(patient, 1).await;
    assert!(stage.arrived.try_recv().is_err(), "the other one has run");
}

#[tokio::test(start_paused = true)]
async fn what_was_handed_over_and_not_taken_at_a_cut_may_have_run() {
    let mut stage = Stage::of_requests().await;
    stage.broker.stall();
    let once = hold(&stage.client, 1).start().await.expect("on its way");
    let again = hold(&stage.client, 2).idempotent().start().await.expect("on its way");
    // Both have left before the cut.
    while stage.client.traffic().calls_sent < 2 {
        tokio::task::yield_now().await;
    }
    stage.cut().await;
    stage.broker.restore();
    assert!(may_have_run(soon(once).await));
    stage.runs(again, 2).await;
}

#[tokio::test(start_paused = true)]
async fn a_oneway_call_or_an_event_without_a_confirm_goes_again() {
    let mut stage = Stage::new(Method::new("hold").oneway()).await;
    let (heard, mut events) = mpsc::unbounded_channel();
    let listener = stage.scene.server().await.subscribe("order.*", move |_: Context, number: u64| {
        heard.send(number).expect("the test listens");
        async {}
    });
    let _listener = listener.start().await.expect("it can be served");
    stage.broker.stall();
    let client = stage.client.clone();
    let sent = tokio::spawn(async move {
        let (sent, published) =
            tokio::join!(client.oneway("held", "hold", (1,)).send(), client.publish("order.new", &2_u64));
        sent.map(drop).and(published.map(drop))
    });
    while stage.client.traffic().calls_sent < 2 {
        tokio::task::yield_now().await;
    }
    stage.cut().await;
    assert!(!sent.is_finished(), "the broker has not said that it has them");
    stage.broker.restore();
    soon(sent).await.expect("no panic").expect("the broker has both");
    let arrival = stage.arrival().await;
    assert_eq!(arrival.number, 1);
    arrival.release();
    // The listener may not be back yet: who is not there hears nothing.
    let heard = tokio::time::timeout(Duration::from_secs(60), events.recv()).await;
    assert!(matches!(heard, Ok(Some(2)) | Err(_)), "{heard:?}");
}

#[tokio::test(start_paused = true)]
async fn an_event_that_comes_back_when_it_is_sent_again_may_have_reached_somebody_before() {
    let stage = Stage::of_requests().await;
    stage.broker.stall();
    let event = tokio::spawn(stage.client.publish("order.new", &1_u64).required());
    while stage.client.traffic().calls_sent < 1 {
        tokio::task::yield_now().await;
    }
    stage.cut().await;
    stage.broker.restore();
    match soon(event).await.expect("no panic") {
        Err(Error::Disconnected { method, may_have_run: true, reason, .. }) => {
            assert_eq!(method.as_deref(), Some("order.new"));
            assert!(reason.contains("no queue took it when it was sent again"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_broadcast_ends_with_its_connection_after_the_replies_that_came() {
    let mut stage = Stage::of_requests().await;
    let Held { service, arrived: mut others } = Held::new();
    let _other = stage.scene.serve(service).await;
    let mut replies = hold(&stage.client, 7).all().replies(LONG).await.expect("on its way");
    stage.arrival().await.release();
    let _unanswered = soon(others.recv()).await.expect("it runs");
    let first = soon(replies.next()).await.expect("it answers");
    assert_eq!(first.outcome.expect("answered"), 7);
    let gathering = tokio::spawn(hold(&stage.client, 8).all().gather(LONG));
    let _held = [stage.arrival().await, soon(others.recv()).await.expect("it runs")];
    stage.cut().await;
    let last = soon(replies.next()).await.expect("why nothing more can come");
    assert!(may_have_run(last.outcome));
    assert!(soon(replies.next()).await.is_none());
    assert!(may_have_run(soon(gathering).await.expect("no panic")));
}

#[tokio::test(start_paused = true)]
async fn a_server_that_is_cut_off_gives_nothing_up_and_answers_over_the_next_connection() {
    let stage = Stage::of_a_worker().await;
    let innards = stage.innards();
    let Stage { server, client, mut arrived, .. } = stage;
    for idempotent in [false, true] {
        let call = hold(&client, 1);
        let call = if idempotent { call.idempotent() } else { call };
        let pending = call.start().await.expect("on its way");
        let running = soon(arrived.recv()).await.expect("it runs");
        hears(&server, || innards.cut_user("worker")).await;
        assert!(!running.context.is_cancelled(), "it goes on");
        running.release();
        // Its caller has lost nothing, and hears what came of the call.
        assert_eq!(soon(pending).await.expect("answered"), 1);
        assert!(arrived.try_recv().is_err(), "it has not run twice");
        soon(server.state().wait_for(|state| *state == State::Ready)).await.expect("it is told");
    }
    let next = hold(&client, 2).start().await.expect("on its way");
    soon(arrived.recv()).await.expect("it serves").release();
    assert_eq!(soon(next).await.expect("answered"), 2);
}

/// Admits one call, and says to all others that they come too soon.
#[derive(Default)]
struct One(AtomicBool);

impl Middleware for One {
    fn admit(&self, _: &Invocation) -> Result<(), Fault> {
        match self.0.swap(true, Ordering::Relaxed) {
            false => Ok(()),
            true => Err(Fault::new(Code::ResourceExhausted, "too soon")),
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_oneway_call_that_runs_at_a_cut_is_not_refused_for_now_when_it_comes_again() {
    let (scene, broker) = Scene::alone();
    let Held { service, mut arrived } = Held::of(Method::new("hold").oneway().attempts(2));
    let url = broker.url().replace("memory://", "memory://worker@");
    let server = scene.by_way_of(url).serve(service.with(One::default())).await;
    let client = scene.client().await;
    client.oneway("held", "hold", (1_u64,)).send().await.expect("the broker has it");
    let running = soon(arrived.recv()).await.expect("it runs");
    let innards = memory::MemoryBroker::named(broker.url().trim_start_matches("memory://"));
    hears(&server, || innards.cut_user("worker")).await;
    soon(server.state().wait_for(|state| *state == State::Ready)).await.expect("it is told");
    // For longer than the pause before another attempt, and than it takes to ask who runs a call that comes again.
    tokio::time::sleep(Duration::from_secs(60)).await;
    running.release();
    soon(server.drain()).await;
    assert!(arrived.try_recv().is_err(), "it has run twice");
    let dead = DeadLetters::builder().namespace(&scene.namespace).connect(&broker, "held").await.expect("it is there");
    assert_eq!(dead.count().await.expect("it answers"), 0, "it has run, and is no dead letter");
}

#[tokio::test(start_paused = true)]
async fn a_reply_that_was_not_confirmed_at_a_cut_comes_over_the_next_connection() {
    let stage = Stage::of_a_worker().await;
    let innards = stage.innards();
    let Stage { server, client, broker, mut arrived, .. } = stage;
    let pending = hold(&client, 1).start().await.expect("on its way");
    let running = soon(arrived.recv()).await.expect("it runs");
    broker.stall();
    running.release();
    // The time is virtual: it is enough for the reply to leave.
    tokio::time::sleep(Duration::from_secs(1)).await;
    hears(&server, || innards.cut_user("worker")).await;
    broker.restore();
    assert_eq!(soon(pending).await.expect("answered"), 1);
    assert!(arrived.try_recv().is_err(), "it has not run twice");
}

#[tokio::test(start_paused = true)]
async fn what_is_lost_with_a_channel_goes_again_some_times_and_then_says_that_it_may_have_run() {
    let mut stage = Stage::of_requests().await;
    let innards = stage.innards();
    innards.stall_queue(&stage.queue("held.v1.calls"));
    let sent = |count| {
        let client = stage.client.clone();
        async move {
            while client.traffic().calls_sent < count {
                tokio::task::yield_now().await;
            }
        }
    };
    let once = hold(&stage.client, 1).start().await.expect("on its way");
    soon(sent(1)).await;
    innards.lose_publishing_channels();
    assert!(may_have_run(soon(once).await));
    let again = hold(&stage.client, 2).idempotent().start().await.expect("on its way");
    for attempt in 1..=5 {
        soon(sent(1 + attempt)).await;
        innards.lose_publishing_channels();
    }
    assert!(may_have_run(soon(again).await));
    let kept = hold(&stage.client, 3).idempotent().start().await.expect("on its way");
    soon(sent(7)).await;
    innards.lose_publishing_channels();
    stage.broker.restore();
    stage.runs(kept, 3).await;
}

#[tokio::test(start_paused = true)]
async fn a_queue_that_is_deleted_is_declared_again_and_its_calls_come_to_their_end() {
    let mut stage = Stage::of_requests().await;
    let running = hold(&stage.client, 1).start().await.expect("on its way");
    let held = stage.arrival().await;
    stage.innards().delete_queue(&stage.queue("held.v1.calls"));
    held.release();
    assert_eq!(soon(running).await.expect("it ran"), 1);
    // There is nobody for a moment, unless the server is faster.
    let next = async {
        loop {
            match hold(&stage.client, 2).await {
                Err(Error::NoService { .. } | Error::Unreachable { .. }) => {
                    // The time is virtual.
                    tokio::time::sleep(LONG / 3600).await;
                }
                answered => return answered,
            }
        }
    };
    let release = async {
        stage.arrived.recv().await.expect("it serves").release();
        std::future::pending::<()>().await
    };
    tokio::select! {
        answered = soon(next) => assert_eq!(answered.expect("answered"), 2),
        () = release => unreachable!("it goes on"),
    }
}

#[tokio::test(start_paused = true)]
async fn a_cancel_that_nobody_hears_is_sent_again_until_the_server_has_its_bindings_back() {
    let mut stage = Stage::of_requests().await;
    let pending = hold(&stage.client, 1).start().await.expect("on its way");
    let running = stage.arrival().await;
    // With it go the bindings of the instance's own queue.
    stage.innards().delete_exchange(&stage.queue("rpc"));
    drop(pending);
    tokio::time::timeout(Duration::from_secs(30), running.context.cancelled()).await.expect("it is told");
}

#[tokio::test(start_paused = true)]
async fn an_event_to_an_exchange_that_was_deleted_says_so_and_listeners_come_back() {
    let (scene, broker) = Scene::alone();
    let innards = memory::MemoryBroker::named(broker.url().trim_start_matches("memory://"));
    let (heard, mut events) = mpsc::unbounded_channel();
    let listener = scene.server().await.subscribe("order.*", move |_: Context, number: u64| {
        heard.send(number).expect("the test listens");
        async {}
    });
    let _listener = listener.start().await.expect("it can be served");
    let client = scene.client().await;
    for event in [client.publish("order.new", &1_u64), client.publish("order.new", &1_u64).required()] {
        innards.delete_exchange(&format!("{}.events", scene.namespace));
        let lost = soon(event).await.expect_err("nobody gets it");
        assert!(matches!(lost, Error::Broker { .. }), "{lost:?}");
        assert!(lost.to_string().contains("had been deleted, and is declared again"), "{lost}");
    }
    let number = soon(async {
        loop {
            client.publish("order.new", &2_u64).await.expect("the broker has it");
            if let Ok(number) = tokio::time::timeout(Duration::from_secs(1), events.recv()).await {
                break number;
            }
        }
    });
    assert_eq!(number.await, Some(2));
}

#[tokio::test(start_paused = true)]
async fn a_consumer_whose_channel_ends_reads_on_and_what_ran_is_not_run_twice() {
    let mut stage = Stage::of_requests().await;
    let ends = [ConsumerEnd::Channel("the test closes it".into()), ConsumerEnd::TimedOut(Duration::from_secs(1800))];
    for (end, is_told) in ends.into_iter().zip([false, true]) {
        let pending = hold(&stage.client, 1).start().await.expect("on its way");
        let held = stage.arrival().await;
        stage.innards().lose_consumers(&stage.queue("held.v1.calls"), &end);
        if is_told {
            let mut state = stage.server.state();
            let told = soon(state.wait_for(|state| matches!(state, State::Degraded { .. }))).await;
            let State::Degraded { reason, .. } = told.expect("it is told").clone() else { unreachable!() };
            assert!(reason.contains("consumer_timeout"), "{reason}");
        }
        let next = hold(&stage.client, 2).start().await.expect("on its way");
        let arrival = stage.arrival().await;
        assert_eq!(arrival.number, 2, "the first has come again and run");
        arrival.release();
        assert_eq!(soon(next).await.expect("answered"), 2);
        held.release();
        assert_eq!(soon(pending).await.expect("answered"), 1);
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_connects_to_a_broker_that_is_down_is_told_and_whoever_connects_later_waits() {
    let (scene, broker) = Scene::alone();
    broker.take_down();
    let refused = Client::connect(&broker).await.expect_err("it is down");
    assert!(matches!(&refused, Error::Connect { reason, .. } if reason.contains("is down")), "{refused:?}");
    let refused = hopline::Server::connect(&broker).await.expect_err("it is down");
    assert!(matches!(refused, Error::Connect { .. }), "{refused:?}");
    let client = Client::builder().namespace(&scene.namespace).timeout(LONG).connect_lazy(&broker).expect("valid");
    let pending = hold(&client, 1).start().await.expect("it waits");
    // The time is virtual: it is how long the broker is down.
    tokio::time::sleep(Duration::from_secs(60)).await;
    broker.restore();
    // There is a connection soon, and nobody serves.
    assert!(matches!(soon(pending).await, Err(Error::NoService { .. })));
}

#[tokio::test(start_paused = true)]
async fn many_calls_in_flight_at_a_cut_all_end_and_what_comes_later_is_as_ever() {
    const CALLS: u64 = 2000;
    let mut stage = Stage::of_requests().await;
    let mut pending = Vec::new();
    for number in 0..CALLS {
        let call = hold(&stage.client, number);
        let call = if number % 2 == 0 { call.idempotent() } else { call };
        pending.push(call.start().await.expect("on its way"));
    }
    soon(async {
        while stage.client.traffic().calls_sent < CALLS {
            tokio::task::yield_now().await;
        }
    })
    .await;
    for _ in 0..3 {
        stage.cut().await;
        stage.are_back().await;
    }
    let release = async {
        while let Some(arrival) = stage.arrived.recv().await {
            arrival.release();
        }
    };
    let outcomes = tokio::select! {
        outcomes = soon(join_all(pending)) => outcomes,
        () = release => unreachable!("the server is there"),
    };
    for (number, outcome) in (0..CALLS).zip(outcomes) {
        match outcome {
            Ok(answer) => assert_eq!(answer, number),
            Err(Error::Disconnected { may_have_run: true, .. }) if number % 2 == 1 => {}
            Err(other) => panic!("{number}: {other:?}"),
        }
    }
    assert_eq!(stage.client.in_flight(), 0);
}

#[tokio::test(start_paused = true)]
async fn replies_that_the_broker_refuses_are_tried_again_and_the_server_says_so() {
    let mut stage = Stage::of_requests().await;
    let pending = hold(&stage.client, 1).start().await.expect("on its way");
    let running = stage.arrival().await;
    stage.innards().refuse("", "ACCESS_REFUSED - write access to exchange 'amq.default' refused");
    running.release();
    let mut state = stage.server.state();
    let told = soon(state.wait_for(|state| matches!(state, State::Degraded { .. }))).await.expect("it is told").clone();
    assert!(matches!(&told, State::Degraded { reason, .. } if reason.contains("ACCESS_REFUSED")), "{told:?}");
    stage.broker.restore();
    assert_eq!(soon(pending).await.expect("answered"), 1);
    soon(state.wait_for(|state| *state == State::Ready)).await.expect("it is told");
}

#[tokio::test(start_paused = true)]
async fn a_service_whose_only_server_goes_at_a_cut_keeps_its_calls_for_the_next() {
    let (scene, broker) = Scene::alone();
    let Held { service, mut arrived } = Held::new();
    let server = scene.serve(service).await;
    let client = Client::builder().namespace(&scene.namespace).timeout(LONG).connect(&broker).await.expect("there");
    let taken = hold(&client, 1).idempotent().start().await.expect("on its way");
    let once = hold(&client, 2).start().await.expect("on its way");
    let _unanswered = [soon(arrived.recv()).await.expect("it runs"), soon(arrived.recv()).await.expect("it runs")];
    drop(server);
    let Held { service, mut arrived } = Held::of(Method::new("hold").idempotent());
    let _heir = scene.serve(service).await;
    for _ in 0..2 {
        soon(arrived.recv()).await.expect("it runs again").release();
    }
    // Whether it may run twice is up to the server's method, which says so.
    assert_eq!(soon(taken).await.expect("answered"), 1);
    assert_eq!(soon(once).await.expect("answered"), 2);
}

#[tokio::test(start_paused = true)]
async fn a_method_that_may_not_run_twice_is_aborted_when_its_server_dies() {
    let (scene, broker) = Scene::alone();
    let Held { service, mut arrived } = Held::new();
    let dying = scene.serve(service).await;
    let client = Client::builder().namespace(&scene.namespace).timeout(LONG).connect(&broker).await.expect("there");
    let pending = hold(&client, 1).start().await.expect("on its way");
    let _unanswered = soon(arrived.recv()).await.expect("it runs");
    let heir = Service::new("held", 1).method("hold", |_: Context, (_,): (u64,)| async { Ok::<u64, Fault>(99) });
    let _heir = scene.serve(heir).await;
    drop(dying);
    assert_eq!(code(soon(pending.into_future()).await), Code::Aborted);
}

#[tokio::test(start_paused = true)]
async fn a_client_that_is_closed_or_dropped_without_a_connection_ends_what_waits() {
    let stage = Stage::of_requests().await;
    stage.take_down().await;
    let waiting = hold(&stage.client, 1).start().await.expect("it waits");
    assert!({ waiting.now_or_never() }.is_none());
    let waiting = hold(&stage.client, 2).start().await.expect("it waits");
    stage.client.close().await;
    assert!(!may_have_run(soon(waiting).await));
}
