//! Calls that go well, in every style and with every option.

use std::time::Duration;

use futures::future::join_all;
use hopline::{CallError, Client, Code, Codec, Context, Error, Fault, Method, Service};
use tokio::sync::oneshot;

use crate::support::{Calculator, Held, MathClient, MathError, MathServer, Scene, hold, soon};

#[tokio::test]
async fn every_style_of_call_gives_the_same_answer() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let math = MathClient::new(&client);

    assert_eq!(math.add(2, 3).await.expect("sync style"), 5);

    let pending = math.add(2, 3).start().await.expect("on its way");
    assert_eq!(pending.await.expect("future style"), 5);

    let (heard, outcome) = oneshot::channel();
    math.add(2, 3).then(|outcome| heard.send(outcome).expect("the test listens"));
    assert_eq!(soon(outcome).await.expect("called back").expect("callback style"), 5);

    let untyped: i64 = client.call("math", "add", (2, 3)).await.expect("without the trait");
    assert_eq!(untyped, 5);
    assert_eq!(tokio::spawn(math.add(2, 3)).await.expect("no panic").expect("as a task"), 5);
    let many = join_all((0..500).map(|n| math.add(n, n))).await;
    for (n, sum) in (0..).zip(many) {
        assert_eq!(sum.expect("one of many at once"), 2 * n);
    }
}

#[tokio::test]
async fn a_service_answers_in_the_callers_codec() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let math = MathClient::new(&client);
    for codec in [Codec::Cbor, Codec::Json, Codec::MessagePack] {
        assert_eq!(math.add(-2, 3).codec(codec).await.expect("numbers"), 1, "{codec:?}");
        math.nothing().codec(codec).await.expect("nothing");
        let words = vec!["a".to_owned(), "é".to_owned()];
        assert_eq!(math.join(words, None).codec(codec).await.expect("words"), "a, é", "{codec:?}");
        let error = math.div(7, 0).codec(codec).await.expect_err("no such number");
        assert!(matches!(error, CallError::Service(MathError::DivisionByZero { dividend: 7 })), "{codec:?}: {error}");
    }
    let bytes = serde_bytes::ByteBuf::from((0..=255).collect::<Vec<u8>>());
    assert_eq!(math.echo(bytes.clone()).codec(Codec::Raw).await.expect("raw bytes"), bytes);
    let error = math.add(1, 2).codec(Codec::Raw).await.expect_err("numbers are not bytes");
    assert!(matches!(error, Error::Codec(_)), "{error}");
}

#[tokio::test]
async fn a_client_has_a_codec_and_a_timeout_of_its_own() {
    let scene = Scene::new();
    let _server = scene
        .serve(Service::new("echo", 1).method(Method::new("left"), |ctx: Context, _: [(); 0]| async move {
            Ok::<_, Fault>(ctx.remaining().map(|left| left.as_secs()))
        }))
        .await;
    let builder = Client::builder().namespace(&scene.namespace).codec(Codec::Json).timeout(Duration::from_secs(500));
    let client = builder.connect(&scene.url).await.expect("connects");
    let left: Option<u64> = client.call("echo", "left", [(); 0]).await.expect("answers");
    assert!((400..=500).contains(&left.expect("a deadline")), "{left:?}");
    let left: Option<u64> =
        client.call("echo", "left", [(); 0]).timeout(Duration::from_secs(100)).await.expect("answers");
    assert!((50..=100).contains(&left.expect("a deadline")), "{left:?}");
    // "For ever" is cut to the longest time that the wire can carry, some weeks.
    let left: Option<u64> = client.call("echo", "left", [(); 0]).timeout(Duration::MAX).await.expect("answers");
    assert!(left.expect("a deadline") > 1_000_000, "{left:?}");
    let error = client.call::<()>("echo", "left", [(); 0]).timeout(Duration::ZERO).await.expect_err("no time at all");
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
}

#[tokio::test]
async fn a_large_payload_arrives_whole() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let bytes: Vec<u8> = (0..8 * 1024 * 1024_u32).map(|n| n.to_le_bytes()[0]).collect();
    let bytes = serde_bytes::ByteBuf::from(bytes);
    assert!(MathClient::new(&client).echo(bytes.clone()).await.expect("8 MiB") == bytes);
}

#[tokio::test]
async fn a_call_to_an_instance_reaches_that_instance_alone() {
    let scene = Scene::new();
    let one = scene.serve(MathServer::new(Calculator)).await;
    let two = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let math = MathClient::new(&client);
    for instance in [one.instance(), two.instance()] {
        for _ in 0..10 {
            assert_eq!(math.whoami().to(instance).await.expect("answers"), instance);
        }
    }
}

#[tokio::test]
async fn metadata_reaches_the_handler() {
    let scene = Scene::new();
    let _server = scene
        .serve(Service::new("meta", 1).method(Method::new("get"), |ctx: Context, (name,): (String,)| async move {
            Ok::<_, Fault>(ctx.metadata(&name).map(str::to_owned))
        }))
        .await;
    let client = scene.client().await;
    let get = |name: &str| {
        let call = client.call::<Option<String>>("meta", "get", (name.to_owned(),));
        call.metadata("tenant", "old").metadata("tenant", "blue").metadata("é", "ü")
    };
    assert_eq!(get("tenant").await.expect("answers").as_deref(), Some("blue"));
    assert_eq!(get("é").await.expect("answers").as_deref(), Some("ü"));
    assert_eq!(get("absent").await.expect("answers"), None);
}

#[tokio::test]
async fn a_waiting_call_of_higher_priority_is_served_first() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service.prefetch(1).concurrency(1).priorities()).await;
    let client = scene.client().await;
    let first = hold(&client, 0).start().await.expect("on its way");
    let busy = soon(arrived.recv()).await.expect("it came");
    // The only place is taken. First comes a call with a low priority, then one with a high priority.
    let low = hold(&client, 1).priority(1).start().await.expect("on its way");
    let high = hold(&client, 9).priority(9).start().await.expect("on its way");
    // Once the broker has answered this later call, it has received both.
    let error = client.call::<()>("nobody", "home", ()).await.expect_err("nobody is there");
    assert!(matches!(error, Error::NoService { .. }), "{error}");
    busy.release();
    for expected in [9, 1] {
        let next = soon(arrived.recv()).await.expect("it came");
        assert_eq!(next.number, expected);
        next.release();
    }
    for (pending, expected) in [(first, 0), (low, 1), (high, 9)] {
        assert_eq!(pending.await.expect("answered"), expected);
    }
}

#[tokio::test]
async fn a_call_that_was_polled_goes_on_when_it_is_started_and_cannot_be_made_to_all() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let client = scene.client().await;
    let mut call = hold(&client, 1);
    let arrival = tokio::select! {
        _ = &mut call => panic!("it is held"),
        arrival = soon(arrived.recv()) => arrival.expect("it runs"),
    };
    let pending = call.timeout(Duration::ZERO).start().await.expect("it is on its way");
    arrival.release();
    assert_eq!(pending.await.expect("the same call"), 1);
    arrived.try_recv().expect_err("it ran once");
    let mut call = hold(&client, 2);
    tokio::select! {
        _ = &mut call => panic!("it is held"),
        _ = soon(arrived.recv()) => {}
    }
    let all = call.all().gather(Duration::from_secs(1)).await;
    assert!(matches!(&all, Err(Error::Invalid(why)) if why.contains("on its way already")), "{all:?}");
}

#[tokio::test]
async fn a_method_gets_optional_arguments_more_and_its_old_callers_go_on() {
    let scene = Scene::new();
    let _server = scene.serve(MathServer::new(Calculator)).await;
    let client = scene.client().await;
    let words = || vec!["a".to_owned(), "b".to_owned()];
    for codec in [Codec::Cbor, Codec::Json, Codec::MessagePack] {
        let old = client.call::<String>("math", "join", (words(),)).codec(codec);
        assert_eq!(old.await.expect("the separator is absent"), "a, b", "{codec:?}");
        let new = MathClient::new(&client).join(words(), Some("-".to_owned())).codec(codec);
        assert_eq!(new.await.expect("it is there"), "a-b", "{codec:?}");
        for (sent, got) in [(serde_json::json!([]), 0), (serde_json::json!([["a"], "-", 1]), 3)] {
            match client.call::<String>("math", "join", sent).codec(codec).await {
                Err(Error::Fault(fault)) => assert_eq!(
                    fault.message,
                    format!(
                        "`join(words: Vec<String>, separator: Option<String>) -> String` takes 2 arguments, got {got}"
                    )
                ),
                other => panic!("{codec:?}: {other:?}"),
            }
        }
        client.call::<()>("math", "nothing", ()).codec(codec).await.expect("nothing is no arguments");
    }
}

mod versions {
    #[hopline::service(name = "greeter", version = 1)]
    pub(crate) trait Old {
        async fn greet(&self, name: String) -> String;
    }

    #[hopline::service(name = "greeter", version = 2)]
    pub(crate) trait New {
        async fn greet(&self, name: String, polite: bool) -> String;
    }

    pub(crate) struct Greeter;

    impl Old for Greeter {
        async fn greet(&self, name: String) -> String {
            format!("hi {name}")
        }
    }

    impl New for Greeter {
        async fn greet(&self, name: String, polite: bool) -> String {
            if polite { format!("good day, {name}") } else { format!("hi {name}") }
        }
    }
}

#[tokio::test]
async fn services_and_versions_stand_side_by_side_on_one_server() {
    use versions::{Greeter, NewClient, NewServer, OldClient, OldServer};
    let scene = Scene::new();
    let server = scene
        .server()
        .await
        .serve(OldServer::new(Greeter))
        .serve(NewServer::new(Greeter))
        .serve(MathServer::new(Calculator));
    let one = |_: Context, (): ()| async { Ok::<_, Fault>(1) };
    let two = |_: Context, (): ()| async { Ok::<_, Fault>(2) };
    let server = server.serve(Service::new("extra", 1).method("one", one).method("two", two));
    let _running = server.start().await.expect("all can be served");
    let client = scene.client().await;
    assert_eq!(OldClient::new(&client).greet("Ann".into()).await.expect("version 1"), "hi Ann");
    assert_eq!(NewClient::new(&client).greet("Ann".into(), true).await.expect("version 2"), "good day, Ann");
    assert_eq!(MathClient::new(&client).add(1, 1).await.expect("another service"), 2);
    assert_eq!(client.call::<u8>("extra.v1", "one", [(); 0]).await.expect("a method"), 1);
    assert_eq!(client.call::<u8>("extra", "two", [(); 0]).await.expect("and another"), 2);
}

#[tokio::test]
async fn namespaces_do_not_see_each_other() {
    let (here, there) = (Scene::new(), Scene::new());
    let _server = here.serve(MathServer::new(Calculator)).await;
    let client = there.client().await;
    let error = MathClient::new(&client).add(1, 2).await.expect_err("served elsewhere");
    assert!(matches!(error, Error::NoService { .. }), "{error}");
}

#[tokio::test]
async fn a_nested_call_inherits_the_deadline_and_the_trace() {
    let scene = Scene::new();
    let inner = Service::new("inner", 1).method(Method::new("look"), |ctx: Context, _: [(); 0]| async move {
        Ok::<_, Fault>((ctx.remaining().map(|left| left.as_secs()), ctx.traceparent()))
    });
    let nested = scene.client().await;
    let outer =
        Service::new("outer", 1).method(Method::new("ask"), move |ctx: Context, _: [(); 0]| {
            let call =
                nested.call::<(Option<u64>, String)>("inner", "look", [(); 0]).timeout(Duration::from_secs(1000));
            async move {
                call.await.map(|(left, trace)| (left, trace, ctx.traceparent())).map_err(|error| error.to_string())
            }
        });
    let _server = scene.server().await.serve(inner).serve(outer).start().await.expect("both can be served");
    let client = scene.client().await;
    let call = client.call::<(Option<u64>, String, String)>("outer", "ask", [(); 0]).timeout(Duration::from_secs(100));
    let (left, inner_trace, outer_trace) = call.await.expect("answers");
    assert!((50..=100).contains(&left.expect("a deadline")), "{left:?}");
    let parts = |trace: &str| trace.split('-').map(str::to_owned).collect::<Vec<_>>();
    let (inner_trace, outer_trace) = (parts(&inner_trace), parts(&outer_trace));
    assert_eq!(inner_trace[1], outer_trace[1], "one trace");
    assert_ne!(inner_trace[2], outer_trace[2], "two spans");
}

#[tokio::test]
async fn a_callback_in_a_handler_inherits_the_deadline_too() {
    let scene = Scene::new();
    let inner = Service::new("inner", 1).method(Method::new("left"), |ctx: Context, _: [(); 0]| async move {
        Ok::<_, Fault>(ctx.remaining().map(|left| left.as_secs()))
    });
    let (nested, (heard, mut outcomes)) = (scene.client().await, tokio::sync::mpsc::unbounded_channel());
    let outer = Service::new("outer", 1).method(Method::new("ask"), move |_: Context, _: [(); 0]| {
        let (nested, heard) = (nested.clone(), heard.clone());
        async move {
            let call = nested.call::<Option<u64>>("inner", "left", [(); 0]).timeout(Duration::from_secs(1000));
            call.then(move |outcome| heard.send(outcome).expect("the test listens"));
            Ok::<_, Fault>(())
        }
    });
    let _server = scene.server().await.serve(inner).serve(outer).start().await.expect("both can be served");
    let client = scene.client().await;
    client.call::<()>("outer", "ask", [(); 0]).timeout(Duration::from_secs(100)).await.expect("answers");
    let left = soon(outcomes.recv()).await.expect("called back").expect("answers").expect("a deadline");
    assert!(left <= 100, "{left}");
}

#[test]
fn a_program_that_is_not_async_can_call_and_serve() {
    use hopline::blocking::wait;
    let scene = Scene::new();
    let server = wait(scene.serve(MathServer::new(Calculator)));
    let client = wait(scene.client());
    let math = MathClient::new(&client);
    assert_eq!(wait(math.add(2, 3)).expect("answers"), 5);
    let (hear, heard) = std::sync::mpsc::channel();
    math.add(2, 4).then(move |outcome| hear.send(outcome).expect("the test listens"));
    assert_eq!(heard.recv_timeout(Duration::from_secs(60)).expect("called back").expect("answers"), 6);
    let pending = wait(math.add(3, 4).start()).expect("on its way");
    assert_eq!(wait(pending).expect("answers"), 7);
    wait(server.drain());
}

#[tokio::test]
async fn a_fallback_answers_the_calls_of_all_other_methods() {
    let scene = Scene::new();
    let named = |ctx: Context, words: Vec<String>| async move {
        if words.is_empty() {
            Err(Fault::new(Code::NotFound, "no words"))
        } else {
            Ok((ctx.method().to_owned(), words))
        }
    };
    let service = Service::new("any", 1).fallback(named);
    let own = service.method("own", |_: Context, _: [(); 0]| async { Ok::<_, Fault>("own") });
    let server = scene.serve(own).await;
    let client = scene.client().await;
    assert_eq!(client.call::<String>("any", "own", ()).await.expect("a method of its own"), "own");
    let answer = client.call::<(String, Vec<String>)>("any", "other", ("a", "b")).await.expect("any other one");
    assert_eq!(answer, ("other".to_owned(), vec!["a".to_owned(), "b".to_owned()]));
    let error = client.call::<()>("any", "third", ()).await.expect_err("the fallback's fault");
    assert!(matches!(&error, Error::Fault(fault) if fault.code == Code::NotFound), "{error}");
    // Discovery is not a call, and no method has a name like that.
    let registry = client.registry();
    let [instance] = &registry.instances("any").await.expect("it is asked")[..] else { panic!("there is one") };
    assert_eq!(instance.methods.iter().map(|method| &*method.name).collect::<Vec<_>>(), ["own", "*"]);
    let [stats] = &registry.stats("any").await.expect("it is asked")[..] else { panic!("there is one") };
    let finished: Vec<_> = stats.methods.iter().map(|method| (&*method.name, method.finished)).collect();
    assert_eq!((stats.instance.as_str(), finished), (server.instance(), vec![("own", 1), ("*", 2)]));
    // The broker binds oneway calls by the names of their methods.
    let error = client.oneway("any", "other", ("a",)).send().await.expect_err("nobody takes it");
    assert!(matches!(error, Error::NoService { .. }), "{error}");
}
