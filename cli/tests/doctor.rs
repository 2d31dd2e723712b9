//! `hopline doctor` finds what is wrong with a broker, names it, and says what to do. Each fault has a namespace of its
//! own, where only that is wrong.
//!
//! This needs RabbitMQ nodes of the version that `HOPLINE_TEST_NODE` names, and is ignored unless it is asked for.

use std::net::TcpListener;
use std::process::Output;
use std::time::Duration;

use hopline::topology::{Binding, Declaration, Exchange, ExchangeKind, Queue, QueueKind};
use hopline::transport::{Mode, Properties, Publication, Role, Settle, Transport};
use hopline::{Client, Code, Context, Fault, Method, Running, Server, Service};
use serde_json::{Value, json};

mod command;
#[path = "../../tests/node/mod.rs"]
mod node;

use command::{Going, PATIENCE, cleaned, hopline};
use node::{Alarm, Node, version};

/// A node with the management API.
struct Hospital {
    node: Node,
    management: String,
}

impl Hospital {
    /// Starts one with these settings.
    async fn with(conf: &str) -> Self {
        // Another program may take the port before the node does. Then the node does not start, and says why.
        let port = TcpListener::bind("127.0.0.1:0").and_then(|free| free.local_addr()).expect("a port is free").port();
        let conf = format!("management.tcp.ip = 127.0.0.1\nmanagement.tcp.port = {port}\n{conf}\n");
        let node = Node::with(&version(), &conf, &[], &["rabbitmq_management"]).await;
        Self { node, management: format!("http://127.0.0.1:{port}") }
    }

    fn as_user(&self, user: &str) -> String {
        format!("amqp://{user}:{user}@{}", self.node.authority())
    }

    async fn transport(&self) -> Transport {
        Transport::connect(self.node.url(), Role::Operator).await.expect("the node is there")
    }

    async fn declare(&self, part: Declaration) {
        self.transport().await.declare(&[part]).await.expect("nothing is in the way");
    }

    async fn client(&self, namespace: &str) -> Client {
        Client::builder().namespace(namespace).connect(self.node.url()).await.expect("the node is there")
    }

    /// A service with a method, and one that takes oneway calls and refuses all.
    async fn serve(&self, namespace: &str) -> Running {
        let demo = Service::new("demo", 1)
            .method("add", |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) })
            .method(Method::new("note").oneway(), |_: Context, (_,): (String,)| async {
                Err::<(), _>(Fault::new(Code::InvalidArgument, "as the test asks"))
            });
        let server = Server::builder().namespace(namespace).connect(self.node.url()).await.expect("the node is there");
        server.serve(demo).start().await.expect("it can be served")
    }

    async fn policy(&self, name: &str, pattern: &str, definition: &str, kind: &str) {
        self.node.ctl(&["set_policy", name, pattern, definition, "--apply-to", kind]).await;
    }

    /// Runs the doctor. It needs its own thread: what is served runs here.
    async fn doctor(&self, url: &str, namespace: &str, more: &[&str]) -> Output {
        let mut command = tokio::process::Command::from(cleaned());
        command.args(["doctor", "--url", url, "--namespace", namespace]).args(more).kill_on_drop(true);
        let ended = tokio::time::timeout(PATIENCE, command.output()).await;
        ended.expect("it ends within a minute").expect("it can be run")
    }

    /// What the doctor finds, by AMQP and the management API.
    async fn finds(&self, namespace: &str) -> Vec<Value> {
        let more = ["--json", "--management", &self.management];
        found(&self.doctor(self.node.url(), namespace, &more).await)
    }

    /// Looks until there is a problem, and checks that it is the only one, that it is about this, and that it says these
    /// words and advises those. A broker takes a while to apply a policy.
    async fn has(&self, namespace: &str, about: &str, words: &str, advice: &str) {
        let looking = async {
            loop {
                let all = problems(self.finds(namespace).await);
                if !all.is_empty() {
                    break all;
                }
            }
        };
        let all = tokio::time::timeout(PATIENCE, looking).await.unwrap_or_else(|_| panic!("no problem in {namespace}"));
        assert_eq!(all.len(), 1, "{all:#?}");
        named(&all[0], about, words, advice);
    }
}

/// The findings that were printed, which agree with the exit status.
#[track_caller]
fn found(output: &Output) -> Vec<Value> {
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("no list: {output:?}"));
    let code = i32::from(!problems(findings.clone()).is_empty());
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    findings
}

fn problems(findings: Vec<Value>) -> Vec<Value> {
    findings.into_iter().filter(|finding| finding["verdict"] == "problem").collect()
}

/// Why something was not looked at.
#[track_caller]
fn unseen<'a>(findings: &'a [Value], about: &str) -> &'a str {
    let unseen = findings.iter().find(|it| it["verdict"] == "not looked at" && it["about"] == about);
    unseen
        .and_then(|finding| finding["found"].as_str())
        .unwrap_or_else(|| panic!("{about} is looked at: {findings:#?}"))
}

#[track_caller]
fn named(problem: &Value, about: &str, words: &str, advice: &str) {
    for (member, word) in [("about", about), ("found", words), ("advice", advice)] {
        assert!(problem[member].as_str().is_some_and(|said| said.contains(word)), "no {word:?}: {problem:#}");
    }
}

/// A frame with the reply to the request that `body` begins with, by hand: a JSON document of the instance `late`.
fn reply(body: &[u8], document: &Value) -> Vec<u8> {
    let (metadata, payload) = (b"\xa1\x05\x64late", document.to_string());
    let mut frame = b"HL\x01\x02\x02\0\0\0".to_vec();
    frame.extend_from_slice(&body[8..24]);
    frame.extend_from_slice(&(metadata.len() as u32).to_be_bytes());
    frame.extend_from_slice(&(payload.len() as u32).to_be_bytes());
    frame.extend_from_slice(metadata);
    frame.extend_from_slice(payload.as_bytes());
    frame
}

#[test]
fn wrong_usage_ends_with_2_and_says_what_to_write() {
    for (arguments, told) in [
        (&["--url", "memory://"][..], "give the address of a RabbitMQ with `--url`"),
        (&["a b"], "the service `a b` has a ' ' in it"),
        (&["--management", "broker:15672"], "write http://HOST:15672"),
        (&["--timeout", "5"], "write a whole number above 0 and a unit"),
    ] {
        let output = hopline(&["doctor"]).args(arguments).output().expect("it can be run");
        assert_eq!(output.status.code(), Some(2), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(told), "{arguments:?}: {output:?}");
    }
    let nobody = hopline(&["doctor", "--json", "--url", "amqp://127.0.0.1:1"]).output().expect("it can be run");
    let findings = found(&nobody);
    named(&findings[0], "connection", "127.0.0.1:1", "There is no connection");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_broker_without_faults_has_no_problems_and_keeps_nothing_of_the_look() {
    let hospital = Hospital::with("").await;
    let url = hospital.node.url();
    let everything = async || (hospital.node.queues().await, hospital.node.ctl(&["list_exchanges"]).await);
    let before = everything().await;
    let output = hospital.doctor(url, "hopline", &["demo"]).await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert_eq!(everything().await, before, "the look at an empty broker leaves something");
    let _server = hospital.serve("hopline").await;
    let transport = hospital.transport().await;
    let queue = Queue::new("overheard", QueueKind::Exclusive);
    let (exchange, key) = ("hopline.events".into(), "#".into());
    let bound = Binding { exchange, key, queue: queue.name.clone() };
    let parts = [Declaration::Queue(queue), Declaration::Binding(bound)];
    transport.declare(&parts).await.expect("nothing is in the way");
    let mut heard = transport.consume("overheard", Mode::NoAck).await.expect("it is there");
    let before = everything().await.1;
    let output = hospital.doctor(url, "hopline", &["demo", "--management", &hospital.management]).await;
    assert_eq!(output.status.code(), Some(0), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    let told = String::from_utf8(output.stdout).expect("it prints text");
    for line in ["ok: alarm: none", "ok: policies: none", "ok: nodes: 1 of 1 run", "ok: instances: 1 reply, and 1 of"] {
        assert!(told.lines().any(|it| it.starts_with(line)), "no `{line}` in {told}");
    }
    assert_eq!(everything().await.1, before, "the look leaves an exchange");
    // What comes after it has come after all that the doctor may have published.
    hospital.client("hopline").await.publish("after.it", &()).await.expect("the broker has it");
    let heard = tokio::time::timeout(PATIENCE, heard.next()).await.expect("it comes within a minute");
    assert_eq!(heard.expect("it is consumed").key, "after.it", "an event of the doctor's");
    // What AMQP does not tell is named, with how to see it.
    let findings = found(&hospital.doctor(url, "hopline", &["--json"]).await);
    for about in ["policies", "plugins", "nodes"] {
        assert_eq!(unseen(&findings, about), "needs the management API: `--management URL`");
    }
    assert!(unseen(&findings, "permissions of a server").contains("hopline doctor SERVICE"));
    if version() == "3.10" {
        assert!(unseen(&findings, "consumer_timeout").contains("has to be more than your longest handler takes"));
    }
    // A user who may not use the management API, or nothing that answers there, is no problem of the broker.
    hospital.node.ctl(&["add_user", "plain", "plain"]).await;
    hospital.node.ctl(&["set_permissions", "plain", ".*", ".*", ".*"]).await;
    let (plain, management) = (hospital.as_user("plain"), hospital.management.clone());
    let findings = found(&hospital.doctor(&plain, "hopline", &["--json", "--management", &management]).await);
    assert!(unseen(&findings, "policies on queues").contains("rabbitmqctl set_user_tags plain monitoring"));
    let findings = found(&hospital.doctor(url, "hopline", &["--json", "--management", "http://127.0.0.1:1"]).await);
    assert!(unseen(&findings, "nodes").contains("is the plugin `rabbitmq_management` enabled"));
    // One that is given in its address.
    let management = management.replace("http://", "http://guest:guest@");
    let findings = found(&hospital.doctor(&plain, "hopline", &["--json", "--management", &management]).await);
    assert!(findings.iter().any(|finding| finding["about"] == "policies" && finding["verdict"] == "ok"));
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn each_fault_is_found_and_comes_with_what_to_do() {
    let hospital = Hospital::with("").await;
    let url = hospital.node.url();

    // Policies. Each service runs, so its queues are there.
    let mut servers = Vec::new();
    for (namespace, queue, definition, words) in [
        ("ttl", "work", r#"{"message-ttl":5000}"#, "oneway calls that wait longer become dead letters, unrun"),
        ("length", "dead", r#"{"max-length":10}"#, "the oldest dead letters are lost"),
        ("full", "calls", r#"{"max-length":10}"#, "calls that have waited longest are dropped"),
        ("drop", "work", r#"{"overflow":"drop-head"}"#, "is lost when the next queue is not there"),
        ("expiry", "work", r#"{"expires":600000}"#, "all oneway calls that wait are lost"),
    ] {
        servers.push(hospital.serve(namespace).await);
        let pattern = format!("^{namespace}\\.demo\\.v1\\.{queue}$");
        hospital.policy(&format!("of-{namespace}"), &pattern, definition, "queues").await;
        hospital.has(namespace, &format!("policy `of-{namespace}`"), words, "give it a pattern that leaves out").await;
    }
    servers.push(hospital.serve("operated").await);
    let pattern = r"^operated\.demo\.v1\.calls$";
    let definition = r#"{"message-ttl":5000}"#;
    hospital.node.ctl(&["set_operator_policy", "mine", pattern, definition, "--apply-to", "queues"]).await;
    hospital.has("operated", "operator policy `mine`", "calls that wait longer vanish", "list_operator_policies").await;

    // A limit that refuses is no fault.
    servers.push(hospital.serve("safe").await);
    let definition = r#"{"max-length":10,"overflow":"reject-publish"}"#;
    hospital.policy("safe", r"^safe\.demo\.v1\.calls$", definition, "queues").await;
    assert_eq!(problems(hospital.finds("safe").await), [] as [Value; 0]);

    // An alternate exchange that leads somewhere: by AMQP alone, and by name.
    servers.push(hospital.serve("hidden").await);
    let elsewhere = Queue::new("elsewhere", QueueKind::Classic);
    let bound = Binding { exchange: "amq.fanout".into(), key: "".into(), queue: "elsewhere".into() };
    hospital.declare(Declaration::Queue(elsewhere)).await;
    hospital.declare(Declaration::Binding(bound)).await;
    hospital.policy("of-hidden", r"^hidden\.rpc$", r#"{"alternate-exchange":"amq.fanout"}"#, "exchanges").await;
    let all = problems(found(&hospital.doctor(url, "hidden", &["--json"]).await));
    assert_eq!(all.len(), 1, "{all:#?}");
    named(
        &all[0],
        "alternate exchange of `hidden.rpc`",
        "`Timeout` instead of `NoService`",
        "rabbitmqctl list_policies",
    );
    let all = problems(hospital.finds("hidden").await);
    assert_eq!(all.len(), 2, "{all:#?}");
    named(&all[1], "policy `of-hidden`", "alternate-exchange = \"amq.fanout\" on `hidden.rpc`", "give it a pattern");

    // An exchange and a queue that differ.
    let exchange = Exchange { name: "kind.rpc".into(), kind: ExchangeKind::Fanout };
    hospital.declare(Declaration::Exchange(exchange)).await;
    hospital.has("kind", "exchange `kind.rpc`", "`type` is fanout, not direct", "delete it").await;
    hospital.declare(Declaration::Queue(Queue::new("args.demo.v1.work", QueueKind::Classic))).await;
    hospital
        .has("args", "queue `args.demo.v1.work`", "`x-queue-type` is classic, not quorum", "Queues with other")
        .await;

    // Calls that wait for nobody, and dead letters.
    hospital.serve("alone").await.drain().await;
    hospital.client("alone").await.oneway("demo", "note", ("x",)).send().await.expect("the broker has it");
    let words = "1 calls wait in it, and nobody consumes it";
    hospital.has("alone", "queue `alone.demo.v1.work`", words, "start a server of `demo.v1`").await;
    servers.push(hospital.serve("buried").await);
    buried(&hospital, "buried").await;
    hospital.has("buried", "queue `buried.demo.v1.dead`", "1 dead letters wait", "`hopline dead ls demo.v1`").await;

    // A clock that is an hour behind.
    let behind = clock(&hospital, "late").await;
    let all = problems(found(&hospital.doctor(url, "late", &["--json"]).await));
    assert_eq!(all.len(), 1, "{all:#?}");
    named(&all[0], "clock of instance `late` of `demo.v1`", "behind the one here", "NTP");
    behind.abort();

    // Permissions.
    servers.push(hospital.serve("users").await);
    let (reply, exchanges) = (r"^users\.reply@", r"^users\.(rpc|oneway|events|discovery|reply@.*)$");
    let both = r"^users\.(discovery|reply@.*)$";
    for (user, permissions, words) in [
        ("none", ["^$", exchanges, both], "the user `none` may not configure `users.reply@`: no client can connect"),
        ("deaf", [reply, exchanges, r"^users\.discovery$"], "the user `deaf` may not read `users.reply@`"),
        (
            "mute",
            [reply, r"^users\.(oneway|events|discovery|reply@.*)$", both],
            "`mute` may not write `users.rpc`: nobody",
        ),
        ("calm", [reply, r"^users\.(rpc|oneway|discovery|reply@.*)$", both], "`calm` may not write `users.events`"),
        ("blind", [reply, exchanges, reply], "`blind` may not read `users.discovery`"),
    ] {
        hospital.node.ctl(&["add_user", user, user]).await;
        hospital.node.ctl(&[&["set_permissions", user][..], &permissions].concat()).await;
        let all = problems(found(&hospital.doctor(&hospital.as_user(user), "users", &["--json"]).await));
        assert_eq!(all.len(), 1, "{user}: {all:#?}");
        named(&all[0], "permissions of a client", words, &format!("rabbitmqctl set_permissions -p VHOST {user}"));
    }
    // A client of these users may be all that it is to be. As a server it lacks more.
    let all = problems(found(&hospital.doctor(&hospital.as_user("blind"), "users", &["demo", "--json"]).await));
    let server: Vec<_> = all.iter().filter(|it| it["about"] == "permissions of a server of `demo.v1`").collect();
    named(server[0], "server", "may not configure `users.demo.v1@`: it cannot start", r"users\.demo\.v1@");
    named(server[1], "server", "may not write `amq.default`: it cannot reply", "add `amq\\.default`");
}

/// Makes a dead letter.
async fn buried(hospital: &Hospital, namespace: &str) {
    let client = hospital.client(namespace).await;
    client.oneway("demo", "note", ("x",)).send().await.expect("the broker has it");
    let url = hospital.node.url();
    let dead = hopline::DeadLetters::builder().namespace(namespace).connect(url, "demo").await.expect("it is there");
    let counted = async { while dead.count().await.expect("it is there") != 1 {} };
    tokio::time::timeout(PATIENCE, counted).await.expect("it dies within a minute");
}

/// An instance that only answers the question for its statistics, and is an hour behind.
async fn clock(hospital: &Hospital, namespace: &str) -> tokio::task::JoinHandle<()> {
    let client = hospital.client(namespace).await;
    let transport = hospital.transport().await;
    let queue = Queue::new(format!("{namespace}.demo.v1@late.x"), QueueKind::Exclusive);
    let (name, exchange) = (queue.name.clone(), format!("{namespace}.discovery"));
    let bound = Binding { exchange, key: "ask".into(), queue: name.clone() };
    let parts = [Declaration::Queue(queue), Declaration::Binding(bound)];
    transport.declare(&parts).await.expect("nothing is in the way");
    let mut asked = transport.consume(&name, Mode::NoAck).await.expect("it is there");
    tokio::spawn(async move {
        // The client has declared the exchanges.
        let _client = client;
        while let Some(question) = asked.next().await {
            let now = std::time::SystemTime::now() - Duration::from_secs(3600);
            let now = now.duration_since(std::time::UNIX_EPOCH).expect("it is after 1970").as_millis() as u64;
            let document =
                json!({ "type": "hopline.v1.stats", "service": "demo.v1", "instance": "late", "now_ms": now });
            let _answered = transport.publish(Publication {
                exchange: String::new(),
                key: question.properties.reply_to.clone().expect("it is a question"),
                mandatory: false,
                properties: Properties::default(),
                body: reply(&question.body, &document).into(),
            });
            question.settle(Settle::Ack);
        }
    })
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn small_limits_and_alarms_are_found() {
    let hospital = Hospital::with("max_message_size = 1000000\nchannel_max = 64").await;
    let url = hospital.node.url();
    let _server = hospital.serve("hopline").await;
    let all = problems(found(&hospital.doctor(url, "hopline", &["--json"]).await));
    assert_eq!(all.len(), 2, "{all:#?}");
    named(&all[0], "channel_max", "can consume only 32 queues", "raise `channel_max`");
    named(
        &all[1],
        "max_message_size",
        "at most 976.6 KiB, and Hopline sends up to 16 MiB",
        "max_message_size = 16777216",
    );
    hospital.node.memory_alarm(Alarm::On).await;
    let findings = found(&hospital.doctor(url, "hopline", &["--json"]).await);
    let all = problems(findings.clone());
    assert_eq!(all.len(), 2, "{all:#?}");
    named(&all[0], "alarm", "the broker accepts no messages: low on memory", "rabbitmq-diagnostics alarms");
    for about in ["max_message_size", "clocks", "alternate exchange of `hopline.rpc`"] {
        assert!(unseen(&findings, about).contains("look again after the alarm"));
    }
    hospital.node.memory_alarm(Alarm::Off).await;
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_service_whose_instances_hang_is_found_by_its_name_and_by_the_management_api() {
    let hospital = Hospital::with("").await;
    let url = hospital.node.url();
    let _server = hospital.serve("hopline").await;
    let mut command = cleaned();
    command.args(["serve", "stuck", "--echo", "--url", url]);
    let mut hangs = Going::start(command);
    assert!(hangs.note().await.starts_with("hopline: serving "), "it serves");
    assert_eq!(problems(hospital.finds("hopline").await), [] as [Value; 0]);
    hangs.signal("STOP").await;
    let (words, advice) = ("1 read its calls, and 0 of them reply", "`hopline ping stuck.v1` names those that reply");
    hospital.has("hopline", "service `stuck.v1`", words, advice).await;
    let of_one = problems(found(&hospital.doctor(url, "hopline", &["stuck", "--json"]).await));
    assert_eq!(of_one.len(), 1, "{of_one:#?}");
    named(&of_one[0], "service `stuck.v1`", words, advice);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn whether_the_broker_tells_of_lost_instances_is_said() {
    let told = async |node: &Node, user: &str| {
        let url = format!("amqp://{user}:{user}@{}", node.authority());
        let mut command = tokio::process::Command::from(cleaned());
        command.args(["doctor", "--url", &url, "--json"]).kill_on_drop(true);
        let ended = tokio::time::timeout(PATIENCE, command.output()).await;
        let findings = found(&ended.expect("it ends within a minute").expect("it can be run"));
        let told = findings.into_iter().find(|finding| finding["about"] == "events of the broker");
        let told = told.expect("it is looked at");
        (told["verdict"].clone(), told["found"].as_str().expect("a text").to_owned())
    };
    let without = Node::start(&version()).await;
    let (verdict, found) = told(&without, "guest").await;
    assert!(verdict == "ok" && found.contains("`rabbitmq-plugins enable rabbitmq_event_exchange`"), "{found}");
    let with = Node::with(&version(), "", &[], &["rabbitmq_event_exchange"]).await;
    let (verdict, found) = told(&with, "guest").await;
    assert!(verdict == "ok" && found.starts_with("the plugin `rabbitmq_event_exchange` is there"), "{found}");
    with.ctl(&["add_user", "bob", "bob"]).await;
    with.ctl(&["set_permissions", "bob", ".*", ".*", "^(?!amq\\.rabbitmq\\.).*"]).await;
    let (verdict, found) = told(&with, "bob").await;
    assert!(verdict == "not looked at" && found.contains("`bob` may not read `amq.rabbitmq.event`"), "{found}");
}
