//! Rules: what operators set while clients and servers run, and what running and new ones make of it.

use std::future::IntoFuture as _;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::join_all;
use hopline::transport::{Confirm, Mode, Properties, Publication, StreamStart};
use hopline::{
    Adaptive, Client, ClientBuilder, Code, Context, Error, Fault, Method, RateLimit, Rule, RuleInForce, Running,
    Server, Service, State,
};

use crate::support::{Arrival, Held, PATIENCE, Scene, code, has_read, hold, soon};

/// A client of the scene that heeds rules.
async fn heeding(scene: &Scene, change: impl FnOnce(ClientBuilder) -> ClientBuilder) -> Client {
    let builder = change(Client::builder().namespace(&scene.namespace).rules());
    soon(builder.connect(&scene.url)).await.expect("the broker is there")
}

fn rule(text: &str) -> Rule {
    text.parse().expect("a rule")
}

/// Waits until a client heeds these rules, each as `target rule`.
async fn heeds(client: &Client, rules: &[&str]) {
    let heeded = || client.rules().heeded().into_iter().map(|set| format!("{} {}", set.target, set.rule));
    soon(async {
        while heeded().collect::<Vec<_>>() != rules {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
}

/// A service whose method counts its runs and is never available.
async fn unavailable(scene: &Scene) -> (Running, Arc<AtomicU64>) {
    let runs = Arc::<AtomicU64>::default();
    let counted = runs.clone();
    let fail = move |_: Context, (): ()| {
        counted.fetch_add(1, Ordering::Relaxed);
        async { Err::<(), _>(Fault::new(Code::Unavailable, "not now").retry_after(Duration::from_millis(1))) }
    };
    (scene.serve(Service::new("gone", 1).method(Method::new("fail").idempotent(), fail)).await, runs)
}

#[tokio::test]
async fn a_running_client_and_a_later_one_go_by_a_rule_until_it_is_unset() {
    let scene = Scene::new();
    let (_server, runs) = unavailable(&scene).await;
    let operator = scene.client().await;
    let running = heeding(&scene, |builder| builder).await;
    let call = async |client: &Client| {
        let before = runs.load(Ordering::Relaxed);
        let error = soon(client.call::<()>("gone", "fail", ()).idempotent().into_future()).await.expect_err("it fails");
        assert_eq!(error.code(), Code::Unavailable, "{error}");
        runs.load(Ordering::Relaxed) - before
    };
    assert_eq!(call(&running).await, 1);
    let set = operator.rules().set("gone.fail", &rule("retry=2")).await.expect("it may");
    assert_eq!((set.target.as_str(), set.client.as_str()), ("gone.v1.fail", operator.instance()));
    heeds(&running, &["gone.v1.fail retry=2"]).await;
    assert_eq!(call(&running).await, 3);
    let later = heeding(&scene, |builder| builder.retry(1)).await;
    assert_eq!(call(&later).await, 3);
    assert_eq!(call(&operator).await, 1, "it was not told to heed rules");
    operator.rules().unset("gone.fail", &[]).await.expect("it may");
    heeds(&running, &[]).await;
    heeds(&later, &[]).await;
    assert_eq!((call(&running).await, call(&later).await), (1, 2));
    let history = operator.rules().history().await.expect("it may read");
    let told: Vec<_> = history.iter().map(|change| change.rule.to_string()).collect();
    assert_eq!(told, ["retry=2", ""]);
    assert!(operator.rules().get().await.expect("it may read").is_empty());
}

#[tokio::test]
async fn the_time_out_of_a_rule_replaces_the_clients_and_shortens_that_of_a_call() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service).await;
    let operator = scene.client().await;
    let client = heeding(&scene, |builder| builder.timeout(PATIENCE)).await;
    operator.rules().set("held", &rule("timeout=50ms")).await.expect("it may");
    heeds(&client, &["held.v1 timeout=50ms"]).await;
    let after = |error: Error| match error {
        Error::Timeout { after, .. } => after,
        other => panic!("{other:?}"),
    };
    let took =
        |call: hopline::Call<u64>| async move { after(soon(call.into_future()).await.expect_err("nobody answers")) };
    assert_eq!(took(hold(&client, 1)).await, Duration::from_millis(50));
    assert_eq!(took(hold(&client, 2).timeout(PATIENCE)).await, Duration::from_millis(50));
    assert_eq!(took(hold(&client, 3).timeout(Duration::from_millis(20))).await, Duration::from_millis(20));
    // The rule of a method is before that of its service.
    operator.rules().set("held.hold", &rule("timeout=1m")).await.expect("it may");
    heeds(&client, &["held.v1 timeout=50ms", "held.v1.hold timeout=60s"]).await;
    let answered = hold(&client, 4).start().await.expect("on its way");
    soon(async {
        loop {
            let arrival = arrived.recv().await.expect("it came");
            if arrival.number == 4 {
                break arrival.release();
            }
        }
    })
    .await;
    assert_eq!(soon(answered).await.expect("there was time"), 4);
}

#[tokio::test]
async fn a_rule_holds_calls_back_and_says_so() {
    let scene = Scene::new();
    let (_server, runs) = unavailable(&scene).await;
    let client = heeding(&scene, |builder| builder).await;
    client.rules().set("gone", &rule("breaker=open timeout=3s")).await.expect("it may");
    heeds(&client, &["gone.v1 timeout=3s breaker=open"]).await;
    match soon(client.call::<()>("gone", "fail", ()).retry(3).into_future()).await {
        Err(error @ Error::CircuitOpen { .. }) => {
            // The broker in memory has no users.
            let user = client.rules().heeded()[0].user.clone();
            let by = user.unwrap_or_else(|| client.instance().to_owned());
            let said = format!(
                "`gone.v1.fail` has not run: its breaker is open by the rule of `gone.v1` that `{by}` has set: `hopline rules \
                 unset gone.v1 breaker` closes it"
            );
            assert_eq!(error.to_string(), said);
        }
        other => panic!("{other:?}"),
    }
    assert_eq!((runs.load(Ordering::Relaxed), client.policies().refused_by_breaker), (0, 1));
    // One setting is taken away, and the other stays. Settings are added to those that are there.
    client.rules().unset("gone", &["breaker"]).await.expect("it may");
    client.rules().set("gone", &rule("retry=0")).await.expect("it may");
    heeds(&client, &["gone.v1 timeout=3s retry=0"]).await;
    soon(client.call::<()>("gone", "fail", ()).retry(3).into_future()).await.expect_err("it fails");
    assert_eq!(runs.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn the_rate_of_a_rule_paces_calls_until_it_is_unset() {
    let scene = Scene::new();
    let (_server, _) = unavailable(&scene).await;
    let client = heeding(&scene, |builder| builder).await;
    let call = async || soon(client.call::<()>("gone", "fail", ()).into_future()).await.expect_err("it fails");
    client.rules().set("gone.fail", &rule("rate=1/s")).await.expect("it may");
    heeds(&client, &["gone.v1.fail rate=1/s"]).await;
    // The first leaves at once. A second one would wait for longer than half a second if the first has just left.
    let errors = [call().await, call().await, call().await];
    assert!(errors.iter().any(|error| matches!(error, Error::Overloaded { .. })), "{errors:?}");
    client.rules().unset("gone.fail", &[]).await.expect("it may");
    heeds(&client, &[]).await;
    let before = client.policies().refused_by_rate;
    for _ in 0..20 {
        assert_eq!(call().await.code(), Code::Unavailable);
    }
    assert_eq!(client.policies().refused_by_rate, before);
}

#[tokio::test]
async fn what_cannot_be_a_rule_is_refused() {
    let scene = Scene::new();
    let client = scene.client().await;
    for (target, rule) in
        [("a b", "retry=1"), ("demo.v1.add.more", "retry=1"), ("demo", ""), ("demo.add", "server_concurrency=2")]
    {
        let refused = client.rules().set(target, &rule.parse().expect("a rule")).await;
        assert!(matches!(refused, Err(Error::Invalid(_))), "{refused:?}");
    }
    let refused = client.rules().unset("demo", &["speed"]).await;
    assert!(matches!(&refused, Err(Error::Invalid(why)) if why.contains("`speed`")), "{refused:?}");
    assert!(client.rules().history().await.expect("it may read").is_empty());
    assert!(client.rules().heeded().is_empty());
}

#[tokio::test]
async fn a_message_that_is_no_rule_is_left_out() {
    let scene = Scene::new();
    let client = heeding(&scene, |builder| builder).await;
    client.rules().set("demo", &rule("retry=1")).await.expect("it may");
    let transport = scene.transport().await;
    for body in [
        "",
        "{",
        r#"{"type":"hopline.v2.rule","target":"demo"}"#,
        r#"{"type":"hopline.v1.rule","target":"demo","breaker":"x"}"#,
    ] {
        let stray = Publication {
            exchange: format!("{}.rules", scene.namespace),
            key: "demo.v1".to_owned(),
            mandatory: true,
            properties: Properties::default(),
            body: body.into(),
        };
        assert_eq!(soon(transport.publish(stray)).await, Ok(Confirm::Accepted));
    }
    client.rules().set("demo", &rule("timeout=1s")).await.expect("it may");
    for client in [&client, &heeding(&scene, |builder| builder).await] {
        heeds(client, &["demo.v1 timeout=1s retry=1"]).await;
    }
}

#[tokio::test]
async fn who_stops_reading_the_stream_of_rules_keeps_the_connection() {
    let scene = Scene::new();
    let client = scene.client().await;
    for retries in 0..40 {
        client.rules().set("demo", &rule(&format!("retry={retries}"))).await.expect("it may");
    }
    let (transport, queue) = (scene.transport().await, format!("{}.rules", scene.namespace));
    for _ in 0..20 {
        let mode = Mode::Stream { from: StreamStart::First, prefetch: 500 };
        let mut consumer = transport.consume(&queue, mode).await.expect("it is there");
        soon(consumer.next()).await.expect("the first rule");
        // Others are on their way.
        drop(consumer);
    }
    soon(transport.look_at(&queue)).await.expect("it is connected").expect("the queue is there");
}

/// A server of the scene that heeds rules.
async fn heeding_server(scene: &Scene, service: Service) -> Running {
    let server = Server::builder().namespace(&scene.namespace).rules().connect(&scene.url).await;
    soon(server.expect("the broker is there").serve(service).start()).await.expect("it can be served")
}

/// What the only instance of a service says of the rules that it goes by.
async fn told(client: &Client, service: &str) -> Option<Vec<RuleInForce>> {
    let mut instances = soon(client.registry().count(1).instances(service)).await.expect("it is asked");
    instances.pop().expect("it serves").rules
}

/// Waits until the only instance of a service goes by these rules, each as `target settings`.
async fn in_force(client: &Client, service: &str, rules: &[&str]) {
    let text = |rule: RuleInForce| format!("{} {}", rule.target, rule.settings);
    soon(async {
        while told(client, service).await.expect("it heeds rules").into_iter().map(text).collect::<Vec<_>>() != rules {}
    })
    .await;
}

fn echo() -> Service {
    let echo = |_: Context, (number,): (u64,)| async move { Ok::<_, Fault>(number) };
    Service::new("echo", 1).method("say", echo).method("repeat", echo)
}

/// How many of twenty calls at once are refused, each with the time after which there is room.
async fn refused(client: &Client, method: &str) -> usize {
    let calls = (0..20).map(|number| client.call::<u64>("echo", method, (number,)).into_future());
    let errors = soon(join_all(calls)).await.into_iter().filter_map(Result::err);
    let of_rate = |error: Error| {
        assert!(error.code() == Code::ResourceExhausted && error.retry_after().is_some(), "{error:?}");
        assert!(!error.may_have_run(), "{error:?}");
    };
    errors.map(of_rate).count()
}

#[tokio::test]
async fn the_rate_of_a_rule_is_that_of_a_running_server_until_it_is_unset() {
    let scene = Scene::new();
    let client = scene.client().await;
    let _server = heeding_server(&scene, echo()).await;
    assert_eq!((told(&client, "echo").await, refused(&client, "say").await), (Some(Vec::new()), 0));
    // What is for clients is nothing to a server.
    client.rules().set("echo", &rule("timeout=1m breaker=auto")).await.expect("it may");
    client.rules().set("echo.say", &rule("server_rate=1/s rate=5/s")).await.expect("it may");
    client.rules().set("other", &rule("server_rate=1/s")).await.expect("it may");
    in_force(&client, "echo", &["echo.v1.say server_rate=1/s"]).await;
    assert!(refused(&client, "say").await > 0);
    assert_eq!(refused(&client, "repeat").await, 0, "it has no rate");
    // That of a service is for each of its methods, and a method's own is before it.
    client.rules().set("echo", &rule("server_rate=1/s")).await.expect("it may");
    client.rules().set("echo.say", &rule("server_rate=100000/s")).await.expect("it may");
    in_force(&client, "echo", &["echo.v1 server_rate=1/s", "echo.v1.say server_rate=100000/s"]).await;
    assert_eq!(refused(&client, "say").await, 0);
    assert!(refused(&client, "repeat").await > 0);
    client.rules().unset("echo", &["server_rate"]).await.expect("it may");
    client.rules().unset("echo.say", &[]).await.expect("it may");
    in_force(&client, "echo", &[]).await;
    assert_eq!((refused(&client, "say").await, refused(&client, "repeat").await), (0, 0));
}

#[tokio::test]
async fn a_server_has_its_rules_before_its_first_call_in_place_of_what_its_code_says() {
    let scene = Scene::new();
    let client = scene.client().await;
    let set = client.rules().set("echo", &rule("server_rate=1/s")).await.expect("it may");
    let server = heeding_server(&scene, echo().with(RateLimit::per_user(100_000.0))).await;
    assert!(refused(&client, "say").await > 0);
    let told_rule = told(&client, "echo").await.expect("it heeds rules").pop().expect("a rule");
    let set = (set.target, set.user, set.client);
    assert_eq!((told_rule.target, told_rule.user, told_rule.client), set);
    assert!(told_rule.at_ms > 0);
    soon(server.drain()).await;
    client.rules().set("echo", &rule("server_rate=100000/s")).await.expect("it may");
    let lazy = Server::builder().namespace(&scene.namespace).rules().connect_lazy(&scene.url).expect("a good address");
    let lazy = lazy.serve(echo().with(RateLimit::per_user(1.0))).start().await.expect("it begins");
    soon(lazy.state().wait_for(|state| *state == State::Ready)).await.expect("it runs");
    assert_eq!(told(&client, "echo").await.expect("it heeds rules").len(), 1);
    assert_eq!(refused(&client, "say").await, 0);
    soon(lazy.drain()).await;
    // One that was not told to heed rules goes by its code.
    let _plain = scene.serve(echo().with(RateLimit::per_user(1.0))).await;
    assert_eq!(told(&client, "echo").await, None);
    assert!(refused(&client, "say").await > 0);
}

#[tokio::test]
async fn a_rule_says_how_many_calls_of_a_running_service_run_at_once() {
    for service in [|service: Service| service, |service: Service| service.with(Adaptive::between(1, 1))] {
        let scene = Scene::new();
        let client = scene.client().await;
        let Held { service: held, mut arrived } = Held::new();
        let server = heeding_server(&scene, service(held.concurrency(1).prefetch(64))).await;
        let begin = async |numbers: Range<u64>| {
            let mut pending = Vec::new();
            for number in numbers {
                let call = hold(&client, number).timeout(PATIENCE).to(server.instance());
                pending.push(call.start().await.expect("on its way"));
            }
            pending
        };
        client.rules().set("held", &rule("server_concurrency=3")).await.expect("it may");
        in_force(&client, "held", &["held.v1 server_concurrency=3"]).await;
        let pending = begin(1..6).await;
        let mut running = Vec::new();
        for _ in 0..3 {
            running.push(soon(arrived.recv()).await.expect("it runs"));
        }
        has_read(&client, "held", server.instance()).await;
        assert!(arrived.is_empty(), "three run at once");
        // As the limit falls, those that run are left alone, and others begin when there is room again.
        client.rules().set("held", &rule("server_concurrency=1")).await.expect("it may");
        in_force(&client, "held", &["held.v1 server_concurrency=1"]).await;
        let last = running.pop().expect("three");
        running.into_iter().for_each(Arrival::release);
        has_read(&client, "held", server.instance()).await;
        assert!(arrived.is_empty(), "one still runs");
        last.release();
        for _ in 0..2 {
            let next = soon(arrived.recv()).await.expect("it runs");
            has_read(&client, "held", server.instance()).await;
            assert!(arrived.is_empty(), "one at a time");
            next.release();
        }
        assert!(soon(join_all(pending)).await.iter().all(Result::is_ok));
        // Without the rule as many run as the code says.
        client.rules().unset("held", &[]).await.expect("it may");
        in_force(&client, "held", &[]).await;
        let pending = begin(6..8).await;
        for _ in 0..2 {
            let next = soon(arrived.recv()).await.expect("it runs");
            has_read(&client, "held", server.instance()).await;
            assert!(arrived.is_empty(), "one at a time");
            next.release();
        }
        assert!(soon(join_all(pending)).await.iter().all(Result::is_ok));
    }
}

#[tokio::test]
async fn a_method_with_places_of_its_own_has_no_more_of_them_than_a_rule_says() {
    let scene = Scene::new();
    let client = scene.client().await;
    let Held { service: held, mut arrived } = Held::new();
    let server = heeding_server(&scene, held.configure("hold", |method| method.concurrency(2))).await;
    let begin = async |number: u64| hold(&client, number).to(server.instance()).start().await.expect("on its way");
    client.rules().set("held", &rule("server_concurrency=1")).await.expect("it may");
    in_force(&client, "held", &["held.v1 server_concurrency=1"]).await;
    let first = begin(1).await;
    let running = soon(arrived.recv()).await.expect("it runs");
    assert_eq!(code(soon(begin(2).await).await), Code::ResourceExhausted);
    // A rule never gives it more than the code says.
    client.rules().set("held", &rule("server_concurrency=9")).await.expect("it may");
    in_force(&client, "held", &["held.v1 server_concurrency=9"]).await;
    let second = begin(3).await;
    let beside = soon(arrived.recv()).await.expect("it runs");
    assert_eq!(code(soon(begin(4).await).await), Code::ResourceExhausted);
    [running, beside].into_iter().for_each(Arrival::release);
    assert_eq!((soon(first).await.expect("answered"), soon(second).await.expect("answered")), (1, 3));
}
