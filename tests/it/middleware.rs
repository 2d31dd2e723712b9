//! Middleware on both sides: its order, what it sees of each style, and what it may do.

use std::future::IntoFuture as _;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::StreamExt;
use hopline::topology::{Binding, Declaration, Queue, QueueKind};
use hopline::{
    Client, ClientBuilder, Code, Codec, Context, Error, Fault, Finished, Invocation, Method, Middleware, Next,
    Published, Reply, Running, Server, ServerBuilder, Service, Style, Unanswered,
};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::stranger::Stranger;
use crate::support::{
    Arrival, Calculator, Held, MathClient, MathError, MathServer, PATIENCE, Scene, code, everybody, frame, has_read,
    hold, later, soon, told,
};

/// A middleware that goes around calls as this function does.
struct Around<F>(F);

impl<F, A> Middleware for Around<F>
where
    F: Fn(Invocation, Next) -> A + Send + Sync + 'static,
    A: Future<Output = Result<Reply, Error>> + Send,
{
    async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
        (self.0)(call, next).await
    }
}

/// A middleware that admits what this function does.
struct Admits<F>(F);

impl<F: Fn(&Invocation) -> Result<(), Fault> + Send + Sync + 'static> Middleware for Admits<F> {
    fn admit(&self, call: &Invocation) -> Result<(), Fault> {
        (self.0)(call)
    }
}

/// What is told of a call that is over.
#[derive(Debug)]
struct End {
    style: Style,
    method: String,
    code: Code,
    own_error: bool,
    ran: bool,
    queue_time: Option<Duration>,
    handler_time: Option<Duration>,
    took: Duration,
}

impl End {
    /// Method, code, and whether it ran.
    fn short(&self) -> (&str, Code, bool) {
        (&self.method, self.code, self.ran)
    }
}

/// A middleware that passes on how calls end.
struct Ends(mpsc::UnboundedSender<End>);

impl Middleware for Ends {
    fn finished(&self, done: &Finished<'_>) {
        let end = End {
            style: done.call.style(),
            method: done.call.method().to_owned(),
            code: done.code,
            own_error: done.own_error,
            ran: done.ran,
            queue_time: done.queue_time,
            handler_time: done.handler_time,
            took: done.took,
        };
        // The test may have seen enough.
        let _ = self.0.send(end);
    }
}

/// The ends of calls as they come.
fn ends() -> (Ends, mpsc::UnboundedReceiver<End>) {
    let (tell, told) = mpsc::unbounded_channel();
    (Ends(tell), told)
}

async fn next(ends: &mut mpsc::UnboundedReceiver<End>) -> End {
    soon(ends.recv()).await.expect("it ends")
}

impl Scene {
    async fn server_with(&self, with: impl FnOnce(ServerBuilder) -> ServerBuilder) -> Server {
        let builder = with(Server::builder().namespace(&self.namespace));
        builder.connect(&self.url).await.expect("the broker is there")
    }

    async fn math(&self) -> Running {
        self.serve(MathServer::new(Calculator)).await
    }
}

/// What middleware notes, in order.
#[derive(Clone, Default)]
struct Notes(Arc<Mutex<Vec<String>>>);

impl Notes {
    fn note(&self, line: impl Into<String>) {
        self.0.lock().expect("no panic").push(line.into());
    }

    fn taken(&self) -> Vec<String> {
        std::mem::take(&mut self.0.lock().expect("no panic"))
    }

    /// A middleware that notes what it is asked, under a name.
    fn named(&self, name: &'static str) -> Named {
        Named(name, self.clone())
    }
}

struct Named(&'static str, Notes);

impl Middleware for Named {
    async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
        let Self(name, notes) = self;
        notes.note(format!("{name} in"));
        let outcome = next.run(call).await;
        notes.note(format!("{name} out"));
        outcome
    }

    fn admit(&self, _: &Invocation) -> Result<(), Fault> {
        self.1.note(format!("{} admits", self.0));
        Ok(())
    }

    fn finished(&self, _: &Finished<'_>) {
        self.1.note(format!("{} is told", self.0));
    }
}

#[tokio::test]
async fn the_first_that_was_added_is_the_outermost_and_a_servers_is_around_its_services() {
    let (scene, notes) = (Scene::new(), Notes::default());
    let service = Service::new("demo", 1).with(notes.named("service 1")).with(notes.named("service 2"));
    let handler = notes.clone();
    let service = service.method("add", move |_: Context, (a, b): (i64, i64)| {
        handler.note("handler");
        async move { Ok::<_, Fault>(a + b) }
    });
    let server = scene.server_with(|server| server.with(notes.named("server 1")).with(notes.named("server 2"))).await;
    let server = server.serve(service).start().await.expect("it can be served");
    let client = scene.client_with(|client| client.with(notes.named("client 1")).with(notes.named("client 2"))).await;
    assert_eq!(client.call::<i64>("demo", "add", (2, 3)).await.expect("a sum"), 5);
    server.drain().await;
    let noted = notes.taken();
    let of = |side: &str| noted.iter().filter(|line| line.starts_with(side)).cloned().collect::<Vec<_>>();
    assert_eq!(
        of("client"),
        ["client 1 in", "client 2 in", "client 2 out", "client 1 out", "client 2 is told", "client 1 is told"]
    );
    let served: Vec<_> = noted.iter().filter(|line| !line.starts_with("client")).collect();
    let all = ["server 1", "server 2", "service 1", "service 2"];
    let each = |what: &'static str| all.map(|name| format!("{name} {what}"));
    let reversed = |what| each(what).into_iter().rev();
    let expected = each("admits").into_iter().chain(each("in")).chain(["handler".to_owned()]);
    let expected = expected.chain(reversed("out")).chain(reversed("is told"));
    assert_eq!(served, expected.collect::<Vec<_>>().iter().collect::<Vec<_>>());
}

/// Tells of each call that goes through: style, service and method.
fn watching(tell: &mpsc::UnboundedSender<(Style, String, String)>) -> impl Middleware + use<> {
    let tell = tell.clone();
    Around(move |call: Invocation, next: Next| {
        let seen = (call.style(), call.service().to_owned(), call.method().to_owned());
        tell.send(seen).expect("the test listens");
        async move { next.run(call).await }
    })
}

#[tokio::test]
async fn every_style_goes_through_on_both_sides() {
    let scene = Scene::new();
    let ((tell_out, mut out), (tell_in, mut come)) = (mpsc::unbounded_channel(), mpsc::unbounded_channel());
    let (own, mut ended) = ends();
    let server = scene.server_with(|server| server.with(watching(&tell_in)).with(own)).await;
    let server = server.subscribe("order.*", |_: Context, (): ()| async {});
    let server = server.serve(MathServer::new(Calculator)).start().await.expect("it can be served");
    let (own, mut over) = ends();
    let client = scene.client_with(|client| client.with(watching(&tell_out)).with(own)).await;
    let math = MathClient::new(&client);

    let seen = |style, service: &str, method: &str| (style, service.to_owned(), method.to_owned());
    let mut passes = async |style, service: &str, method: &str| {
        assert_eq!(soon(out.recv()).await, Some(seen(style, service, method)));
        assert_eq!(soon(come.recv()).await, Some(seen(style, service, method)));
        for ends in [&mut over, &mut ended] {
            let end = next(ends).await;
            assert_eq!((end.style, end.short()), (style, (method, Code::Ok, true)));
        }
    };
    assert_eq!(math.add(2, 3).await.expect("a sum"), 5);
    passes(Style::Call, "math.v1", "add").await;
    let instance = server.instance().to_owned();
    assert_eq!(math.add(2, 3).to(&instance).await.expect("a sum"), 5);
    passes(Style::Call, "math.v1", "add").await;
    math.heard().send().await.expect("the broker has it");
    passes(Style::Oneway, "math.v1", "heard").await;
    math.heard().all().send().await.expect("the broker has it");
    passes(Style::Oneway, "math.v1", "heard").await;
    let mut replies = math.whoami().all().replies(PATIENCE).await.expect("it is there");
    assert_eq!(soon(replies.next()).await.expect("a reply").outcome.expect("an id"), instance);
    passes(Style::Broadcast, "math.v1", "whoami").await;
    assert_eq!(client.publish("order.created", &()).await.expect("the broker has it"), Published::ToAll);
    passes(Style::Event, "events", "order.created").await;
}

#[tokio::test]
async fn questions_of_discovery_are_broadcasts_of_the_client_and_admitted_by_the_server() {
    let scene = Scene::new();
    let knows = |call: &Invocation| match call.metadata("token") {
        Some("good") => Ok(()),
        _ => Err(Fault::new(Code::Unauthenticated, "who are you?")),
    };
    let server = scene.server_with(|server| server.with(Admits(knows))).await;
    let _server = server.serve(MathServer::new(Calculator)).start().await.expect("it can be served");
    let (own, mut over) = ends();
    let known = scene.client_with(|client| client.metadata("token", "good").with(own)).await;
    let instances = told(1, async |window| everybody(&known, window).await).await;
    assert_eq!(instances[0].service, "math.v1");
    let end = next(&mut over).await;
    assert_eq!((end.style, end.short()), (Style::Broadcast, ("hopline.info", Code::Ok, true)));
    let stranger = scene.client().await;
    let refused = everybody(&stranger, PATIENCE).await;
    assert!(matches!(&refused, Err(Error::Fault(fault)) if fault.code == Code::Unauthenticated), "{refused:?}");
}

#[tokio::test]
async fn a_client_that_answers_itself_needs_no_server() {
    let scene = Scene::new();
    let (own, mut over) = ends();
    let made = Around(|call: Invocation, _: Next| async move {
        match call.method() {
            "add" => Reply::result(call.codec(), &7),
            "div" => Reply::own_error(call.codec(), &MathError::DivisionByZero { dividend: 1 }),
            _ => Err(Error::Fault(Fault::new(Code::Unavailable, "not today"))),
        }
    });
    let client = scene.client_with(|client| client.with(own).with(made)).await;
    let math = MathClient::new(&client);
    assert_eq!(math.add(1, 2).await.expect("made here"), 7);
    assert_eq!(next(&mut over).await.short(), ("add", Code::Ok, false));
    let error = math.div(1, 0).await.expect_err("made here");
    assert!(matches!(error, hopline::CallError::Service(MathError::DivisionByZero { dividend: 1 })));
    let end = next(&mut over).await;
    assert!(end.own_error);
    assert_eq!(end.short(), ("div", Code::Unknown, false));
    assert_eq!(code(math.nothing().await), Code::Unavailable);
    assert_eq!(next(&mut over).await.short(), ("nothing", Code::Unavailable, false));
    // The only reply to a broadcast that has asked nobody.
    let replies = math.add(1, 2).all().gather(PATIENCE).await.expect("made here");
    assert_eq!(replies.len(), 1);
    assert_eq!((&*replies[0].instance, replies[0].outcome.as_ref().expect("made here")), ("", &7));
    assert_eq!(code(math.heard().send().await), Code::Unavailable);
}

#[tokio::test]
async fn a_server_that_answers_itself_does_not_run_the_handler() {
    let scene = Scene::new();
    let (own, mut ended) = ends();
    let made = Around(|call: Invocation, next: Next| async move {
        match call.method() {
            "panic" => Reply::result(call.codec(), &()),
            "div" => Reply::own_error(call.codec(), &MathError::DivisionByZero { dividend: 9 }),
            "nothing" => Err(Error::Fault(Fault::new(Code::NotFound, "no such"))),
            "echo" => Reply::result(Codec::Json, "in another codec"),
            _ => next.run(call).await,
        }
    });
    let _server = scene.serve(MathServer::new(Calculator).with(own).with(made)).await;
    let client = scene.client().await;
    let math = MathClient::new(&client);
    math.panic().await.expect("it does not run");
    assert_eq!(next(&mut ended).await.short(), ("panic", Code::Ok, false));
    let error = math.div(1, 1).await.expect_err("made by the middleware");
    assert!(matches!(error, hopline::CallError::Service(MathError::DivisionByZero { dividend: 9 })));
    assert_eq!(next(&mut ended).await.short(), ("div", Code::Unknown, false));
    assert_eq!(code(math.nothing().await), Code::NotFound);
    assert_eq!(next(&mut ended).await.short(), ("nothing", Code::NotFound, false));
    assert_eq!(code(math.echo(serde_bytes::ByteBuf::new()).await), Code::Internal);
    assert_eq!(next(&mut ended).await.short(), ("echo", Code::Internal, false));
    assert_eq!(math.add(2, 3).await.expect("a sum"), 5);
    let end = next(&mut ended).await;
    assert_eq!(end.short(), ("add", Code::Ok, true));
    assert!(end.queue_time.is_some() && end.handler_time.is_some());
}

#[tokio::test]
async fn a_call_is_refused_before_it_takes_a_place_and_before_it_is_decompressed() {
    let scene = Scene::new();
    let (own, mut ended) = ends();
    let refuses = Admits(|call: &Invocation| {
        assert!(call.payload().is_empty(), "it may be compressed");
        match call.metadata("good") {
            Some(_) => Ok(()),
            None => Err(Fault::new(Code::ResourceExhausted, "not now").retry_after(Duration::from_secs(7))),
        }
    });
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service.concurrency(1).prefetch(8).with(own).with(refuses)).await;
    let client = scene.client().await;
    let first = hold(&client, 1).metadata("good", "yes").start().await.expect("it is sent");
    let running = soon(arrived.recv()).await.expect("it runs");
    // All places are taken.
    let refused = soon(hold(&client, 2)).await.expect_err("it is refused");
    assert_eq!((refused.code(), refused.retry_after()), (Code::ResourceExhausted, Some(Duration::from_secs(7))));
    let end = next(&mut ended).await;
    assert_eq!(end.short(), ("hold", Code::ResourceExhausted, false));
    assert!(end.queue_time.is_none() && end.handler_time.is_none());
    // No payload of the compression that the frame names.
    let mut stranger = Stranger::new(&scene).await;
    let mut bomb = frame(1, Codec::Json, Uuid::new_v4(), "hold", b"no compressed payload");
    bomb[6] |= 1;
    stranger.send("rpc", "held.v1", bomb, Some(stranger.reply_to.clone()), None).await;
    assert_eq!(stranger.answer().await.1, Code::ResourceExhausted as u8);
    running.release();
    assert_eq!(first.await.expect("an answer"), 1);
}

#[tokio::test]
async fn a_oneway_call_that_is_refused_is_a_dead_letter_and_a_refused_event_is_dropped() {
    let scene = Scene::new();
    let refuses = Admits(|call: &Invocation| match call.metadata("good") {
        Some(_) => Ok(()),
        None => Err(Fault::new(Code::PermissionDenied, "none of this")),
    });
    let (own, mut ended) = ends();
    let (hear, mut heard) = mpsc::unbounded_channel();
    let server = scene.server_with(|server| server.with(own).with(refuses)).await;
    let server = server.subscribe("n", move |_: Context, n: u64| {
        hear.send(n).expect("the test listens");
        async {}
    });
    let _server = server.serve(MathServer::new(Calculator)).start().await.expect("it can be served");
    let transport = scene.transport().await;
    let client = scene.client().await;
    MathClient::new(&client).heard().send().await.expect("the broker has it");
    assert_eq!(next(&mut ended).await.short(), ("heard", Code::PermissionDenied, false));
    let mut dead = scene.dead_letters(&transport, "math.v1").await;
    let letter = soon(dead.next()).await.expect("it is kept");
    assert!(letter.properties.headers.iter().any(|(_, value)| value.contains("none of this")));
    client.publish("n", &1_u64).await.expect("the broker has it");
    assert_eq!(next(&mut ended).await.short(), ("n", Code::PermissionDenied, false));
    let good = scene.client_with(|client| client.metadata("good", "yes")).await;
    good.publish("n", &2_u64).await.expect("the broker has it");
    assert_eq!(soon(heard.recv()).await, Some(2), "what was refused did not run");
}

/// A service with a oneway method of three attempts and no pause of its own. Its middleware refuses all attempts by this
/// fault but the third that comes. It tells the number of an attempt that runs.
fn limited(fault: Fault) -> (Service, mpsc::UnboundedReceiver<u64>) {
    let (hear, heard) = mpsc::unbounded_channel();
    let note = move |context: Context, (): ()| {
        hear.send(context.attempt()).expect("the test listens");
        async { Ok::<_, Fault>(()) }
    };
    let asked = AtomicUsize::new(0);
    let limits = Admits(move |_: &Invocation| match asked.fetch_add(1, Ordering::SeqCst) {
        2 => Ok(()),
        _ => Err(fault.clone()),
    });
    let method = Method::new("note").oneway().attempts(3).pause(Duration::ZERO);
    (Service::new("demo", 1).method(method, note).with(limits), heard)
}

#[tokio::test]
async fn a_oneway_call_that_is_refused_for_now_is_tried_again_and_kept_after_its_last_attempt() {
    let scene = Scene::new();
    let busy = Fault::new(Code::ResourceExhausted, "over the rate").retry_after(Duration::from_millis(20));
    let (service, mut heard) = limited(busy);
    let (own, mut ended) = ends();
    let server = scene.server_with(|server| server.with(own)).await.serve(service);
    let _server = server.start().await.expect("it can be served");
    let transport = scene.transport().await;
    let mut dead = scene.dead_letters(&transport, "demo.v1").await;
    let client = scene.client().await;
    for runs in [true, false] {
        client.oneway("demo", "note", [(); 0]).send().await.expect("the broker has it");
        for attempt in 1..=3 {
            let end = if runs && attempt == 3 { (Code::Ok, true) } else { (Code::ResourceExhausted, false) };
            assert_eq!(next(&mut ended).await.short(), ("note", end.0, end.1));
        }
    }
    assert_eq!(soon(heard.recv()).await, Some(3));
    let letter = soon(dead.next()).await.expect("it is kept");
    let says = |text: &str| letter.properties.headers.iter().any(|(_, value)| value == text);
    assert!(says("over the rate") && says("3"), "{:?}", letter.properties.headers);
    heard.try_recv().expect_err("the other one did not run");
}

#[tokio::test(start_paused = true)]
async fn another_attempt_of_a_oneway_call_waits_as_long_as_the_fault_says() {
    for (asked, waited) in [(10, 10), (3600, 30)] {
        let scene = Scene::in_memory();
        let (service, mut heard) =
            limited(Fault::new(Code::NotFound, "not yet").retry_after(Duration::from_secs(asked)));
        let _server = scene.serve(service).await;
        let begun = tokio::time::Instant::now();
        scene.client().await.oneway("demo", "note", [(); 0]).send().await.expect("the broker has it");
        let third = tokio::time::timeout(Duration::from_secs(3600), heard.recv()).await;
        assert_eq!(third.expect("it runs within an hour of the test's time"), Some(3));
        assert_eq!(begun.elapsed().as_secs(), 2 * waited, "as long as it asks for, up to a limit");
    }
}

/// The ids and the number of an attempt.
fn ids(context: &Context) -> (Uuid, Uuid, u64) {
    (context.call_id(), context.request_id(), context.attempt())
}

#[tokio::test]
async fn each_run_is_an_attempt_with_an_id_of_its_own_and_the_id_of_the_call() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let again = Around(|call: Invocation, next: Next| async move {
        match next.run(call.clone()).await {
            Err(error) if error.code() == Code::Internal => next.run(call).await,
            outcome => outcome,
        }
    });
    let (own, mut over) = ends();
    let client = scene.client_with(|client| client.with(own).with(again)).await;
    let call = hold(&client, 7).start().await.expect("it is sent");
    let first = soon(arrived.recv()).await.expect("it runs");
    let (call_id, request_id, number) = ids(&first.context);
    assert_eq!((request_id, number), (call_id, 1));
    // The handler fails.
    drop(first);
    let second = soon(arrived.recv()).await.expect("it runs again");
    assert_eq!(second.context.call_id(), call_id);
    assert_ne!(second.context.request_id(), call_id);
    assert_eq!(second.context.attempt(), 2);
    second.release();
    assert_eq!(call.await.expect("an answer"), 7);
    let end = next(&mut over).await;
    assert_eq!(end.short(), ("hold", Code::Ok, true));
    over.try_recv().expect_err("it is told once a call");
}

#[tokio::test]
async fn an_event_that_is_published_again_is_another_attempt_of_the_same() {
    let scene = Scene::new();
    let (tell, mut heard) = mpsc::unbounded_channel();
    let server = scene.server().await.subscribe("n", move |context: Context, _: u64| {
        tell.send(ids(&context)).expect("the test listens");
        async {}
    });
    let _server = server.start().await.expect("subscribed");
    let twice = Around(|call: Invocation, next: Next| async move {
        next.run(call.clone()).await?;
        next.run(call).await
    });
    let client = scene.client_with(|client| client.with(twice)).await;
    client.publish("n", &1_u64).await.expect("the broker has it");
    let (call_id, first, number) = soon(heard.recv()).await.expect("it is handled");
    assert_eq!((first, number), (call_id, 1));
    let (same, second, number) = soon(heard.recv()).await.expect("it is handled again");
    assert_eq!((same, number), (call_id, 2));
    assert_ne!(second, first);
}

#[tokio::test]
async fn of_two_attempts_at_once_the_slower_is_cancelled_on_its_server() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let hedge = Around(|call: Invocation, next: Next| async move {
        let (one, two) = (next.run(call.clone()), next.clone().run(call));
        futures::future::select(one, two).await.factor_first().0
    });
    let client = scene.client_with(|client| client.with(hedge)).await;
    let call = hold(&client, 7).start().await.expect("it is sent");
    let [one, two] = [soon(arrived.recv()).await, soon(arrived.recv()).await].map(|run| run.expect("both run"));
    assert_eq!(one.context.call_id(), two.context.call_id());
    assert_ne!(one.context.request_id(), two.context.request_id());
    let slower = one.context.clone();
    two.release();
    assert_eq!(soon(call).await.expect("an answer"), 7);
    soon(slower.cancelled()).await;
    drop(one);
}

#[tokio::test]
async fn dropping_a_run_cancels_the_attempt_and_so_does_dropping_the_call() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let (give_up, given_up) = (Arc::new(tokio::sync::Notify::new()), Arc::new(AtomicUsize::new(0)));
    let (hear, count) = (give_up.clone(), given_up.clone());
    let patient = Around(move |call: Invocation, next: Next| {
        let (hear, count) = (hear.clone(), count.clone());
        async move {
            tokio::select! {
                outcome = next.run(call) => outcome,
                () = hear.notified() => {
                    count.fetch_add(1, Ordering::Relaxed);
                    Err(Error::Fault(Fault::new(Code::Cancelled, "it took too long")))
                }
            }
        }
    });
    let (own, mut over) = ends();
    let client = scene.client_with(|client| client.with(own).with(patient)).await;
    let call = hold(&client, 1).start().await.expect("it is sent");
    let run = soon(arrived.recv()).await.expect("it runs");
    give_up.notify_one();
    assert_eq!(code(soon(call).await), Code::Cancelled);
    soon(run.context.cancelled()).await;
    assert_eq!(next(&mut over).await.short(), ("hold", Code::Cancelled, true));

    for started in [true, false] {
        let call = hold(&client, 2);
        let run: Arrival = if started {
            let call = call.start().await.expect("it is sent");
            let run = soon(arrived.recv()).await.expect("it runs");
            drop(call);
            run
        } else {
            // Polled by its caller, and not on a task.
            tokio::select! {
                outcome = call => panic!("it waits: {outcome:?}"),
                run = soon(arrived.recv()) => run.expect("it runs"),
            }
        };
        soon(run.context.cancelled()).await;
        assert_eq!(next(&mut over).await.short(), ("hold", Code::Cancelled, true));
    }
    assert_eq!(given_up.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn a_handler_is_dropped_when_the_servers_middleware_drops_its_run() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let give_up = Arc::new(tokio::sync::Notify::new());
    let told = give_up.clone();
    let patient = Around(move |call: Invocation, next: Next| {
        let told = told.clone();
        async move {
            tokio::select! {
                outcome = next.run(call) => outcome,
                () = told.notified() => Err(Error::Fault(Fault::new(Code::Unavailable, "the server has no more time"))),
            }
        }
    });
    let (own, mut ended) = ends();
    let _server = scene.serve(service.with(own).with(patient)).await;
    let client = scene.client().await;
    let call = hold(&client, 1).start().await.expect("it is sent");
    let run = soon(arrived.recv()).await.expect("it runs");
    give_up.notify_one();
    assert_eq!(code(soon(call).await), Code::Unavailable);
    soon(run.context.cancelled()).await;
    assert_eq!(next(&mut ended).await.short(), ("hold", Code::Unavailable, true));
}

/// Panics in one of its methods.
struct Panics(&'static str);

impl Middleware for Panics {
    async fn handle(&self, call: Invocation, next: Next) -> Result<Reply, Error> {
        assert!(self.0 != "handle", "as the test asks");
        let outcome = next.run(call).await;
        assert!(self.0 != "handle, after it", "as the test asks");
        outcome
    }

    fn admit(&self, _: &Invocation) -> Result<(), Fault> {
        assert!(self.0 != "admit", "as the test asks");
        Ok(())
    }

    fn finished(&self, _: &Finished<'_>) {
        assert!(self.0 != "finished", "as the test asks");
    }
}

/// Tries once more what can be tried again.
async fn once_more(call: Invocation, next: Next) -> Result<Reply, Error> {
    match next.run(call.clone()).await {
        Err(error) if error.is_transient() => next.run(call).await,
        outcome => outcome,
    }
}

#[tokio::test]
async fn the_error_of_a_later_attempt_does_not_deny_an_earlier_one() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let (own, mut over) = ends();
    let client = scene.client_with(|client| client.with(own).with(Around(once_more))).await;
    let call = hold(&client, 1).timeout(Duration::from_millis(500)).start().await.expect("it is sent");
    let _run = soon(arrived.recv()).await.expect("the first attempt runs");
    // The second attempt has no time left, and is not sent.
    let late = soon(call).await.expect_err("nobody answers");
    assert!(matches!(late, Error::Timeout { .. }) && late.may_have_run(), "{late:?}");
    assert_eq!(next(&mut over).await.short(), ("hold", Code::DeadlineExceeded, true));
}

#[tokio::test]
async fn a_middleware_that_fails_after_a_reply_does_not_say_that_the_call_has_not_run() {
    let scene = Scene::new();
    let _server = scene.math().await;
    let (own, mut over) = ends();
    let spoils = |call: Invocation, next: Next| async move {
        next.run(call).await?;
        Err(Error::Invalid("the reply is not signed".to_owned()))
    };
    // One that is shared is one like any other.
    let own = Arc::new(own);
    let client = scene.client_with(|client| client.with(own.clone()).with(Arc::new(Around(spoils)))).await;
    let error = MathClient::new(&client).add(1, 2).await.expect_err("the middleware refuses the reply");
    assert!(error.may_have_run() && error.code() == Code::InvalidArgument, "{error:?}");
    assert!(error.to_string().ends_with("the reply is not signed"), "{error}");
    assert_eq!(next(&mut over).await.short(), ("add", Code::InvalidArgument, true));
}

#[tokio::test]
async fn a_middleware_that_hangs_holds_no_call_beyond_its_deadline() {
    let scene = Scene::new();
    let _server = scene.math().await;
    let short = |client: ClientBuilder| client.timeout(Duration::from_millis(200));
    let hangs = |_: Invocation, _: Next| std::future::pending::<Result<Reply, Error>>();
    let (own, mut over) = ends();
    let client = scene.client_with(|client| short(client).with(own).with(Around(hangs))).await;
    let math = MathClient::new(&client);
    let add = || client.call::<i64>("math", "add", (1, 2));
    let ended = [
        soon(math.add(1, 2).into_future()).await.map(drop),
        soon(add().start().await.expect("it is begun").into_future()).await.map(drop),
        soon(client.oneway("math", "add", (1, 2)).send()).await,
        soon(add().all().gather(Duration::from_millis(10))).await.map(drop),
        soon(client.publish("order.new", &1)).await.map(drop),
    ];
    let methods = ["math.v1.add", "math.v1.add", "math.v1.add", "math.v1.add", "order.new"];
    for (outcome, named) in ended.into_iter().zip(methods) {
        let error = outcome.expect_err("it hangs");
        let Error::Timeout { why, method, .. } = &error else { panic!("{error:?}") };
        assert_eq!((*why, &**method), (Unanswered::Middleware { may_have_run: false }, named));
        assert!(error.to_string().contains("middleware") && !error.may_have_run(), "{error}");
        assert!(!next(&mut over).await.ran);
    }
    let hangs_later = |call: Invocation, next: Next| async move {
        next.run(call).await?;
        std::future::pending().await
    };
    let client = scene.client_with(|client| short(client).with(Around(hangs_later))).await;
    let error = soon(MathClient::new(&client).add(1, 2).into_future()).await.expect_err("it hangs");
    assert!(error.may_have_run() && error.to_string().contains("middleware"), "{error}");
}

#[tokio::test]
async fn a_panic_is_a_fault_and_nothing_hangs() {
    for (place, on_server, on_client) in [
        ("handle", Some(Code::Internal), Some(Code::Internal)),
        ("handle, after it", Some(Code::Internal), Some(Code::Internal)),
        ("admit", Some(Code::Internal), None),
        ("finished", None, None),
    ] {
        let scene = Scene::new();
        let server = scene.serve(MathServer::new(Calculator).with(Panics(place))).await;
        let client = scene.client().await;
        for _ in 0..2 {
            let outcome = soon(MathClient::new(&client).add(2, 3).into_future()).await;
            let said = outcome.as_ref().map_err(ToString::to_string).err().unwrap_or_default();
            let who = match place {
                "handle" => "a middleware around `math.v1.add` panicked",
                "handle, after it" => "`math.v1.add`, or a middleware around it, panicked",
                _ => "",
            };
            assert!(said.contains(who), "{place}: {said}");
            assert_eq!(outcome.map_err(|error| error.code()), on_server.map_or(Ok(5), Err), "{place} on the server");
        }
        soon(server.drain()).await;

        let scene = Scene::new();
        let _server = scene.math().await;
        let client = scene.client_with(|client| client.with(Panics(place))).await;
        for _ in 0..2 {
            let outcome = soon(MathClient::new(&client).add(2, 3).into_future()).await;
            assert_eq!(outcome.map_err(|error| error.code()), on_client.map_or(Ok(5), Err), "{place} on the client");
        }
    }
}

#[tokio::test]
async fn a_methods_own_error_is_a_reply_on_both_sides() {
    let scene = Scene::new();
    let (tell, mut told) = mpsc::unbounded_channel();
    let sees = |side: &'static str| {
        let tell = tell.clone();
        Around(move |call: Invocation, next: Next| {
            let tell = tell.clone();
            async move {
                let codec = call.codec();
                let reply = next.run(call).await?;
                assert_eq!(reply.codec(), codec);
                tell.send((side, reply.is_own_error(), reply.payload().to_vec())).expect("the test listens");
                Ok(reply)
            }
        })
    };
    let _server = scene.serve(MathServer::new(Calculator).with(sees("server"))).await;
    let client = scene.client_with(|client| client.codec(Codec::Json).with(sees("client"))).await;
    MathClient::new(&client).div(1, 0).await.expect_err("its own error");
    let own = br#"{"DivisionByZero":{"dividend":1}}"#.to_vec();
    assert_eq!(told.recv().await, Some(("server", true, own.clone())));
    assert_eq!(told.recv().await, Some(("client", true, own)));
    MathClient::new(&client).div(6, 3).await.expect("a quotient");
    assert_eq!(told.recv().await, Some(("server", false, b"2".to_vec())));
    assert_eq!(told.recv().await, Some(("client", false, b"2".to_vec())));
}

#[tokio::test]
async fn a_reply_tells_its_instance_and_how_long_the_handler_took() {
    let scene = Scene::new();
    let server = scene.math().await;
    let (tell, mut told) = mpsc::unbounded_channel();
    let sees = Around(move |call: Invocation, next: Next| {
        let tell = tell.clone();
        async move {
            let reply = next.run(call).await?;
            tell.send((reply.instance().map(str::to_owned), reply.handler_time())).expect("the test listens");
            Ok(reply)
        }
    });
    let client = scene.client_with(|client| client.with(sees)).await;
    MathClient::new(&client).add(2, 3).await.expect("a sum");
    let (instance, time) = told.recv().await.expect("a reply");
    assert_eq!(instance.as_deref(), Some(server.instance()));
    assert!(time.is_some());
}

/// A service that answers with the metadata of its calls.
fn entries() -> Service {
    Service::new("entries", 1).method("all", |context: Context, (): ()| async move {
        let own = |(name, value): (&str, &str)| (name.to_owned(), value.to_owned());
        let current = Context::current().expect("it is in a handler");
        assert_eq!(current.metadata_entries().count(), context.metadata_entries().count());
        Ok::<_, Fault>(context.metadata_entries().map(own).collect::<Vec<_>>())
    })
}

async fn told_entries(client: &Client, own: Option<&str>) -> Vec<(String, String)> {
    let call = client.call("entries", "all", [(); 0]);
    let call = match own {
        Some(value) => call.metadata("tenant", value),
        None => call,
    };
    call.await.expect("they are told")
}

#[tokio::test]
async fn a_clients_metadata_is_in_every_call_and_a_calls_own_goes_before_it() {
    let (scene, (hear, mut heard)) = (Scene::new(), mpsc::unbounded_channel());
    let server = scene.server().await.subscribe("n", move |context: Context, (): ()| {
        hear.send(context.metadata("tenant").map(str::to_owned)).expect("the test listens");
        async {}
    });
    let _server = server.serve(entries()).start().await.expect("it can be served");
    let pairs = |pairs: &[(&str, &str)]| {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect::<Vec<_>>()
    };
    for around in [false, true] {
        let client = scene.client_with(|client| {
            let client = client.metadata("tenant", "first").metadata("region", "eu").metadata("tenant", "acme");
            if around { client.with(Panics("never")) } else { client }
        });
        let client = client.await;
        assert_eq!(told_entries(&client, None).await, pairs(&[("region", "eu"), ("tenant", "acme")]));
        assert_eq!(told_entries(&client, Some("other")).await, pairs(&[("tenant", "other"), ("region", "eu")]));
        client.publish("n", &()).await.expect("the broker has it");
        assert_eq!(soon(heard.recv()).await, Some(Some("acme".to_owned())));
    }
    let too_much = Client::builder().metadata("large", "x".repeat(61 * 1024)).connect(&scene.url).await;
    assert!(matches!(too_much, Err(Error::TooLarge { what: "metadata", .. })));
}

#[tokio::test]
async fn what_middleware_sets_reaches_the_handler_and_what_it_says_in_a_reply_the_caller() {
    let scene = Scene::new();
    let adds = |name: &'static str| {
        Around(move |mut call: Invocation, next: Next| async move {
            call.set_metadata(name, "called");
            let mut reply = next.run(call).await?;
            reply.set_metadata(name, "answered");
            Ok(reply)
        })
    };
    let _server = scene.serve(entries().with(adds("server"))).await;
    let (tell, mut told) = mpsc::unbounded_channel();
    let sees = Around(move |call: Invocation, next: Next| {
        let tell = tell.clone();
        async move {
            let reply = next.run(call).await?;
            let entries: Vec<_> = reply.metadata_entries().map(|(name, _)| name.to_owned()).collect();
            tell.send((entries, reply.metadata("server").map(str::to_owned))).expect("the test listens");
            Ok(reply)
        }
    });
    let client = scene.client_with(|client| client.with(sees).with(adds("client"))).await;
    let names: Vec<_> = told_entries(&client, Some("acme")).await.into_iter().map(|(name, _)| name).collect();
    assert_eq!(names, ["tenant", "client", "server"]);
    let expected = (vec!["server".to_owned(), "client".to_owned()], Some("answered".to_owned()));
    assert_eq!(told.recv().await, Some(expected));
}

#[tokio::test]
async fn payloads_can_be_replaced_on_their_way() {
    let scene = Scene::new();
    let doubles = Around(|mut call: Invocation, next: Next| async move {
        assert_eq!(call.payload(), b"[2,3]");
        call.set_payload(b"[4,6]".to_vec());
        next.run(call).await
    });
    let _server = scene.math().await;
    let client = scene.client_with(|client| client.codec(Codec::Json).with(doubles)).await;
    assert_eq!(MathClient::new(&client).add(2, 3).await.expect("a sum"), 10);
}

#[tokio::test]
async fn a_started_call_goes_on_though_nobody_waits_for_it_and_fails_at_once_where_it_can() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    // It waits before it leaves, for what takes no time.
    let slow = Around(|call: Invocation, next: Next| async move {
        tokio::task::yield_now().await;
        tokio::task::yield_now().await;
        assert!(Context::current().is_none());
        next.run(call).await
    });
    let client = scene.client_with(|client| client.with(slow)).await;
    let call = hold(&client, 5).start().await.expect("it is sent");
    soon(arrived.recv()).await.expect("it runs").release();
    assert_eq!(call.await.expect("an answer"), 5);
    let error = client.call::<()>("no name", "x", ()).start().await.expect_err("a bad name");
    assert!(matches!(error, Error::Invalid(_)));
    let refusing = scene.client_with(|client| {
        client.with(Around(|_, _| async { Err(Error::Fault(Fault::new(Code::Unavailable, "open"))) }))
    });
    assert_eq!(code(hold(&refusing.await, 5).start().await), Code::Unavailable);
}

#[tokio::test]
async fn calls_with_a_callback_go_through_too() {
    let scene = Scene::new();
    let _server = scene.math().await;
    let (own, mut over) = ends();
    let client = scene.client_with(|client| client.with(own)).await;
    let (tell, told) = tokio::sync::oneshot::channel();
    MathClient::new(&client).add(2, 3).then(|sum| tell.send(sum).expect("the test listens"));
    assert_eq!(soon(told).await.expect("it is called").expect("a sum"), 5);
    assert_eq!(next(&mut over).await.short(), ("add", Code::Ok, true));
}

#[test]
fn a_program_that_is_not_async_waits_for_calls_that_go_through_middleware() {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let scene = Scene::new();
    let slow = Around(|call: Invocation, next: Next| async move {
        // It needs a timer of tokio's.
        tokio::time::sleep(Duration::from_millis(1)).await;
        next.run(call).await
    });
    let (_server, client) = runtime.block_on(async {
        let server = scene.math().await;
        (server, scene.client_with(|client| client.with(slow)).await)
    });
    assert_eq!(hopline::blocking::wait(MathClient::new(&client).add(2, 3)).expect("a sum"), 5);
    drop((client, runtime.enter()));
}

/// Waits until a client has sent so many calls and cancels.
async fn sent(client: &Client, count: u64) {
    soon(async {
        while client.traffic().calls_sent < count {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

#[tokio::test]
async fn calls_that_never_run_end_too() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let (own, mut ended) = ends();
    let _server = scene.serve(service.concurrency(1).prefetch(8).with(own)).await;
    let client = scene.client().await;
    let running = hold(&client, 1).start().await.expect("it is sent");
    let first = soon(arrived.recv()).await.expect("it runs");
    let waiting = hold(&client, 2).start().await.expect("it is sent");
    let instance = first.context.instance().to_owned();
    sent(&client, 2).await;
    drop(waiting);
    sent(&client, 3).await;
    // The cancel is before this, and is heard when this is answered.
    has_read(&client, "held", &instance).await;
    assert_eq!(next(&mut ended).await.short(), ("absent", Code::Unimplemented, false));
    first.release();
    running.await.expect("an answer");
    let end = next(&mut ended).await;
    assert_eq!(end.short(), ("hold", Code::Ok, true));
    assert!(end.queue_time.is_some() && end.handler_time.is_some());
    let end = next(&mut ended).await;
    assert_eq!(end.short(), ("hold", Code::Cancelled, false));
    assert!(end.handler_time.is_none());
}

#[tokio::test]
async fn each_attempt_of_a_oneway_call_that_fails_has_its_end() {
    let scene = Scene::new();
    let (own, mut ended) = ends();
    let method = Method::new("fail").oneway().attempts(2).pause(Duration::ZERO);
    let fail = |_: Context, (): ()| async { Err::<(), _>(Fault::new(Code::Unavailable, "not now")) };
    let _server = scene.serve(Service::new("demo", 1).method(method, fail).with(own)).await;
    scene.client().await.oneway("demo", "fail", [(); 0]).send().await.expect("the broker has it");
    for _ in 0..2 {
        assert_eq!(next(&mut ended).await.short(), ("fail", Code::Unavailable, true));
    }
}

#[tokio::test]
async fn on_a_server_middleware_is_in_the_context_of_its_call() {
    let scene = Scene::new();
    let (tell, mut told) = mpsc::unbounded_channel();
    let sees = Around(move |call: Invocation, next: Next| {
        let tell = tell.clone();
        async move {
            let context = Context::current().expect("it is around a handler");
            let ids = (call.call_id(), call.request_id(), call.remaining().is_some(), call.idempotent());
            let same = ids == (context.call_id(), Some(context.request_id()), context.remaining().is_some(), true);
            let caller = (call.caller() == context.caller(), call.user() == context.user());
            tell.send((same, caller, call.caller().is_some())).expect("the test listens");
            next.run(call).await
        }
    });
    let _server = scene.serve(MathServer::new(Calculator).with(sees)).await;
    let client = scene.client().await;
    MathClient::new(&client).add(2, 3).idempotent().await.expect("a sum");
    assert_eq!(told.recv().await, Some((true, (true, true), true)));
}

#[tokio::test]
async fn the_end_of_a_call_tells_how_long_it_waited_and_how_long_it_ran() {
    let scene = Scene::in_memory();
    let Held { service, mut arrived } = Held::new();
    let (own, mut ended) = ends();
    let _server = scene.serve(service.concurrency(1).prefetch(8).with(own)).await;
    let client = scene.client().await;
    let calls = [1, 2].map(|number| tokio::spawn(hold(&client, number)));
    let first = soon(arrived.recv()).await.expect("it runs");
    sent(&client, 2).await;
    let (waited, ran) = (Duration::from_secs(5), Duration::from_secs(7));
    let second = later(waited, async {
        first.release();
        arrived.recv().await.expect("it runs")
    });
    let second = second.await;
    let end = next(&mut ended).await;
    assert!(end.handler_time >= Some(waited) && end.took >= waited, "{end:?}");
    later(ran, async { second.release() }).await;
    let end = next(&mut ended).await;
    // The time in the queue is by the clocks of the machines, which stand still for nobody.
    assert!(end.queue_time.is_some() && end.handler_time >= Some(ran), "{end:?}");
    assert!(end.took >= waited + ran, "{end:?}");
    for call in calls {
        soon(call).await.expect("no panic").expect("an answer");
    }
}

#[tokio::test]
async fn who_publishes_through_middleware_hears_that_a_subscriber_has_missed_the_event() {
    let scene = Scene::in_memory();
    let _server = scene.math().await;
    let transport = scene.transport().await;
    let (name, events) = (format!("{}.full", scene.namespace), format!("{}.events", scene.namespace));
    let full = Queue { max_length: Some(0), ..Queue::new(&name, QueueKind::Exclusive) };
    let binding = Binding { exchange: events, key: "order.created".to_owned(), queue: name };
    transport.declare(&[Declaration::Queue(full), Declaration::Binding(binding)]).await.expect("it is new");
    let client = scene.client_with(|client| client.with(Panics("never"))).await;
    assert_eq!(client.publish("order.created", &()).await.expect("an answer"), Published::NotToAll);
    assert_eq!(client.publish("order.shipped", &()).await.expect("an answer"), Published::ToAll);
}
