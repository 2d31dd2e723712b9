//! What happens to a handler when nobody waits for it any more, and to the tasks that it has started.

use std::time::Duration;

use hopline::blocking::wait;
use hopline::{Client, Code, Codec, Context, Dispatch, Error, Fault, Method, Service};
use tokio::sync::{mpsc, oneshot};
use uuid::Uuid;

use crate::stranger::Stranger;
use crate::support::{Scene, code, frame, soon};

/// A call that has done the first half of its work.
#[derive(Debug)]
struct Half {
    context: Context,
    go_on: oneshot::Sender<()>,
    /// Resolves after the second half. Fails if the handler is dropped before.
    done: oneshot::Receiver<()>,
}

/// A service with one method. It tells when the first half of its work is done, and does the second half when it may.
fn halves(method: Method) -> (Service, mpsc::UnboundedReceiver<Half>) {
    let (tell, begun) = mpsc::unbounded_channel();
    let service = Service::new("halves", 1).method(method, move |context: Context, _: [(); 0]| {
        let ((go_on, goes_on), (finish, done)) = (oneshot::channel(), oneshot::channel());
        tell.send(Half { context, go_on, done }).expect("the test listens");
        async move {
            goes_on.await.expect("the test lets it");
            finish.send(()).expect("the test listens");
            Ok::<u64, Fault>(2)
        }
    });
    (service, begun)
}

async fn next(begun: &mut mpsc::UnboundedReceiver<Half>) -> Half {
    soon(begun.recv()).await.expect("it runs")
}

fn work(client: &Client) -> hopline::Call<u64> {
    client.call("halves", "work", [(); 0])
}

#[tokio::test]
async fn a_handler_is_dropped_when_its_caller_gives_up_unless_its_method_finishes() {
    for dispatch in [Dispatch::Inline, Dispatch::Spawn, Dispatch::Blocking, Dispatch::Pool(1)] {
        for finishes in [false, true] {
            let scene = Scene::new();
            let method = Method::new("work");
            let (service, mut begun) = halves(if finishes { method.finishes() } else { method });
            let server = scene.serve(service.dispatch(dispatch)).await;
            let client = scene.client().await;
            let pending = work(&client).start().await.expect("on its way");
            let half = next(&mut begun).await;
            drop(pending);
            soon(half.context.cancelled()).await;
            if finishes {
                half.go_on.send(()).expect("it waits, cancelled or not");
                soon(half.done).await.expect("it comes to its end");
            } else {
                soon(half.done).await.expect_err("it is dropped");
            }
            // Everything that it sent has left before its server ends, and arrives before what another client sends
            // then.
            soon(server.drain()).await;
            let _other = scene.serve(clock()).await;
            left(&client).await.expect("answered");
            assert_eq!(client.traffic().replies_ignored, 0, "{dispatch:?}: nothing is sent back");
        }
    }
}

#[tokio::test]
async fn a_handler_that_finishes_hears_of_its_deadline_and_its_calls_have_time_of_their_own() {
    let scene = Scene::new();
    let nested = scene.client().await;
    let (tell, mut told) = mpsc::unbounded_channel();
    let order = move |context: Context, _: [(); 0]| {
        let (nested, tell) = (nested.clone(), tell.clone());
        async move {
            context.cancelled().await;
            assert!(context.remaining().is_some_and(|left| left < Duration::from_secs(1)));
            let undone: Result<Option<u64>, Error> = nested.call("stock", "release", [(); 0]).await;
            tell.send(undone).expect("the test listens");
            Ok::<_, Fault>(())
        }
    };
    let release = |context: Context, _: [(); 0]| async move {
        Ok::<_, Fault>(context.remaining().map(|remaining| remaining.as_secs()))
    };
    let shop = Service::new("shop", 1).method(Method::new("order").finishes(), order);
    let stock = Service::new("stock", 1).method(Method::new("release"), release);
    let _server = scene.server().await.serve(shop).serve(stock).start().await.expect("both can be served");
    let client = scene.client().await;
    let late = client.call::<()>("shop", "order", [(); 0]).timeout(Duration::from_millis(100)).await;
    assert!(matches!(late, Err(Error::Timeout { .. })), "{late:?}");
    let left = soon(told.recv()).await.expect("it goes on").expect("its call is answered").expect("a deadline");
    assert!(left > 10, "{left} s of the client's minute");
}

#[tokio::test]
async fn a_drain_waits_for_a_handler_that_finishes() {
    let scene = Scene::new();
    let (service, mut begun) = halves(Method::new("work").finishes());
    let server = scene.serve(service).await;
    let client = scene.client().await;
    let pending = work(&client).start().await.expect("on its way");
    let half = next(&mut begun).await;
    drop(pending);
    soon(half.context.cancelled()).await;
    let instance = server.instance().to_owned();
    let mut drained = Box::pin(server.drain());
    assert!(futures::poll!(&mut drained).is_pending());
    let drained = tokio::spawn(drained);
    // Until the drain has ended, the instance tells its callers that it is leaving.
    assert_eq!(code(soon(work(&client).to(instance)).await), Code::Unavailable);
    assert!(!drained.is_finished(), "one still runs");
    half.go_on.send(()).expect("it waits");
    soon(half.done).await.expect("it comes to its end");
    soon(drained).await.expect("no panic");
}

#[tokio::test]
async fn a_call_that_finished_for_nobody_answers_its_next_delivery() {
    let scene = Scene::new();
    let method = Method::new("work").finishes().dedup(Duration::from_secs(600));
    let (service, mut begun) = halves(method);
    let _server = scene.serve(service).await;
    let mut stranger = Stranger::new(&scene).await;
    let id = Uuid::new_v4();
    let body = frame(1, Codec::Json, id, "work", b"[]");
    let reply_to = Some(stranger.reply_to.clone());
    stranger.send("rpc", "halves.v1", body.clone(), reply_to.clone(), None).await;
    let half = next(&mut begun).await;
    stranger.send("rpc", "halves.v1@*", frame(7, Codec::Raw, id, "work", b""), None, None).await;
    soon(half.context.cancelled()).await;
    half.go_on.send(()).expect("it waits");
    soon(half.done).await.expect("it comes to its end");
    stranger.send("rpc", "halves.v1", body, reply_to, None).await;
    let (answered, status, reply) = stranger.answer().await;
    assert_eq!((answered, status, reply.last()), (id, 0, Some(&b'2')));
    begun.try_recv().expect_err("it ran once");
}

#[tokio::test]
async fn a_oneway_call_is_never_cancelled() {
    let scene = Scene::new();
    let (service, mut begun) = halves(Method::new("work").oneway());
    let _server = scene.serve(service).await;
    let stranger = Stranger::new(&scene).await;
    let client = scene.client().await;
    let (before, running) = (Uuid::new_v4(), Uuid::new_v4());
    let cancel = |id| frame(7, Codec::Raw, id, "work", b"");
    let heard = |count| {
        let ignored = async || {
            let stats = client.registry().stats("halves").await.unwrap_or_default();
            stats.first().map_or(0, |stats| stats.cancels_ignored)
        };
        async move { while ignored().await < count {} }
    };
    stranger.send("rpc", "halves.v1@*", cancel(before), None, None).await;
    soon(heard(1)).await;
    for id in [before, running] {
        stranger.send("oneway", "halves.v1.work", frame(3, Codec::Json, id, "work", b"[]"), None, None).await;
    }
    let both = [next(&mut begun).await, next(&mut begun).await];
    for id in [before, running] {
        stranger.send("rpc", "halves.v1@*", cancel(id), None, None).await;
    }
    soon(heard(3)).await;
    for half in both {
        assert!(!half.context.is_cancelled());
        half.go_on.send(()).expect("it still runs");
        soon(half.done).await.expect("it comes to its end");
    }
}

/// A service that tells how many seconds a call of it has left, and in which trace it is.
fn clock() -> Service {
    Service::new("clock", 1).method(Method::new("left"), |context: Context, _: [(); 0]| async move {
        let trace = context.traceparent().split('-').nth(1).map(str::to_owned);
        Ok::<_, Fault>((context.remaining().map(|left| left.as_secs()), trace))
    })
}

type Left = (Option<u64>, Option<String>);

fn left(client: &Client) -> hopline::Call<Left> {
    client.call("clock", "left", [(); 0]).timeout(Duration::from_secs(1000))
}

#[tokio::test]
async fn calls_on_other_tasks_and_threads_of_a_handler_inherit_its_deadline_and_trace() {
    let scene = Scene::new();
    let nested = scene.client().await;
    let ask = move |context: Context, (way,): (String,)| {
        let nested = nested.clone();
        async move {
            let own = context.traceparent().split('-').nth(1).map(str::to_owned);
            let scoped = context.scope({
                let nested = nested.clone();
                async move { left(&nested).await }
            });
            let outcome = match way.as_str() {
                "spawn" => context.spawn(async move { left(&nested).await }).await,
                "scope" => tokio::spawn(scoped).await,
                "thread" => tokio::task::spawn_blocking(move || wait(scoped)).await,
                // The call is made here and awaited on another task.
                "call" => tokio::spawn(left(&nested)).await,
                "task in a task" => {
                    let inner = async move { Context::current().map(|inner| inner.spawn(left(&nested))) };
                    context.spawn(inner).await.expect("no panic").expect("it has a context").await
                }
                other => panic!("no way `{other}`"),
            };
            let (seconds, trace) = outcome.expect("no panic").map_err(|error| error.to_string())?;
            Ok::<_, String>((seconds, trace == own))
        }
    };
    let outer = Service::new("outer", 1).method(Method::new("ask"), ask);
    let _server = scene.server().await.serve(clock()).serve(outer).start().await.expect("both can be served");
    let client = scene.client().await;
    for way in ["spawn", "scope", "thread", "call", "task in a task"] {
        let call = client.call::<(Option<u64>, bool)>("outer", "ask", (way,)).fails_with::<String>();
        let (seconds, same_trace) = call.timeout(Duration::from_secs(100)).await.expect("answered");
        let seconds = seconds.expect("a deadline");
        assert!((1..=100).contains(&seconds), "{way}: {seconds} s");
        assert!(same_trace, "{way}");
    }
}

#[tokio::test]
async fn a_task_of_a_handler_goes_on_after_it() {
    let scene = Scene::new();
    let ((go_on, goes_on), (tell, told)) = (oneshot::channel::<()>(), oneshot::channel());
    let parts = std::sync::Mutex::new(Some((goes_on, tell)));
    let service = Service::new("outer", 1).method(Method::new("begin"), move |context: Context, _: [(); 0]| {
        let (goes_on, tell) = parts.lock().expect("no panic").take().expect("called once");
        context.spawn(async move {
            let context = Context::current().expect("it has one");
            context.cancelled().await;
            goes_on.await.expect("the test lets it");
            tell.send(context.method().to_owned()).expect("the test listens");
        });
        async { Ok::<_, Fault>(()) }
    });
    let _server = scene.serve(service).await;
    scene.client().await.call::<()>("outer", "begin", [(); 0]).await.expect("answered, with the task under way");
    go_on.send(()).expect("it waits");
    assert_eq!(soon(told).await.expect("it goes on"), "begin");
}
