//! One call in several attempts: each has an id of its own, and all have the id of the call.

use std::time::Duration;

use hopline::{Client, Code, Codec, Context, DeadLetters, Error, Fault, Method, Running, Service, WhichLetters};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use crate::stranger::Stranger;
use crate::support::{Scene, attempt, frame, soon, told};

const REQUEST: u8 = 1;
const ONEWAY: u8 = 3;
const CANCEL: u8 = 7;

/// A run of `charge`: what it knows of its call, and how it is to end.
#[derive(Debug)]
struct Run {
    context: Context,
    end: oneshot::Sender<Result<u64, Fault>>,
}

impl Run {
    fn ids(&self) -> (Uuid, Uuid) {
        (self.context.call_id(), self.context.request_id())
    }

    fn end(self, outcome: Result<u64, Fault>) {
        self.end.send(outcome).expect("it waits");
    }
}

/// A service whose `charge` tells of each run.
fn billing(method: Method) -> (Service, mpsc::UnboundedReceiver<Run>) {
    let (tell, runs) = mpsc::unbounded_channel();
    let service = Service::new("billing", 1).method(method, move |context: Context, (_cents,): (u64,)| {
        let (end, told) = oneshot::channel();
        tell.send(Run { context, end }).expect("the test listens");
        async move { told.await.unwrap_or_else(|_| Err(Fault::new(Code::Internal, "the test let go of it"))) }
    });
    (service, runs)
}

fn once() -> Method {
    Method::new("charge").dedup(Duration::from_secs(600))
}

async fn next(runs: &mut mpsc::UnboundedReceiver<Run>) -> Run {
    soon(runs.recv()).await.expect("it runs")
}

/// A server that bills, its runs, and a peer that calls it.
async fn staged(scene: &Scene, method: Method) -> (Running, mpsc::UnboundedReceiver<Run>, Stranger) {
    let (service, runs) = billing(method);
    (scene.serve(service).await, runs, Stranger::new(scene).await)
}

fn not_now() -> Result<u64, Fault> {
    Err(Fault::new(Code::Unavailable, "not now"))
}

/// The first request of a call, whose id is the call's.
fn first() -> (Uuid, Vec<u8>) {
    let id = Uuid::new_v4();
    (id, frame(REQUEST, Codec::Json, id, "charge", b"[5]"))
}

/// Another request for a call.
fn again(call: Uuid) -> (Uuid, Vec<u8>) {
    attempt(REQUEST, Codec::Json, call, "charge", b"[5]")
}

async fn call(stranger: &Stranger, body: &[u8]) {
    stranger.send("rpc", "billing.v1", body.to_vec(), Some(stranger.reply_to.clone()), None).await;
}

/// The id and the status of the next answer, and the last byte of it.
async fn answer(stranger: &mut Stranger) -> (Uuid, u8, u8) {
    let (id, status, reply) = stranger.answer().await;
    (id, status, *reply.last().expect("a frame has a header"))
}

/// Lets the attempt with these ids run, and waits for its answer.
async fn runs_and_is_answered(
    runs: &mut mpsc::UnboundedReceiver<Run>,
    stranger: &mut Stranger,
    (call_id, attempt): (Uuid, Uuid),
) {
    let run = next(runs).await;
    assert_eq!(run.ids(), (call_id, attempt));
    run.end(Ok(7));
    assert_eq!(answer(stranger).await, (attempt, 0, b'7'));
}

#[tokio::test]
async fn a_handler_knows_the_call_and_the_attempt() {
    let scene = Scene::new();
    let (_server, mut runs, mut stranger) = staged(&scene, Method::new("charge")).await;
    let (call_id, body) = first();
    call(&stranger, &body).await;
    let run = next(&mut runs).await;
    assert_eq!(run.ids(), (call_id, call_id));
    run.end(not_now());
    answer(&mut stranger).await;
    let (retry, body) = again(call_id);
    call(&stranger, &body).await;
    runs_and_is_answered(&mut runs, &mut stranger, (call_id, retry)).await;
}

#[tokio::test]
async fn another_attempt_of_a_call_that_has_ended_gets_its_result_under_its_own_id() {
    let scene = Scene::new();
    let (_server, mut runs, mut stranger) = staged(&scene, once()).await;
    let (call_id, body) = first();
    call(&stranger, &body).await;
    next(&mut runs).await.end(Ok(7));
    assert_eq!(answer(&mut stranger).await, (call_id, 0, b'7'));
    for _ in 0..2 {
        let (retry, body) = again(call_id);
        call(&stranger, &body).await;
        assert_eq!(answer(&mut stranger).await, (retry, 0, b'7'));
    }
    runs.try_recv().expect_err("it ran once");
}

#[tokio::test]
async fn another_attempt_runs_after_a_fault() {
    let scene = Scene::new();
    let (_server, mut runs, mut stranger) = staged(&scene, once()).await;
    let (call_id, body) = first();
    call(&stranger, &body).await;
    next(&mut runs).await.end(not_now());
    for _ in 0..2 {
        assert_eq!(answer(&mut stranger).await.1, Code::Unavailable as u8);
        // The same attempt is answered as it was.
        call(&stranger, &body).await;
    }
    assert_eq!(answer(&mut stranger).await.1, Code::Unavailable as u8);
    let (retry, body) = again(call_id);
    call(&stranger, &body).await;
    next(&mut runs).await.end(Ok(7));
    assert_eq!(answer(&mut stranger).await, (retry, 0, b'7'));
    runs.try_recv().expect_err("it ran twice");
}

/// Has an attempt wait for the first one, which runs. Gives out that run, and the id of the attempt that waits.
async fn waiting(stranger: &Stranger, runs: &mut mpsc::UnboundedReceiver<Run>) -> (Run, Uuid) {
    let (call_id, body) = first();
    call(stranger, &body).await;
    let running = next(runs).await;
    let (retry, body) = again(call_id);
    call(stranger, &body).await;
    // The instance has the second once it runs what came after it.
    let (_, later) = first();
    call(stranger, &later).await;
    let later = next(runs).await;
    assert_ne!(later.context.call_id(), call_id);
    // It needs no answer.
    drop(later);
    (running, retry)
}

/// The answer to this attempt: those to others are passed over.
async fn answer_to(stranger: &mut Stranger, attempt: Uuid) -> (u8, u8) {
    loop {
        let (id, status, last) = answer(stranger).await;
        if id == attempt {
            return (status, last);
        }
    }
}

#[tokio::test]
async fn another_attempt_of_a_call_that_runs_waits_for_its_result() {
    let scene = Scene::new();
    let (_server, mut runs, mut stranger) = staged(&scene, once()).await;
    let (running, retry) = waiting(&stranger, &mut runs).await;
    running.end(Ok(7));
    assert_eq!(answer_to(&mut stranger, retry).await, (0, b'7'));
    runs.try_recv().expect_err("it ran once");
}

#[tokio::test]
async fn an_attempt_that_waits_runs_itself_when_the_first_one_fails_or_is_given_up() {
    for is_given_up in [false, true] {
        let scene = Scene::new();
        let (_server, mut runs, mut stranger) = staged(&scene, once()).await;
        let (running, retry) = waiting(&stranger, &mut runs).await;
        if is_given_up {
            let cancel = frame(CANCEL, Codec::Raw, running.context.request_id(), "charge", b"");
            stranger.send("rpc", "billing.v1@*", cancel, None, None).await;
        } else {
            running.end(not_now());
        }
        let run = next(&mut runs).await;
        assert_eq!(run.context.request_id(), retry);
        run.end(Ok(8));
        assert_eq!(answer_to(&mut stranger, retry).await, (0, b'8'));
    }
}

#[tokio::test]
async fn a_cancel_of_one_attempt_ends_no_other() {
    let scene = Scene::new();
    let (_server, mut runs, mut stranger) = staged(&scene, Method::new("charge")).await;
    let (call_id, body) = first();
    let cancel = frame(CANCEL, Codec::Raw, call_id, "charge", b"");
    let (retry, other) = again(call_id);
    // Whoever heard of a cancel does not run what it is for.
    stranger.send("rpc", "billing.v1@*", cancel, None, None).await;
    let client = scene.client().await;
    while told(1, async |window| client.registry().total(window).all_stats().await).await[0].cancels_ignored == 0 {}
    for body in [&body, &other] {
        call(&stranger, body).await;
    }
    runs_and_is_answered(&mut runs, &mut stranger, (call_id, retry)).await;
}

#[tokio::test]
async fn another_user_does_not_get_the_answer_of_a_call() {
    // RabbitMQ under test has one user.
    let scene = Scene::in_memory();
    let (service, mut runs) = billing(once());
    let _server = scene.serve(service).await;
    let name = scene.url.strip_prefix("memory://").expect("it is in memory");
    let user = async |user: &str, namespace: &str| {
        let scene = Scene { namespace: namespace.to_owned(), ..Scene::at(format!("memory://{user}@{name}")) };
        Stranger::new(&scene).await
    };
    let (call_id, body) = first();
    for (number, name) in [(7, "alice"), (8, "bob")] {
        let mut stranger = user(name, &scene.namespace).await;
        call(&stranger, &body).await;
        next(&mut runs).await.end(Ok(number));
        let told = b'0' + u8::try_from(number).expect("a digit");
        assert_eq!(answer(&mut stranger).await, (call_id, 0, told));
        call(&stranger, &body).await;
        assert_eq!(answer(&mut stranger).await, (call_id, 0, told));
        stranger.transport.close().await;
    }
    runs.try_recv().expect_err("it ran once for each");
}

/// Sends another attempt of a oneway call, and tells the ids of the call and of the attempt.
async fn oneway(stranger: &Stranger) -> (Uuid, Uuid) {
    let call_id = Uuid::new_v4();
    let (id, body) = attempt(ONEWAY, Codec::Json, call_id, "charge", b"[5]");
    stranger.send("oneway", "billing.v1.charge", body, None, None).await;
    (call_id, id)
}

#[tokio::test]
async fn a_oneway_call_keeps_its_ids_when_it_is_tried_again_kept_and_replayed() {
    let scene = Scene::new();
    let (_server, mut runs, stranger) =
        staged(&scene, Method::new("charge").oneway().attempts(2).pause(Duration::ZERO)).await;
    let ids = oneway(&stranger).await;
    for number in [1, 2] {
        let run = next(&mut runs).await;
        assert_eq!((run.ids(), run.context.attempt()), (ids, number));
        run.end(not_now());
    }
    let dead = DeadLetters::builder().namespace(&scene.namespace).connect(&scene.url, "billing").await;
    let dead = dead.expect("the broker is there");
    let is_there = async {
        while dead.count().await.expect("it can be counted") == 0 {
            tokio::task::yield_now().await;
        }
    };
    soon(is_there).await;
    let listed = dead.list(10).await.expect("it is there").letters;
    let letter = &listed[0];
    assert_eq!((letter.call_id.as_deref(), &*letter.id), (Some(&*ids.0.to_string()), &*ids.1.to_string()));
    dead.replay(&WhichLetters::All, |_| {}).await.expect("it is published");
    let run = next(&mut runs).await;
    assert_eq!((run.ids(), run.context.attempt()), (ids, 1));
    run.end(Ok(7));
}

#[tokio::test]
async fn a_call_that_a_leaving_server_gives_back_keeps_its_ids() {
    let scene = Scene::new();
    let (service, mut runs) = billing(Method::new("charge").oneway());
    let leaving = scene.serve(service.prefetch(10).concurrency(1)).await;
    let mut stranger = Stranger::new(&scene).await;
    let (_, body) = first();
    call(&stranger, &body).await;
    let busy = next(&mut runs).await;
    let call_id = Uuid::new_v4();
    let (retry, body) = again(call_id);
    call(&stranger, &body).await;
    let oneway = oneway(&stranger).await;
    let drained = tokio::spawn(leaving.drain());
    let (service, mut elsewhere) = billing(Method::new("charge").oneway());
    let _staying = scene.serve(service).await;
    let mut ids = Vec::new();
    for _ in 0..2 {
        let run = next(&mut elsewhere).await;
        ids.push(run.ids());
        run.end(Ok(7));
    }
    ids.sort_unstable();
    let mut expected = [(call_id, retry), oneway];
    expected.sort_unstable();
    assert_eq!(ids, expected);
    busy.end(Ok(8));
    assert_eq!(answer_to(&mut stranger, retry).await, (0, b'7'));
    soon(drained).await.expect("no panic");
}

#[tokio::test]
async fn the_first_request_of_a_client_has_the_id_of_its_call() {
    let scene = Scene::new();
    let (service, mut runs) = billing(Method::new("charge").oneway());
    let _server = scene.serve(service).await;
    let client: Client = scene.client().await;
    let pending = client.call::<u64>("billing", "charge", (5,)).start().await.expect("on its way");
    let run = next(&mut runs).await;
    assert_eq!(run.context.call_id(), run.context.request_id());
    run.end(Ok(7));
    let outcome: Result<u64, Error> = soon(pending).await;
    assert_eq!(outcome.expect("answered"), 7);
}
