//! The caller is the user that the broker says, and a server's rule decides what this user may do.

use std::time::Duration;

use futures::StreamExt as _;
use hopline::transport::{Confirm, Mode, Properties, Publication, Role, Transport};
use hopline::{Client, Code, Codec, Context, Error, Fault, Method, Server, Service};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::support::{Held, Scene, code, everybody, frame, hold, soon, told};

/// The address for a user. On RabbitMQ only the user in the address under test exists.
fn address(scene: &Scene, user: &str) -> String {
    match scene.url.strip_prefix("memory://") {
        Some(name) => format!("memory://{user}@{name}"),
        None => scene.url.clone(),
    }
}

/// The name by which the broker knows `user`.
fn known_as(scene: &Scene, user: &str) -> String {
    match scene.url.strip_prefix("amqp://").and_then(|rest| rest.split_once('@')) {
        Some((login, _)) => login.split(':').next().expect("a part at least").to_owned(),
        None => user.to_owned(),
    }
}

async fn client(scene: &Scene, user: &str) -> Client {
    let url = address(scene, user);
    Client::builder().namespace(&scene.namespace).connect(&url).await.expect("the broker is there")
}

async fn server(scene: &Scene, user: &str) -> Server {
    let url = address(scene, user);
    Server::builder().namespace(&scene.namespace).connect(&url).await.expect("the broker is there")
}

type Seen = mpsc::UnboundedReceiver<Option<String>>;

/// A service that reports who its callers are.
fn reception() -> (Service, Seen) {
    let (tell, told) = mpsc::unbounded_channel();
    let service = Service::new("reception", 1)
        .method(Method::new("who"), |context: Context, (_,): (u8,)| async move {
            Ok::<_, Fault>(context.user().map(str::to_owned))
        })
        .method(Method::new("ring").oneway(), move |context: Context, (_,): (u8,)| {
            tell.send(context.user().map(str::to_owned)).expect("the test listens");
            async { Ok::<_, Fault>(()) }
        });
    (service, told)
}

#[tokio::test]
async fn a_handler_knows_its_caller_as_the_broker_verified() {
    let scene = Scene::new();
    let (service, mut rung) = reception();
    let (tell, mut heard) = mpsc::unbounded_channel();
    let server = server(&scene, "server").await.serve(service).subscribe("#", move |context: Context, (): ()| {
        tell.send(context.user().map(str::to_owned)).expect("the test listens");
        async {}
    });
    let _server = server.start().await.expect("served");
    let client = client(&scene, "alice").await;
    let alice = Some(known_as(&scene, "alice"));

    assert_eq!(client.call::<Option<String>>("reception", "who", (1,)).await.expect("answered"), alice);
    let mut all = client
        .call::<Option<String>>("reception", "who", (1,))
        .all()
        .replies(Duration::from_secs(30))
        .await
        .expect("on its way");
    assert_eq!(soon(all.next()).await.expect("one answers").outcome.expect("a result"), alice);
    client.oneway("reception", "ring", (1,)).send().await.expect("the broker has it");
    assert_eq!(soon(rung.recv()).await.expect("it runs"), alice);
    client.publish("bell", &()).await.expect("the broker has it");
    assert_eq!(soon(heard.recv()).await.expect("it runs"), alice);
}

#[tokio::test]
async fn who_may_not_call_is_refused_before_the_arguments_are_read() {
    let scene = Scene::new();
    let (service, _rung) = reception();
    let server = server(&scene, "server").await.serve(service);
    let _server = server.allow(|_, method| method == "reception.v1.who").start().await.expect("served");
    let client = client(&scene, "alice").await;
    client.call::<Option<String>>("reception", "who", (1,)).await.expect("allowed");
    let refused = client.call::<()>("reception", "ring", ("no", "such", "arguments")).await;
    let Err(Error::Fault(fault)) = refused else { panic!("expected a fault, not {refused:?}") };
    assert_eq!(fault.code, Code::PermissionDenied);
    let alice = known_as(&scene, "alice");
    assert!(fault.message.contains(&format!("`{alice}` may not call `reception.v1.ring`")), "{}", fault.message);
    // The error does not even tell whether the method exists.
    assert_eq!(code(client.call::<()>("reception", "nothing", (1,)).await), Code::PermissionDenied);
}

#[tokio::test]
async fn a_rule_goes_by_user_and_method() {
    let scene = Scene::in_memory();
    let (service, _rung) = reception();
    let server = server(&scene, "server").await.serve(service);
    let _server = server.allow(|caller, _| caller.user == Some("alice")).start().await.expect("served");
    let who = async |client: Client| client.call::<Option<String>>("reception", "who", (1,)).await;
    assert_eq!(who(client(&scene, "alice").await).await.expect("allowed").as_deref(), Some("alice"));
    assert_eq!(code(who(client(&scene, "bob").await).await), Code::PermissionDenied);
    let refused = who(scene.client().await).await.expect_err("nobody knows who that is").to_string();
    assert!(refused.contains("is not known"), "{refused}");
}

#[tokio::test]
async fn a_refused_oneway_call_is_kept_with_the_reason() {
    let scene = Scene::new();
    let (service, _rung) = reception();
    let server = server(&scene, "server").await.serve(service);
    let _server = server.allow(|_, _| false).start().await.expect("served");
    client(&scene, "alice").await.oneway("reception", "ring", (1,)).send().await.expect("the broker has it");
    let transport = scene.transport().await;
    let letter = soon(scene.dead_letters(&transport, "reception.v1").await.next()).await.expect("it is kept");
    let header =
        |name: &str| letter.properties.headers.iter().find(|(key, _)| key == name).expect("it is told").1.clone();
    assert!(header("x-hopline-reason").contains("may not call `reception.v1.ring`"));
    assert_eq!(header("x-hopline-user"), known_as(&scene, "alice"));
}

#[tokio::test]
async fn a_refused_event_is_not_handled() {
    let scene = Scene::new();
    let (tell, mut heard) = mpsc::unbounded_channel();
    let server = server(&scene, "server").await.subscribe("#", move |context: Context, (): ()| {
        tell.send(context.method().to_owned()).expect("the test listens");
        async {}
    });
    let _server = server.allow(|_, method| method == "event:order.created").start().await.expect("subscribed");
    let client = client(&scene, "alice").await;
    for key in ["order.deleted", "order.created"] {
        client.publish(key, &()).await.expect("the broker has it");
    }
    assert_eq!(soon(heard.recv()).await.expect("the second"), "order.created");
}

#[tokio::test]
async fn discovery_tells_those_who_may_know() {
    let scene = Scene::new();
    let (open, _) = reception();
    let (hidden, _) = reception();
    let open = server(&scene, "server").await.serve(open).start().await.expect("served");
    let hidden = server(&scene, "server").await.serve(hidden).allow(|_, method| !method.contains(".hopline."));
    let _hidden = hidden.start().await.expect("served");
    let client = client(&scene, "alice").await;
    let told = told(1, async |window| everybody(&client, window).await).await;
    assert_eq!(told.iter().map(|told| told.instance.as_str()).collect::<Vec<_>>(), [open.instance()]);
}

#[tokio::test]
async fn a_call_that_a_leaving_server_gives_back_is_still_its_callers() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let leaving = server(&scene, "server").await.serve(service.prefetch(10).concurrency(1));
    let leaving = leaving.start().await.expect("served");
    let (alice, stranger) = (client(&scene, "alice").await, scene.client().await);
    let _running = hold(&alice, 1).start().await.expect("on its way");
    let busy = soon(arrived.recv()).await.expect("it runs");
    let _known = hold(&alice, 2).start().await.expect("on its way");
    let _unknown = hold(&stranger, 3).start().await.expect("on its way");

    let drained = tokio::spawn(leaving.drain());
    let Held { service, arrived: mut elsewhere } = Held::new();
    let _staying = server(&scene, "server").await.serve(service).start().await.expect("served");
    for _ in 0..2 {
        let given_back = soon(elsewhere.recv()).await.expect("another server runs it");
        let expected = match given_back.number {
            2 => Some(known_as(&scene, "alice")),
            _ if scene.url.starts_with("memory:") => None,
            _ => Some(known_as(&scene, "alice")),
        };
        assert_eq!(given_back.context.user().map(str::to_owned), expected);
        given_back.release();
    }
    busy.release();
    soon(drained).await.expect("no panic");
}

#[tokio::test]
async fn nobody_can_say_that_a_message_was_anothers() {
    let scene = Scene::in_memory();
    let (service, mut rung) = reception();
    let _server = server(&scene, "server").await.serve(service).start().await.expect("served");
    for (user, expected) in [("mallory", "mallory"), ("server", "alice")] {
        let transport = Transport::connect(&address(&scene, user), Role::Client).await.expect("the broker is there");
        let publication = Publication {
            exchange: format!("{}.oneway", scene.namespace),
            key: "reception.v1.ring".to_owned(),
            mandatory: true,
            properties: Properties {
                user_id: Some("alice".to_owned()),
                headers: vec![("x-hopline-user".to_owned(), "alice".to_owned())],
                ..Properties::default()
            },
            body: frame(3, Codec::Json, Uuid::new_v4(), "ring", b"[1]").into(),
        };
        assert_eq!(transport.publish(publication).await, Ok(Confirm::Accepted));
        assert_eq!(soon(rung.recv()).await.expect("it runs").as_deref(), Some(expected));
    }
}

#[tokio::test]
async fn a_caller_that_people_gave_a_name_says_it() {
    let scene = Scene::new();
    let who = |context: Context, _: [(); 0]| async move { Ok::<_, Fault>(context.caller().map(str::to_owned)) };
    let _server = scene.serve(hopline::Service::new("asked", 1).method("who", who)).await;
    let client = Client::builder().namespace(&scene.namespace).name("billing-web").connect(&scene.url).await;
    let client = client.expect("the broker is there");
    let caller = soon(client.call::<Option<String>>("asked", "who", [(); 0])).await.expect("an answer");
    let said = caller.expect("it says who it is");
    let (name, id) = said.split_once(' ').expect("a name and an id");
    assert_eq!((name, id.len()), ("billing-web", 12), "{said}");
    let nameless = soon(scene.client().await.call::<Option<String>>("asked", "who", [(); 0])).await;
    assert_eq!(nameless.expect("an answer").map(|id| id.len()), Some(12));
}

#[tokio::test]
async fn replies_carry_their_servers_name() {
    let scene = Scene::new();
    let (service, _rung) = reception();
    let _server = server(&scene, "server").await.serve(service).start().await.expect("served");
    let transport = scene.transport().await;
    let reply_to = format!("{}.stranger", scene.namespace);
    let queue = hopline::topology::Queue::new(&reply_to, hopline::topology::QueueKind::Exclusive);
    transport.declare(&[hopline::topology::Declaration::Queue(queue)]).await.expect("declared");
    let mut replies = transport.consume(&reply_to, Mode::NoAck).await.expect("it is ours");
    let request = Publication {
        exchange: format!("{}.rpc", scene.namespace),
        key: "reception.v1".to_owned(),
        mandatory: true,
        properties: Properties { reply_to: Some(reply_to), ..Properties::default() },
        body: frame(1, Codec::Json, Uuid::new_v4(), "who", b"[1]").into(),
    };
    assert_eq!(transport.publish(request).await, Ok(Confirm::Accepted));
    let reply = soon(replies.next()).await.expect("answered");
    assert_eq!(reply.properties.user_id, Some(known_as(&scene, "server")));
}
