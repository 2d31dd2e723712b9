//! Calls that do not go well. Each has an outcome, and none waits longer than it must.

use std::future::IntoFuture;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hopline::topology::Binding;
use hopline::{CallError, Client, Code, Codec, Context, Dispatch, Error, Fault, Method, Server, Service};
use tokio::sync::mpsc;

use crate::stranger::{Impostor, failing_reply};
use crate::support::{Calculator, Held, MathClient, MathError, MathServer, Scene, code, hold, later, soon};

const MINUTES: Duration = Duration::from_secs(600);
/// A time-out that the test reaches by advancing the clock.
const BRIEF: Duration = Duration::from_secs(5);

#[tokio::test]
async fn a_service_that_nobody_serves_is_known_at_once() {
    let scene = Scene::new();
    let client = scene.client().await;
    let call = client.call::<()>("nobody", "home", [(); 0]).timeout(MINUTES);
    match soon(call.into_future()).await {
        Err(Error::NoService { service, .. }) => assert_eq!(service, "nobody.v1"),
        other => panic!("{other:?}"),
    }
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let math = MathClient::new(&client);
    match soon(math.add(1, 2).to("elsewhere").timeout(MINUTES).into_future()).await {
        Err(Error::NoService { service, .. }) => assert_eq!(service, "math.v1@elsewhere"),
        other => panic!("{other:?}"),
    }
    match soon(client.call::<()>("math.v2", "add", (1, 2)).timeout(MINUTES).into_future()).await {
        Err(Error::NoService { service, .. }) => assert_eq!(service, "math.v2"),
        other => panic!("{other:?}"),
    }
    assert_eq!(math.add(1, 2).await.expect("the connection is as good as before"), 3);
}

#[tokio::test]
async fn a_call_whose_binding_was_deleted_is_told_that_the_queue_is_out_of_reach() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let (client, transport) = (scene.client().await, scene.transport().await);
    let queue = format!("{}.math.v1.calls", scene.namespace);
    let binding =
        Binding { exchange: format!("{}.rpc", scene.namespace), key: "math.v1".to_owned(), queue: queue.clone() };
    let call = || MathClient::new(&client).add(1, 2).timeout(MINUTES).into_future();
    assert_eq!(soon(call()).await.expect("answered"), 3);
    let told = loop {
        transport.unbind(std::slice::from_ref(&binding)).await.expect("not bound any more");
        // The server may have bound the queue again in the meantime.
        match soon(call()).await {
            Ok(sum) => assert_eq!(sum, 3),
            Err(error) => break error,
        }
    };
    match told {
        Error::Unreachable { method, queue: named, .. } => assert_eq!((&*method, named), ("math.v1.add", queue)),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_service_is_gone_when_its_grace_period_is_over() {
    let scene = Scene::new();
    let server = scene.serve(MathServer::new(Calculator).grace(Duration::ZERO)).await;
    let client = scene.client().await;
    let math = MathClient::new(&client);
    math.nothing().await.expect("it is there");
    server.drain().await;
    let gone = async {
        // Until the broker has deleted the queue, a call waits in it for a server.
        while !matches!(math.nothing().timeout(Duration::from_millis(100)).await, Err(Error::NoService { .. })) {}
    };
    soon(gone).await;
}

#[tokio::test]
async fn a_call_waits_in_the_queue_for_a_server_that_restarts() {
    let scene = Scene::new();
    scene.serve(MathServer::new(Calculator)).await.drain().await;
    let client = scene.client().await;
    let waiting = MathClient::new(&client).add(2, 3).start().await.expect("within the grace period");
    let _server = scene.serve(MathServer::new(Calculator)).await;
    assert_eq!(soon(waiting).await.expect("the new server answers"), 5);
}

#[tokio::test]
async fn a_deadline_ends_a_call_that_runs_and_the_handler_with_it() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let client = scene.client().await;
    let pending = hold(&client, 1).timeout(BRIEF).start().await.expect("on its way");
    let call = soon(arrived.recv()).await.expect("it runs");
    match later(BRIEF, pending).await {
        Err(Error::Timeout { method, after, why, .. }) => {
            assert_eq!(method, "held.v1.hold");
            assert_eq!(after, BRIEF);
            assert_eq!(why, hopline::Unanswered::Unknown);
        }
        other => panic!("{other:?}"),
    }
    soon(call.context.cancelled()).await;
}

#[tokio::test]
async fn a_call_whose_deadline_passes_in_the_queue_is_never_run() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service.prefetch(1).concurrency(1)).await;
    let (client, transport) = (scene.client().await, scene.transport().await);
    let first = hold(&client, 1).start().await.expect("on its way");
    let busy = soon(arrived.recv()).await.expect("it came");
    let expired = hold(&client, 2).timeout(Duration::from_millis(200)).await;
    assert!(matches!(expired, Err(Error::Timeout { .. })), "{expired:?}");
    // The broker's own clock decides when the message expires.
    scene.waiting(&transport, "held.v1.calls", 0).await;
    busy.release();
    first.await.expect("answered");
    let last = hold(&client, 3).start().await.expect("on its way");
    let next = soon(arrived.recv()).await.expect("it came");
    assert_eq!(next.number, 3, "the expired call was run");
    next.release();
    last.await.expect("answered");
}

#[tokio::test]
async fn an_unknown_method_is_refused_with_those_there_are() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    match client.call::<()>("math", "substract", (3, 2)).await {
        Err(Error::Fault(Fault { code: Code::Unimplemented, message, .. })) => {
            assert_eq!(
                message,
                "`math.v1` has no method `substract`: it has add, div, echo, heard, join, nothing, panic, whoami"
            );
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn arguments_that_do_not_fit_are_refused_with_the_methods_signature() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    match client.call::<i64>("math", "add", ("two", 3)).await {
        Err(Error::Fault(Fault { code: Code::InvalidArgument, message, .. })) => {
            assert!(message.contains("add(a: i64, b: i64) -> i64"), "{message}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(code(client.call::<i64>("math", "add", (1,)).await), Code::InvalidArgument);
    assert_eq!(code(client.call::<i64>("math", "add", (1, 2, 3)).await), Code::InvalidArgument);
    assert_eq!(code(client.call::<i64>("math", "add", "not an array").await), Code::InvalidArgument);
    assert_eq!(MathClient::new(&client).add(1, 2).await.expect("the next call works"), 3);
}

#[tokio::test]
async fn a_reply_that_does_not_fit_the_callers_type_is_unreadable_and_the_method_has_run() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let outcome = client.call::<String>("math", "add", (1, 2)).await;
    let error = outcome.expect_err("a number is no text");
    assert!(matches!(error, Error::UnreadableReply(_)) && error.may_have_run(), "{error:?}");
}

#[tokio::test]
async fn a_methods_own_error_arrives_typed() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let error = MathClient::new(&client).div(5, 0).await.expect_err("no such number");
    assert_eq!(error.to_string(), "the service returned its own error: 5 cannot be divided by zero");
    match error {
        CallError::Service(error) => assert_eq!(error, MathError::DivisionByZero { dividend: 5 }),
        other => panic!("{other:?}"),
    }
    assert_eq!(MathClient::new(&client).div(6, 3).await.expect("a number"), 2);
    // A caller that does not name the error's type is told that there is one.
    assert_eq!(code(client.call::<i64>("math", "div", (5, 0)).await), Code::Unknown);
}

#[tokio::test]
async fn a_handler_may_refuse_with_a_fault_of_its_choice() {
    let scene = Scene::new();
    let _server = scene
        .serve(Service::new("shop", 1).method(Method::new("find"), |_: Context, (id,): (u64,)| async move {
            let fault = Fault::new(Code::NotFound, format!("no order {id}"));
            Err::<(), _>(fault.retry_after(Duration::from_millis(1500)))
        }))
        .await;
    let client = scene.client().await;
    match client.call::<()>("shop", "find", (7,)).await {
        Err(Error::Fault(fault)) => {
            assert_eq!((fault.code, fault.message.as_str()), (Code::NotFound, "no order 7"));
            assert_eq!(fault.retry_after, Some(Duration::from_millis(1500)));
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_fault_is_never_a_success() {
    let scene = Scene::new();
    let fail = |_: Context, _: [(); 0]| async move {
        Err::<(), _>(Fault::new(Code::Ok, "all is well").retry_after(Duration::from_secs(1)))
    };
    let _server = scene.serve(Service::new("shop", 1).method(Method::new("find"), fail)).await;
    let client = scene.client().await;
    for codec in [Codec::Raw, Codec::Cbor, Codec::Json, Codec::MessagePack] {
        match client.call::<serde_bytes::ByteBuf>("shop", "find", [(); 0]).codec(codec).await {
            Err(Error::Fault(fault)) => {
                assert_eq!(fault.code, Code::Internal);
                assert!(fault.message.contains("code OK") && fault.message.ends_with("all is well"), "{fault}");
            }
            other => panic!("{codec:?}: {other:?}"),
        }
    }
}

#[tokio::test]
async fn a_reply_of_another_make_that_tells_of_an_error_is_none_whatever_its_status() {
    let scene = Scene::new();
    scene.serve(Service::new("shop", 1)).await.drain().await;
    let client = scene.client().await;
    let mut impostor = Impostor::new(&scene, "shop.v1").await;
    for (status, text, code, said) in [
        (0, "so what", Code::Unknown, "so what"),
        (0, "", Code::Unknown, "the server gave no reason"),
        (5, "", Code::NotFound, "the server gave no reason"),
    ] {
        let find = client.call::<serde_bytes::ByteBuf>("shop", "find", [(); 0]).codec(Codec::Raw);
        let pending = find.start().await.expect("on its way");
        let (call, reply_to) = impostor.taken().await;
        impostor.send(&reply_to, failing_reply(&call, status, text)).await;
        match soon(pending).await {
            Err(Error::Fault(fault)) => assert_eq!((fault.code, fault.message.as_str()), (code, said)),
            other => panic!("{other:?}"),
        }
    }
}

mod shop {
    /// An error of the service's own that has hopline's name.
    #[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
    pub(crate) enum Fault {
        SoldOut { item: u64 },
    }
}

/// Hopline's `Fault` under another name.
type Refusal = hopline::Fault;

#[hopline::service]
trait Shop {
    async fn own(&self, item: u64) -> Result<u64, shop::Fault>;
    async fn refusal(&self, item: u64) -> Result<u64, Refusal>;
}

struct Corner;

impl Shop for Corner {
    async fn own(&self, item: u64) -> Result<u64, shop::Fault> {
        Err(shop::Fault::SoldOut { item })
    }

    async fn refusal(&self, item: u64) -> Result<u64, Refusal> {
        Err(Refusal::new(Code::NotFound, format!("no item {item}")))
    }
}

#[tokio::test]
async fn an_error_is_a_fault_by_its_type_and_not_by_its_name() {
    let scene = Scene::new();
    let _server = scene.serve(ShopServer::new(Corner)).await;
    let client = scene.client().await;
    match ShopClient::new(&client).own(7).await {
        Err(CallError::Service(error)) => assert_eq!(error, shop::Fault::SoldOut { item: 7 }),
        other => panic!("{other:?}"),
    }
    assert_eq!(code(ShopClient::new(&client).refusal(7).await), Code::NotFound);
    // A call written by hand gets the same.
    assert_eq!(code(client.call::<u64>("shop", "refusal", (7,)).fails_with::<Refusal>().await), Code::NotFound);
}

#[tokio::test]
async fn a_handlers_own_deadline_is_not_the_callers() {
    let scene = Scene::new();
    let _server = scene
        .serve(Service::new("shop", 1).method(Method::new("find"), |_: Context, _: [(); 0]| async move {
            Err::<(), _>(Fault::new(Code::DeadlineExceeded, "the database took too long"))
        }))
        .await;
    let client = scene.client().await;
    match client.call::<()>("shop", "find", [(); 0]).await {
        Err(Error::Fault(fault)) => assert_eq!(fault.message, "the database took too long"),
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_message_over_the_brokers_own_cap_is_too_large_and_harms_no_other() {
    const LARGE: usize = 20 * 1024 * 1024;
    let scene = Scene::new();
    let builder = Server::builder().namespace(&scene.namespace).max_message_size(usize::MAX);
    let service = Service::new("long", 1)
        .prefetch(2)
        .method(Method::new("text"), |_: Context, (length, _): (usize, String)| async move {
            Ok::<_, Fault>("x".repeat(length))
        });
    let _running =
        builder.connect(&scene.url).await.expect("connects").serve(service).start().await.expect("can be served");
    let client = Client::builder().namespace(&scene.namespace).max_message_size(usize::MAX);
    let client = client.connect(&scene.url).await.expect("connects");
    let call = |reply: usize, request: usize| client.call::<String>("long", "text", (reply, "x".repeat(request)));
    // RabbitMQ 4 takes 16 MiB unless told otherwise, 3.10 and memory take more.
    for _ in 0..3 {
        match call(LARGE, 0).await {
            Ok(text) => assert_eq!(text.len(), LARGE),
            Err(Error::TooLarge { what: "reply", limit, whose: "server's or broker's", .. }) => assert!(limit < LARGE),
            other => panic!("{:?}", other.map(|text| text.len())),
        }
        match call(1, LARGE).await {
            Ok(text) => assert_eq!(text, "x"),
            Err(Error::TooLarge { what: "request", limit, whose: "broker's", .. }) => assert!(limit < LARGE),
            other => panic!("{:?}", other.map(|text| text.len())),
        }
        assert_eq!(call(3, 3).await.expect("the next call works"), "xxx");
    }
}

#[tokio::test]
async fn a_panic_while_a_cancelled_handler_is_dropped_ends_nothing_else() {
    struct Bomb;
    impl Drop for Bomb {
        fn drop(&mut self) {
            // A second panic while the first unwinds would abort.
            assert!(std::thread::panicking(), "as the test asks");
        }
    }
    for dispatch in [Dispatch::Inline, Dispatch::Spawn, Dispatch::Blocking, Dispatch::Pool(1)] {
        let scene = Scene::new();
        let (tick, mut ticks) = mpsc::unbounded_channel();
        let service = Service::new("bomb", 1).prefetch(1).concurrency(1).dispatch(dispatch);
        let service = service
            .method(Method::new("tick"), move |_: Context, _: [(); 0]| {
                tick.send(()).expect("the test listens");
                async move {
                    let _bomb = Bomb;
                    std::future::pending::<Result<(), Fault>>().await
                }
            })
            .method(Method::new("ok"), |_: Context, _: [(); 0]| async move { Ok::<_, Fault>(()) });
        let _server = scene.serve(service).await;
        let client = scene.client().await;
        for _ in 0..2 {
            let ticking = client.call::<()>("bomb", "tick", [(); 0]).start().await.expect("on its way");
            soon(ticks.recv()).await.expect("it runs");
            drop(ticking);
            soon(client.call::<()>("bomb", "ok", [(); 0]).into_future()).await.expect("the service goes on");
        }
        // A handler whose deadline passes is dropped as well.
        for millis in (1..).map(|n| 50 * n) {
            let ticking = client.call::<()>("bomb", "tick", [(); 0]).timeout(Duration::from_millis(millis)).await;
            assert!(matches!(ticking, Err(Error::Timeout { .. } | Error::Fault(_))), "{dispatch:?}: {ticking:?}");
            soon(client.call::<()>("bomb", "ok", [(); 0]).into_future()).await.expect("the service goes on");
            if ticks.try_recv().is_ok() {
                break;
            }
        }
    }
}

#[tokio::test]
async fn a_panic_ends_its_call_and_nothing_else() {
    let scene = Scene::new();
    let server = scene.serve(MathServer::new(Calculator).concurrency(1)).await;
    let client = scene.client().await;
    let math = MathClient::new(&client);
    for _ in 0..3 {
        match math.panic().await {
            Err(Error::Fault(Fault { code: Code::Internal, message, .. })) => {
                assert!(message.contains("math.v1.panic") && message.contains(server.instance()), "{message}");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(math.add(1, 2).await.expect("the server goes on"), 3);
    }
}

#[tokio::test]
async fn a_request_over_the_cap_never_leaves() {
    let scene = Scene::new();
    let builder = Client::builder().namespace(&scene.namespace).max_message_size(1000);
    let client = builder.connect(&scene.url).await.expect("connects");
    // Nobody serves it. If it had been sent, it would have been returned as `NoService`.
    match client.call::<()>("nobody", "home", ("x".repeat(1000),)).await {
        Err(Error::TooLarge { what: "request", size, limit: 1000, whose: "client's", .. }) => assert!(size > 1000),
        other => panic!("{other:?}"),
    }
    match client.publish("key", &"x".repeat(1000)).await {
        Err(Error::TooLarge { what: "event", whose: "client's", .. }) => {}
        other => panic!("{other:?}"),
    }
    let call = client.call::<()>("nobody", "home", [(); 0]).metadata("large", "x".repeat(100_000));
    let error = call.await.expect_err("too large");
    assert!(matches!(error, Error::TooLarge { what: "metadata", .. }));
    assert!(error.to_string().ends_with("over the fixed cap of 61440: shorten it"), "{error}");
}

#[tokio::test]
async fn a_reply_over_the_cap_is_known_to_the_caller() {
    let scene = Scene::new();
    let server = Server::builder().namespace(&scene.namespace).max_message_size(1000).connect(&scene.url).await;
    let text = |_: Context, (length,): (usize,)| async move { Ok::<_, Fault>("x".repeat(length)) };
    let server = server.expect("connects").serve(Service::new("long", 1).method("text", text));
    let _running = server.start().await.expect("can be served");
    let client = scene.client().await;
    match client.call::<String>("long", "text", (5000,)).await {
        Err(Error::TooLarge { what: "reply", size, limit: 1000, .. }) => assert!(size > 5000),
        other => panic!("{other:?}"),
    }
    assert_eq!(client.call::<String>("long", "text", (5,)).await.expect("the next call works"), "xxxxx");
}

#[tokio::test]
async fn a_full_queue_refuses_at_once() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service.prefetch(1).concurrency(1).max_queue(1)).await;
    let client = scene.client().await;
    let first = hold(&client, 0).start().await.expect("on its way");
    let busy = soon(arrived.recv()).await.expect("it came");
    // One call runs, one waits. How many more messages a broker accepts before it refuses depends on the broker.
    let mut waiting = Vec::new();
    let refused = loop {
        let mut pending = hold(&client, 1).timeout(MINUTES).start().await.expect("on its way");
        // Either the broker refuses the call, or it waits: then the answer to a later call shows that the broker has
        // received it.
        let probe = client.call::<()>("nobody", "home", [(); 0]);
        tokio::select! {
            outcome = &mut pending => break outcome,
            _ = probe.into_future() => {}
        }
        waiting.push(pending);
        assert!(waiting.len() < 100, "the queue takes everything");
    };
    match refused {
        Err(Error::Overloaded { what, .. }) => assert_eq!(what, "the queue of `held.v1` is full"),
        other => panic!("{other:?}"),
    }
    busy.release();
    first.await.expect("answered");
}

#[tokio::test]
async fn names_that_cannot_be_on_the_broker_are_refused() {
    let scene = Scene::new();
    let client = scene.client().await;
    for (service, method) in [("a b", "m"), ("", "m"), ("a", "m.n"), ("a.v", "m"), ("a.v1.b", "m"), ("a", "")] {
        let outcome = client.call::<()>(service, method, [(); 0]).await;
        assert!(matches!(outcome, Err(Error::Invalid(_))), "{service} {method}: {outcome:?}");
    }
    let outcome = client.call::<()>("a", "m", [(); 0]).to("x".repeat(300)).await;
    assert!(matches!(outcome, Err(Error::Invalid(_))), "{outcome:?}");
    let refused = |outcome: Result<hopline::Running, Error>| match outcome {
        Err(Error::Invalid(why)) => why,
        other => panic!("{other:?}"),
    };
    let server = scene.server().await.serve(Service::new("a.b", 1));
    assert!(refused(server.start().await).contains("`a.b`"));
    let misnamed = Service::new("a", 1).method("m n", |_: Context, (): ()| async { Ok::<_, Fault>(()) });
    let server = scene.server().await.serve(misnamed);
    assert!(refused(server.start().await).contains("`m n`"));
    let server = scene.server().await.serve(MathServer::new(Calculator)).serve(MathServer::new(Calculator));
    assert!(refused(server.start().await).contains("`math.v1` is served twice"));
    let server = scene.server().await.serve(MathServer::new(Calculator).max_queue(0));
    let why = refused(server.start().await);
    assert!(why.contains("`math.v1`") && why.contains("`max_queue(0)`"), "{why}");
    let handler = |_: Context, _: [(); 0]| async { Ok::<_, Fault>(()) };
    let slow = Service::new("a", 1).method(Method::new("m").pause(Duration::from_secs(41 * 86_400)), handler);
    assert!(refused(scene.server().await.serve(slow).start().await).contains("`m` pauses for 3542400s"));
    let outcome = Client::builder().namespace("a.b").connect(&scene.url).await;
    assert!(matches!(outcome, Err(Error::Invalid(_))), "{outcome:?}");
}

#[tokio::test]
async fn a_queue_with_other_arguments_is_refused_with_each_that_differs() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let other = MathServer::new(Calculator).grace(Duration::from_secs(5)).max_queue(10);
    match scene.server().await.serve(other).start().await {
        Err(Error::Mismatch { name, differences, .. }) => {
            assert!(name.contains("math.v1.calls"), "{name}");
            let said = differences.join("; ");
            assert!(said.contains("x-expires") && said.contains("x-max-length"), "{said}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn what_a_dead_worker_held_is_run_again_only_if_it_is_idempotent() {
    for idempotent in [false, true] {
        let scene = Scene::new();
        let method = if idempotent { Method::new("hold").idempotent() } else { Method::new("hold") };
        let Held { service, mut arrived } = Held::of(method.clone());
        let dying = scene.serve(service).await;
        let client = scene.client().await;
        let pending = hold(&client, 7).start().await.expect("on its way");
        let running = soon(arrived.recv()).await.expect("it runs");
        assert!(!running.context.redelivered());

        let Held { service, arrived: mut second } = Held::of(method);
        let _heir = scene.serve(service).await;
        // Its connection ends before the call is settled.
        drop(dying);
        if idempotent {
            let again = soon(second.recv()).await.expect("it runs again");
            assert!(again.context.redelivered());
            again.release();
            assert_eq!(soon(pending).await.expect("answered"), 7);
        } else {
            assert_eq!(code(soon(pending).await), Code::Aborted);
            second.try_recv().expect_err("it was run twice");
        }
    }
}

#[tokio::test]
async fn a_closed_client_ends_its_calls_and_refuses_more() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let client = scene.client().await;
    let pending = hold(&client, 1).timeout(MINUTES).start().await.expect("on its way");
    let _held = soon(arrived.recv()).await.expect("it came");
    client.close().await;
    match soon(pending).await {
        Err(Error::Disconnected { may_have_run: true, .. }) => {}
        other => panic!("{other:?}"),
    }
    match soon(hold(&client, 2).into_future()).await {
        Err(Error::Disconnected { may_have_run: false, .. }) => {}
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_late_reply_harms_nobody() {
    let scene = Scene::new();
    let ran = Arc::new(AtomicUsize::new(0));
    let counter = ran.clone();
    let _server = scene
        .serve(Service::new("late", 1).method(Method::new("go"), move |_: Context, (n,): (u64,)| {
            counter.fetch_add(1, Ordering::SeqCst);
            async move { Ok::<_, Fault>(n) }
        }))
        .await;
    let client = scene.client().await;
    for n in 0..50 {
        drop(client.call::<u64>("late", "go", (n,)).start().await.expect("on its way"));
        assert_eq!(client.call::<u64>("late", "go", (n,)).await.expect("its own reply"), n);
    }
    assert!(ran.load(Ordering::SeqCst) >= 50);
}

#[tokio::test]
#[ignore = "needs a RabbitMQ, which has channels: HOPLINE_TEST_URL"]
async fn more_services_than_a_connection_has_channels_for_are_refused_at_once_with_the_way_out() {
    let scene = Scene::new();
    let mut server = scene.server().await;
    for number in 0..1100 {
        server = server.serve(Service::new(&format!("many-{number}"), 1));
    }
    let refused = soon(server.start()).await.expect_err("too many");
    let said = refused.to_string();
    assert!(matches!(refused, Error::Invalid(_)), "{refused:?}");
    assert!(said.contains("1100 services") && said.contains("another `Server`"), "{said}");
}
