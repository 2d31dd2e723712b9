//! The permissions in `docs/guide/src/security.md` are enough, and not more than needed. Users cannot pose as each
//! other.
//!
//! This needs a RabbitMQ node of the version that `HOPLINE_TEST_NODE` names. `scripts/test users-3.10 users-4.3` runs
//! it with both versions. Otherwise the tests are ignored.

use std::future::Future;
use std::time::Duration;

use futures::StreamExt as _;
use hopline::topology::{Binding, Declaration, Queue, QueueKind};
use hopline::transport::{Confirm, Mode, Properties, Publication, Role, Settle, Transport};
use hopline::{
    Absent, Client, Context, DeadLetters, Error, Fault, Method, Replay, Running, Server, Service, State, Subscription,
};
use tokio::sync::mpsc;

mod node;

use node::{Node, version};

const DOCUMENT: &str = include_str!("../docs/guide/src/security.md");
/// How long a test waits for an event before it fails.
const PATIENCE: Duration = Duration::from_secs(60);

async fn soon<F: Future>(event: F) -> F::Output {
    tokio::time::timeout(PATIENCE, event).await.expect("what has to happen happens within a minute")
}

/// The commands with this name in the document, each as its arguments without quotes.
fn commands(name: &str) -> impl Iterator<Item = Vec<&str>> {
    let lines = DOCUMENT.lines().filter_map(|line| line.strip_prefix("rabbitmqctl "));
    let words = lines.map(|line| line.split_whitespace().map(|word| word.trim_matches('\'')).collect::<Vec<_>>());
    words.filter(move |words| words[0] == name)
}

/// The text of the first code block in this language in the document.
fn block(language: &str) -> &'static str {
    let (_, rest) = DOCUMENT.split_once(&format!("```{language}\n")).expect("the document has one");
    rest.split_once("```").expect("it ends").0
}

/// A node with the exchanges and users in the document, and with a user `mallory` who has the permissions of a client.
async fn with_users(version: &str) -> Node {
    let node = Node::with(version, "# exchanges.json is in @conf@\n", &[("exchanges.json", block("json"))], &[]).await;
    node.ctl(&["import_definitions", &format!("{}/exchanges.json", node.folder().await)]).await;
    let mut told = 0;
    for permissions in commands("set_permissions") {
        let ["set_permissions", "-p", "/", user, patterns @ ..] = &permissions[..] else {
            panic!("{permissions:?}");
        };
        node.ctl(&["add_user", user, user]).await;
        node.ctl(&permissions).await;
        if *user == "client" {
            node.ctl(&["add_user", "mallory", "mallory"]).await;
            node.ctl(&[&["set_permissions", "-p", "/", "mallory"], patterns].concat()).await;
        }
        told += 1;
    }
    assert_eq!(told, 4, "a client, a server, a subscriber, an operator");
    node
}

/// The address for a user whose password is its name.
fn address(node: &Node, user: &str) -> String {
    let (_, host) = node.url().split_once('@').expect("a user and a host");
    format!("amqp://{user}:{user}@{host}")
}

struct Served {
    running: Running,
    noted: mpsc::UnboundedReceiver<String>,
    heard: mpsc::UnboundedReceiver<String>,
}

/// A server of `calculator.v1`, as in the document.
async fn serve(node: &Node, change: impl FnOnce(Server) -> Server) -> Served {
    let (note, noted) = mpsc::unbounded_channel();
    let (hear, heard) = mpsc::unbounded_channel();
    let user = |context: &Context| context.user().unwrap_or_default().to_owned();
    let service = Service::new("calculator", 1)
        .method(Method::new("add"), |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) })
        .method(Method::new("who"), move |context: Context, (_,): (u8,)| async move { Ok::<_, Fault>(user(&context)) })
        .method(Method::new("note").oneway(), move |context: Context, (line,): (String,)| {
            note.send(format!("{}: {line}", user(&context))).expect("the test listens");
            async move { if line == "bad" { Err(Fault::new(hopline::Code::InvalidArgument, "bad")) } else { Ok(()) } }
        });
    let server = Server::connect(&address(node, "server")).await.expect("it may log in").serve(service);
    let server = change(server).subscribe("#", move |context: Context, (): ()| {
        hear.send(user(&context)).expect("the test listens");
        async {}
    });
    Served { running: server.start().await.expect("it may declare what it needs"), noted, heard }
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn the_documents_permissions_are_enough_and_no_more() {
    let version = version();
    let node = with_users(&version).await;
    let Served { running, mut noted, mut heard } = serve(&node, |server| server).await;
    let client = Client::connect(&address(&node, "client")).await.expect("it may declare what it needs");

    assert_eq!(client.call::<i64>("calculator", "add", (2, 3)).await.expect("answered"), 5);
    assert_eq!(client.call::<i64>("calculator", "add", (2, 3)).to(running.instance()).await.expect("answered"), 5);
    assert_eq!(client.call::<String>("calculator", "who", (1,)).await.expect("answered"), "client");
    let mut all = client
        .call::<i64>("calculator", "add", (2, 3))
        .all()
        .replies(Duration::from_secs(30))
        .await
        .expect("on its way");
    assert_eq!(soon(all.next()).await.expect("it answers").outcome.expect("a result"), 5);
    client.publish("order.created", &()).await.expect("the broker has it");
    assert_eq!(soon(heard.recv()).await.expect("it runs"), "client");
    let told = async {
        loop {
            let told = client.registry().services().await.expect("it asks");
            if let Some(told) = told.into_values().flatten().next() {
                break told;
            }
        }
    };
    assert_eq!(soon(told).await.instance, running.instance());
    for line in ["good", "bad"] {
        client.oneway("calculator", "note", (line,)).send().await.expect("the broker has it");
        assert_eq!(soon(noted.recv()).await.expect("it runs"), format!("client: {line}"));
    }
    let hasty = |service: &str| client.call::<i64>(service, "add", (2, 3)).absent(Absent::Fail);
    assert_eq!(hasty("calculator").await.expect("the broker says that somebody is there"), 5);
    for call in [client.call::<i64>("nobody", "add", (2, 3)), hasty("nobody")] {
        match call.await {
            Err(Error::NoService { .. }) => {}
            other => panic!("{other:?}"),
        }
    }

    // The operator finds the bad letter and publishes it again.
    assert_eq!(counted(&address(&node, "operator")).await, ("calculator.v1".to_owned(), 1));
    let operator = Transport::connect(&address(&node, "operator"), Role::Client).await.expect("it may log in");
    let mut letters =
        operator.consume("hopline.calculator.v1.dead", Mode::Settle { prefetch: 1 }).await.expect("it may read");
    let letter = soon(letters.next()).await.expect("it is kept");
    let again = Publication {
        exchange: "hopline.oneway".to_owned(),
        key: "calculator.v1.note".to_owned(),
        mandatory: true,
        properties: letter.properties.clone(),
        body: letter.body.clone(),
    };
    assert_eq!(operator.publish(again).await, Ok(Confirm::Accepted));
    letter.settle(Settle::Ack);
    assert_eq!(soon(noted.recv()).await.expect("it runs"), "operator: bad");
    Client::connect(&address(&node, "operator")).await.expect("it may be a client").close().await;
    soon(running.drain()).await;

    // None of them may do these things.
    let client = Transport::connect(&address(&node, "client"), Role::Client).await.expect("it may log in");
    let forbidden = |outcome: Result<(), Error>| {
        let said = outcome.expect_err("it is forbidden").to_string();
        assert!(said.contains("ACCESS_REFUSED"), "{said}");
    };
    for queue in ["hopline.calculator.v1.calls", "hopline.calculator.v1.work", "hopline.calculator.v1.dead"] {
        forbidden(client.consume(queue, Mode::NoAck).await.map(drop));
    }
    forbidden(client.declare(&[Declaration::Queue(Queue::new("mine", QueueKind::Exclusive))]).await);
    let reply_queue = || Declaration::Queue(Queue::new("hopline.reply@me", QueueKind::Exclusive));
    for exchange in ["hopline.rpc", "hopline.oneway", "hopline.events"] {
        let binding =
            Binding { exchange: exchange.to_owned(), key: "calculator.v1".into(), queue: "hopline.reply@me".into() };
        forbidden(client.declare(&[reply_queue(), Declaration::Binding(binding)]).await);
    }
    let server = Transport::connect(&address(&node, "server"), Role::Server).await.expect("it may log in");
    forbidden(server.declare(&[Declaration::Queue(Queue::new("hopline.ledger.v1.calls", QueueKind::Classic))]).await);
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn the_documents_permissions_are_enough_for_a_group_and_for_its_stream() {
    let node = with_users(&version()).await;
    let client = Client::connect(address(&node, "client")).await.expect("it may connect");
    for from in [None, Some(Replay::Start)] {
        let (tell, mut heard) = mpsc::unbounded_channel();
        let group = Subscription::to("order.*").shared("billing").attempts(2).pause(Duration::from_millis(2));
        let group = if let Some(from) = from { group.from(from) } else { group };
        let server = Server::connect(address(&node, "subscriber")).await.expect("it may connect");
        let server = server.subscribe(group, move |ctx: Context, event: u64| {
            tell.send((event, ctx.attempt())).expect("the test listens");
            async move { if event == 13 { Err("as the test asks".to_owned()) } else { Ok(()) } }
        });
        let running = server.start().await.expect("it may subscribe");
        for event in [13, 14] {
            client.publish("order.created", &event).required().await.expect("the group has it");
        }
        let mut all = Vec::new();
        for _ in 0..3 {
            all.push(soon(heard.recv()).await.expect("it is handled"));
        }
        all.sort_unstable();
        assert_eq!(all, [(13, 1), (13, 2), (14, 1)]);
        assert_eq!(*running.state().borrow(), State::Ready);
        running.drain().await;
    }
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn who_may_only_read_the_catalogue_and_queues_of_dead_letters_counts_them() {
    let node = with_users(&version()).await;
    let Served { running: _running, .. } = serve(&node, |server| server).await;
    node.ctl(&["add_user", "counter", "counter"]).await;
    let url = address(&node, "counter");
    node.ctl(&["set_permissions", "-p", "/", "counter", "^$", "^$", "^hopline\\.(services|.+\\.dead)$"]).await;
    assert_eq!(counted(&url).await, ("calculator.v1".to_owned(), 0));
    node.ctl(&["set_permissions", "-p", "/", "counter", "^.*$", "^.*$", "^$"]).await;
    let said = DeadLetters::builder().counts(&url).await.expect_err("it may not read").to_string();
    assert!(said.contains("ACCESS_REFUSED") && said.contains("hopline.services"), "{said}");
}

/// The server's permissions in the document, and the same without the permission to reply.
fn with_and_without_replies() -> [Vec<&'static str>; 2] {
    let allowed = commands("set_permissions").find(|words| words[3] == "server").expect("the document has one");
    let less = allowed.iter().enumerate().map(|(at, word)| if at == 5 { &"^hopline\\." } else { word }).copied();
    [allowed.clone(), less.collect()]
}

/// The last service in the catalogue, once a server has entered one, and how many dead letters it has.
async fn counted(url: &str) -> (String, u64) {
    let counted = async {
        loop {
            if let Some((service, count)) = DeadLetters::builder().counts(url).await.expect("it may read").pop() {
                return (service, count.expect("it may count"));
            }
        }
    };
    soon(counted).await
}

/// The open connections.
async fn open(node: &Node) -> Vec<String> {
    let open = node.connections().await.into_iter().filter(|connection| connection.state == "running");
    open.map(|connection| connection.name).collect()
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn a_server_that_may_not_reply_says_so_and_its_replies_come_when_it_may() {
    let node = with_users(&version()).await;
    let [allowed, less] = with_and_without_replies();
    let Served { running, .. } = serve(&node, |server| server).await;
    let client = Client::connect(&address(&node, "client")).await.expect("it may declare what it needs");
    node.ctl(&less).await;
    // A busy channel keeps the permissions that it was opened with, so the connections are opened anew.
    node.ctl(&["close_all_connections", "as the test asks"]).await;
    let mut state = running.state();
    let call =
        client.call::<i64>("calculator", "add", (2, 3)).idempotent().timeout(Duration::from_secs(600)).start().await;
    let mut call = call.expect("on its way");
    let degraded =
        soon(state.wait_for(|state| matches!(state, State::Degraded { .. }))).await.expect("it serves").clone();
    let State::Degraded { reason, .. } = degraded else { unreachable!("waited for") };
    assert!(reason.contains("the permission to write to `amq.default`"), "{reason}");
    assert!(futures::poll!(&mut call).is_pending(), "it waits for its reply");
    let connections = open(&node).await;
    // A server that starts now is told at once.
    let other = Server::connect(&address(&node, "server")).await.expect("it may log in");
    let add = |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) };
    match other.serve(Service::new("calculator", 1).method("add", add)).start().await {
        Err(Error::Broker { reason, .. }) => assert!(reason.contains("write to `amq.default`"), "{reason}"),
        other => panic!("{other:?}"),
    }
    node.ctl(&allowed).await;
    // The server has not reconnected because of this, which would not have helped.
    let open = open(&node).await;
    assert!(connections.iter().all(|connection| open.contains(connection)), "{connections:?} became {open:?}");
    assert_eq!(soon(call).await.expect("answered"), 5);
    soon(state.wait_for(|state| *state == State::Ready)).await.expect("it serves");
    soon(running.drain()).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn the_documents_topic_permissions_look_at_keys() {
    let version = version();
    let node = with_users(&version).await;
    let mut told = 0;
    for permissions in commands("set_topic_permissions") {
        node.ctl(&permissions).await;
        told += 1;
    }
    assert_eq!(told, 2, "oneway calls and events");
    let Served { running: _running, mut noted, mut heard } = serve(&node, |server| server).await;
    let client = Client::connect(&address(&node, "client")).await.expect("it may log in");
    client.oneway("calculator", "note", ("good",)).send().await.expect("the broker has it");
    soon(noted.recv()).await.expect("it runs");
    client.publish("order.created", &()).await.expect("the broker has it");
    soon(heard.recv()).await.expect("it runs");
    refused(
        client.publish("invoice.created", &()).await.map(drop),
        "topic 'invoice.created' in exchange 'hopline.events'",
    );
    refused(client.oneway("ledger", "book", (1,)).send().await, "exchange 'hopline.oneway'");
    let operator = Client::connect(&address(&node, "operator")).await.expect("it may log in");
    refused(operator.publish("order.created", &()).await.map(drop), "exchange 'hopline.events'");
    client.publish("order.created", &()).await.expect("the client goes on");
}

/// Checks that the broker refuses what is published there.
fn refused(outcome: Result<(), Error>, place: &str) {
    match outcome {
        Err(Error::Broker { reason, .. }) => {
            assert!(reason.contains("ACCESS_REFUSED") && reason.contains(place), "{reason}");
        }
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn only_who_may_write_to_the_exchange_of_rules_can_set_them() {
    let node = with_users(&version()).await;
    let client = commands("set_permissions").find(|words| words[3] == "client").expect("the document has one");
    let ["set_permissions", "-p", "/", _, configure, write, read] = &client[..] else { panic!("{client:?}") };
    let with_rules = |pattern: &str| format!("{pattern}|^hopline\\.rules$");
    for (user, write) in [("heeding", (*write).to_owned()), ("setting", with_rules(write))] {
        node.ctl(&["add_user", user, user]).await;
        node.ctl(&["set_permissions", "-p", "/", user, configure, &write, &with_rules(read)]).await;
    }
    let heeding = async |user: &str| Client::builder().rules().connect(&address(&node, user)).await;
    // Nobody has made the queue, and this user may not.
    let said = heeding("heeding").await.expect_err("there is none").to_string();
    assert!(said.contains("hopline.rules") && said.contains("`hopline rules get`"), "{said}");
    let administrator = Client::connect(node.url()).await.expect("it may log in");
    administrator.rules().get().await.expect("it may make the queue");
    let client = heeding("heeding").await.expect("it may read");
    let rule = "retry=1".parse().expect("a rule");
    refused(client.rules().set("calculator.add", &rule).await.map(drop), "exchange 'hopline.rules'");
    let other = Client::connect(&address(&node, "setting")).await.expect("it may log in");
    let set = other.rules().set("calculator.add", &rule).await.expect("it may");
    assert_eq!(set.target, "calculator.v1.add");
    let heard = async {
        loop {
            match &client.rules().heeded()[..] {
                [set] => break set.user.clone(),
                _ => tokio::task::yield_now().await,
            }
        }
    };
    assert_eq!(soon(heard).await.as_deref(), Some("setting"));
    let said = heeding("mallory").await.expect_err("it may not read").to_string();
    assert!(said.contains("ACCESS_REFUSED"), "{said}");
    // A server needs no more than a client for it.
    let serve = async || {
        let server = Server::builder().rules().connect(&address(&node, "server")).await.expect("it may log in");
        server.serve(Service::new("calculator", 1)).start().await
    };
    let said = serve().await.expect_err("it may not read").to_string();
    assert!(said.contains("ACCESS_REFUSED"), "{said}");
    let server = commands("set_permissions").find(|words| words[3] == "server").expect("the document has one");
    let ["set_permissions", "-p", "/", _, configure, write, read] = &server[..] else { panic!("{server:?}") };
    node.ctl(&["set_permissions", "-p", "/", "server", configure, write, &with_rules(read)]).await;
    let running = serve().await.expect("it may read");
    assert_eq!(*running.state().borrow(), State::Ready);
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn users_cannot_be_each_other() {
    let version = version();
    let node = with_users(&version).await;
    let served = serve(&node, |server| server.allow(|caller, _| caller.user == Some("client"))).await;
    let Served { running: _running, mut noted, .. } = served;
    let who = async |user: &str| {
        let client = Client::connect(&address(&node, user)).await.expect("it may log in");
        client.call::<String>("calculator", "who", (1,)).await
    };
    assert_eq!(who("client").await.expect("allowed"), "client");
    match who("mallory").await {
        Err(Error::Fault(fault)) => assert!(fault.message.contains("`mallory` may not call"), "{fault}"),
        other => panic!("{other:?}"),
    }
    // Mallory claims to be somebody else. A server does not believe the header, and the transport replaces the property
    // `user_id`.
    for user in ["mallory", "client"] {
        let transport = Transport::connect(&address(&node, user), Role::Client).await.expect("it may log in");
        let publication = Publication {
            exchange: "hopline.oneway".to_owned(),
            key: "calculator.v1.note".to_owned(),
            mandatory: true,
            properties: Properties {
                user_id: Some("client".to_owned()),
                headers: vec![("x-hopline-user".to_owned(), "client".to_owned())],
                ..Properties::default()
            },
            body: note_frame(user).into(),
        };
        assert_eq!(transport.publish(publication).await, Ok(Confirm::Accepted));
    }
    assert_eq!(soon(noted.recv()).await.expect("one is allowed"), "client: client");
    let mut letters = operator_of(&node, "calculator.v1").await;
    let letter = soon(letters.1.next()).await.expect("the other is kept");
    let headers = &letter.properties.headers;
    assert!(headers.contains(&("x-hopline-user".to_owned(), "mallory".to_owned())), "{headers:?}");
}

async fn operator_of(node: &Node, service: &str) -> (Transport, hopline::transport::Consumer) {
    let operator = Transport::connect(&address(node, "operator"), Role::Client).await.expect("it may log in");
    let queue = format!("hopline.{service}.dead");
    let letters = operator.consume(&queue, Mode::Settle { prefetch: 1 }).await.expect("it may read");
    (operator, letters)
}

/// A oneway call of `note`, as a frame written by hand.
fn note_frame(line: &str) -> Vec<u8> {
    let metadata = [&[0xa1, 0x01, 0x64], b"note".as_slice()].concat();
    let payload = format!("[\"{line}\"]").into_bytes();
    let length = |bytes: &[u8]| u32::try_from(bytes.len()).expect("a short one").to_be_bytes();
    let header = [b'H', b'L', 1, 2, 3, 0, 0, 0];
    let id = uuid::Uuid::new_v4();
    [&header, id.as_bytes().as_slice(), &length(&metadata), &length(&payload), &metadata, &payload].concat()
}
