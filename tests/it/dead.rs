//! Dead letters are listed where they are, replayed and dropped.

use std::future::poll_fn;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::task::Poll;

use futures::FutureExt as _;
use hopline::transport::{Confirm, Mode, Properties, Publication, Transport};
use hopline::{
    Client, Code, Codec, Context, DeadLetters, Error, Fate, Fault, LetterKind, Method, Service, WhichLetters,
};
use tokio::sync::mpsc;
use uuid::Uuid;

use crate::support::{Scene, frame, soon};

/// How many times the broker delivers a oneway call before it gives up.
const DELIVERIES: u64 = 20;

/// A service that refuses letters until it is told to accept them, and reports those that it accepts, with their ids
/// and attempts.
struct Mail {
    service: Service,
    open: Arc<AtomicBool>,
    taken: mpsc::UnboundedReceiver<(String, Uuid, u64)>,
}

fn mail() -> Mail {
    let (tell, taken) = mpsc::unbounded_channel();
    let open = Arc::new(AtomicBool::new(false));
    let is_open = open.clone();
    let service =
        Service::new("mail", 1).method(Method::new("send").oneway(), move |context: Context, (line,): (String,)| {
            let outcome = if is_open.load(Ordering::SeqCst) {
                tell.send((line, context.request_id(), context.attempt())).expect("the test listens");
                Ok(())
            } else {
                Err(Fault::new(Code::InvalidArgument, format!("no address for {line}")))
            };
            async move { outcome }
        });
    Mail { service, open, taken }
}

async fn dead(scene: &Scene) -> DeadLetters {
    DeadLetters::builder().namespace(&scene.namespace).connect(&scene.url, "mail").await.expect("the broker is there")
}

/// Publishes to the service's queue.
async fn publish(scene: &Scene, transport: &Transport, exchange: &str, key: &str, body: Vec<u8>) {
    let publication = Publication {
        exchange: format!("{}.{exchange}", scene.namespace),
        key: key.to_owned(),
        mandatory: true,
        properties: Properties::default(),
        body: body.into(),
    };
    assert_eq!(soon(transport.publish(publication)).await, Ok(Confirm::Accepted));
}

async fn send(scene: &Scene, transport: &Transport, line: &str) -> String {
    let id = Uuid::new_v4();
    let body = frame(3, Codec::Json, id, "send", serde_json::json!([line]).to_string().as_bytes());
    publish(scene, transport, "oneway", "mail.v1.send", body).await;
    id.to_string()
}

/// Waits until there are this many letters.
async fn until(dead: &DeadLetters, count: u64) {
    let counted = async {
        while dead.count().await.expect("it is there") != count {
            tokio::task::yield_now().await;
        }
    };
    soon(counted).await;
}

/// The ids of the letters, in their order.
async fn ids(dead: &DeadLetters) -> Vec<String> {
    dead.list(100).await.expect("they are there").letters.into_iter().map(|letter| letter.id).collect()
}

#[tokio::test]
async fn looking_at_dead_letters_leaves_them_where_they_are() {
    let scene = Scene::new();
    let server = scene.serve(mail().service).await;
    let (dead, transport) = (dead(&scene).await, scene.transport().await);
    let mut sent = Vec::new();
    for line in ["one", "two", "three"] {
        sent.push(send(&scene, &transport, line).await);
        until(&dead, sent.len() as u64).await;
    }
    for _ in 0..3 {
        assert_eq!(ids(&dead).await, sent);
        assert_eq!(dead.list(2).await.expect("they are there").letters.len(), 2);
    }
    let letter = dead.find(&sent[1]).await.expect("it is there").expect("the second");
    assert_eq!(
        (letter.service.as_str(), letter.method.as_deref(), letter.kind),
        ("mail.v1", Some("send"), LetterKind::Oneway)
    );
    assert_eq!((letter.reason.as_str(), letter.attempts), ("no address for two", Some(1)));
    assert_eq!((letter.instance.as_deref(), letter.codec.as_deref()), (Some(server.instance()), Some("JSON")));
    assert_eq!(letter.arguments, Some(serde_json::json!(["two"])));
    assert!(letter.failed_at.is_some() && letter.size > 32 && letter.calls == 1 && letter.history.is_empty());
    assert_eq!(dead.find("absent").await.expect("an answer"), None);
    assert_eq!(ids(&dead).await, sent);
}

#[tokio::test]
async fn a_replayed_letter_runs_with_its_id_and_all_its_attempts() {
    let scene = Scene::new();
    let Mail { service, open, mut taken } = mail();
    let _server = scene.serve(service).await;
    let (dead, transport) = (dead(&scene).await, scene.transport().await);
    let (first, second) = (send(&scene, &transport, "one").await, send(&scene, &transport, "two").await);
    until(&dead, 2).await;
    open.store(true, Ordering::SeqCst);
    let mut told = Vec::new();
    let which = WhichLetters::Ids(vec![second.clone(), "absent".to_owned()]);
    let handled = dead.replay(&which, |handled| told.push(handled.clone())).await.expect("it goes");
    assert_eq!(handled, told);
    let fates: Vec<_> = handled.iter().map(|handled| (handled.id.as_str(), &handled.fate)).collect();
    assert_eq!(fates, [(second.as_str(), &Fate::Replayed), ("absent", &Fate::Absent)]);
    let (line, id, attempt) = soon(taken.recv()).await.expect("it runs");
    assert_eq!((line.as_str(), id.to_string(), attempt), ("two", second, 1));
    assert_eq!(ids(&dead).await, [first]);
}

#[tokio::test]
async fn a_letter_that_dies_again_tells_of_its_earlier_deaths() {
    let scene = Scene::new();
    let server = scene.serve(mail().service).await;
    let (dead, transport) = (dead(&scene).await, scene.transport().await);
    let id = send(&scene, &transport, "one").await;
    until(&dead, 1).await;
    for deaths in 1..=2 {
        dead.replay(&WhichLetters::All, |_| {}).await.expect("it goes");
        until(&dead, 1).await;
        let letter = dead.find(&id).await.expect("it is there").expect("it died again");
        assert_eq!((letter.history.len(), letter.reason.as_str()), (deaths, "no address for one"));
        let death = &letter.history[deaths - 1];
        assert_eq!((death.instance.as_deref(), death.attempts), (Some(server.instance()), Some(1)));
        assert_eq!((death.reason.as_str(), death.failed_at.is_some()), ("no address for one", true));
    }
}

#[tokio::test]
async fn calls_and_what_cannot_be_read_are_kept_when_others_are_replayed() {
    let scene = Scene::new();
    let Mail { service, open, mut taken } = mail();
    let _server = scene.serve(service).await;
    let (dead, transport) = (dead(&scene).await, scene.transport().await);
    let call = Uuid::new_v4();
    publish(&scene, &transport, "rpc", "mail.v1", frame(1, Codec::Json, call, "send", b"[\"x\"]")).await;
    until(&dead, 1).await;
    publish(&scene, &transport, "oneway", "mail.v1.send", b"noise".to_vec()).await;
    until(&dead, 2).await;
    send(&scene, &transport, "one").await;
    until(&dead, 3).await;
    open.store(true, Ordering::SeqCst);
    let handled = dead.replay(&WhichLetters::All, |_| {}).await.expect("it goes");
    assert!(matches!(&handled[0].fate, Fate::Kept(why) if why.contains("stopped waiting")), "{handled:?}");
    assert!(matches!(&handled[1].fate, Fate::Kept(why) if why.contains("cannot be read")), "{handled:?}");
    assert_eq!((handled[2].fate.clone(), handled.len()), (Fate::Replayed, 3));
    soon(taken.recv()).await.expect("it runs");
    let letters = dead.list(10).await.expect("they are there").letters;
    let kinds: Vec<_> = letters.iter().map(|letter| letter.kind).collect();
    assert_eq!(kinds, [LetterKind::Call, LetterKind::Unreadable]);
    // A letter that is replayed unread cannot be read afterwards either.
    let unread = letters[1].id.clone();
    let handled = dead.replay_unread(&WhichLetters::Ids(vec![unread]), |_| {}).await.expect("it goes");
    assert_eq!(handled[0].fate, Fate::Replayed);
    until(&dead, 2).await;
    assert_eq!(dead.list(10).await.expect("they are there").letters[1].history.len(), 1);
}

#[tokio::test]
async fn dropped_letters_are_gone_and_the_others_stay() {
    let scene = Scene::new();
    let _server = scene.serve(mail().service).await;
    let (dead, transport) = (dead(&scene).await, scene.transport().await);
    let mut sent = Vec::new();
    for line in ["one", "two", "three"] {
        sent.push(send(&scene, &transport, line).await);
        until(&dead, sent.len() as u64).await;
    }
    let handled = dead.discard(&WhichLetters::Ids(vec![sent[1].clone()]), |_| {}).await.expect("it goes");
    assert_eq!(handled[0].fate, Fate::Dropped);
    assert_eq!(ids(&dead).await, [sent[0].clone(), sent[2].clone()]);
    assert_eq!(dead.discard(&WhichLetters::All, |_| {}).await.expect("they go").len(), 2);
    assert_eq!(ids(&dead).await, Vec::<String>::new());
}

#[tokio::test]
async fn a_call_whose_instances_keep_dying_is_told_by_the_broker_and_can_be_replayed() {
    let scene = Scene::new();
    scene.serve(mail().service).await.drain().await;
    let (dead, transport) = (dead(&scene).await, scene.transport().await);
    let id = send(&scene, &transport, "one").await;
    let queue = format!("{}.mail.v1.work", scene.namespace);
    for _ in 0..DELIVERIES {
        let dying = scene.transport().await;
        let mut consumer = dying.consume(&queue, Mode::Settle { prefetch: 1 }).await.expect("it is shared");
        soon(consumer.next()).await.expect("it comes again");
        dying.close().await;
    }
    until(&dead, 1).await;
    let letter = dead.find(&id).await.expect("it is there").expect("the broker brought it");
    assert!(letter.reason.contains("delivery_limit"), "{}", letter.reason);
    assert_eq!((letter.attempts, letter.instance.as_deref()), (Some(DELIVERIES), None));
    assert!(letter.failed_at.is_some() && letter.history.is_empty());
    let Mail { service, open, mut taken } = mail();
    let _server = scene.serve(service).await;
    dead.replay(&WhichLetters::All, |_| {}).await.expect("it goes");
    until(&dead, 1).await;
    let letter = dead.find(&id).await.expect("it is there").expect("it died again");
    assert_eq!((letter.reason.as_str(), letter.attempts), ("no address for one", Some(1)));
    assert!(letter.history[0].reason.contains("delivery_limit") && letter.history[0].instance.is_none());
    open.store(true, Ordering::SeqCst);
    dead.replay(&WhichLetters::All, |_| {}).await.expect("it goes");
    assert_eq!(soon(taken.recv()).await.expect("it runs").2, 1);
}

#[tokio::test]
async fn a_letter_for_one_instance_goes_back_to_it_or_is_kept() {
    let scene = Scene::new();
    let Mail { service, open, mut taken } = mail();
    let server = scene.serve(service).await;
    let other = mail();
    let _other = scene.serve(other.service).await;
    let (dead, client) = (dead(&scene).await, scene.client().await);
    for _ in 0..2 {
        client.oneway("mail", "send", ("one",)).to(server.instance()).send().await.expect("the broker has it");
    }
    until(&dead, 2).await;
    open.store(true, Ordering::SeqCst);
    let first = ids(&dead).await[0].clone();
    dead.replay(&WhichLetters::Ids(vec![first]), |_| {}).await.expect("it goes");
    soon(taken.recv()).await.expect("it runs there");
    server.drain().await;
    let handled = dead.replay(&WhichLetters::All, |_| {}).await.expect("an answer");
    assert!(matches!(&handled[0].fate, Fate::Kept(why) if why.contains("not there any more")), "{handled:?}");
}

#[tokio::test]
async fn a_replay_that_is_dropped_leaves_its_letter_where_others_see_it() {
    let scene = Scene::new();
    let server = scene.serve(mail().service).await;
    let (dead, other, transport) = (dead(&scene).await, dead(&scene).await, scene.transport().await);
    let id = send(&scene, &transport, "one").await;
    until(&dead, 1).await;
    // Without a server, the replayed call stays in its queue.
    server.drain().await;
    let which = WhichLetters::Ids(vec![id.clone()]);
    for polls in 1.. {
        let mut replay = Box::pin(dead.replay(&which, |_| {}));
        let mut polled = 0;
        let until_dropped = poll_fn(|context| {
            polled += 1;
            if polled > polls {
                return Poll::Ready(None);
            }
            // In memory nothing would be waited for, did not the runtime ask for a pause.
            while polled == 1 && tokio::task::consume_budget().now_or_never().is_some() {}
            replay.as_mut().poll(context).map(Some)
        });
        if let Some(handled) = soon(until_dropped).await {
            assert_eq!(handled.expect("it goes")[0].fate, Fate::Replayed);
            assert!(polls > 1, "it has been dropped before");
            break;
        }
        drop(replay);
        until(&other, 1).await;
        assert!(other.find(&id).await.expect("an answer").is_some());
        // The other connection takes out the letters after the first has put them back.
        until(&other, 1).await;
    }
    until(&other, 0).await;
}

#[tokio::test]
async fn a_service_that_was_never_there_has_no_dead_letters() {
    let scene = Scene::new();
    let dead = dead(&scene).await;
    assert!(matches!(dead.count().await, Err(Error::NoService { service, .. }) if service == "mail.v1"));
    assert!(matches!(dead.list(1).await, Err(Error::NoService { .. })));
}

#[tokio::test]
async fn the_beginning_of_an_id_will_do_where_no_other_begins_so() {
    let scene = Scene::new();
    let _server = scene.serve(mail().service).await;
    let (dead, transport) = (dead(&scene).await, scene.transport().await);
    for (count, id) in
        ["aaaa0000-0000-4000-8000-000000000001", "aaaa0000-0000-4000-8000-000000000002"].iter().enumerate()
    {
        let body = frame(3, Codec::Json, id.parse().expect("an id"), "send", b"[\"x\"]");
        publish(&scene, &transport, "oneway", "mail.v1.send", body).await;
        until(&dead, count as u64 + 1).await;
    }
    let other = send(&scene, &transport, "other").await;
    until(&dead, 3).await;
    let found = dead.find(&other[..9]).await.expect("an answer").expect("it is there");
    assert_eq!(found.id, other);
    let said = dead.find("aaaa").await.expect_err("two begin so").to_string();
    assert!(said.contains("the ids of 2 dead letters of `mail.v1` begin with `aaaa`"), "{said}");
    assert!(matches!(dead.find("").await, Err(Error::Invalid(_))));
    // Nothing is done if one of the ids is ambiguous.
    let which = WhichLetters::Ids(vec![other.clone(), "aaaa0000".to_owned()]);
    assert!(matches!(dead.discard(&which, |_| {}).await, Err(Error::Invalid(_))));
    until(&dead, 3).await;
    let whole = "aaaa0000-0000-4000-8000-000000000002";
    let which = WhichLetters::Ids(vec![other[..13].to_owned(), whole.to_owned()]);
    let mut gone: Vec<_> = dead.discard(&which, |_| {}).await.expect("they go").into_iter().map(|one| one.id).collect();
    gone.sort_unstable();
    let mut meant = [other.as_str(), whole];
    meant.sort_unstable();
    assert_eq!(gone, meant);
    until(&dead, 1).await;
}

#[tokio::test]
async fn a_letter_tells_who_called_and_with_what() {
    let scene = Scene::new();
    let _server = scene.serve(mail().service).await;
    let client = Client::builder().namespace(&scene.namespace).name("billing-web").connect(&scene.url).await;
    let (client, dead) = (client.expect("the broker is there"), dead(&scene).await);
    let long = "x".repeat(10_000);
    client.oneway("mail", "send", (long.clone(),)).metadata("tenant", "acme").send().await.expect("the broker has it");
    until(&dead, 1).await;
    let listed = dead.list(1).await.expect("it is there").letters.remove(0);
    assert!(listed.caller.as_ref().is_some_and(|caller| caller.starts_with("billing-web ")), "{listed:?}");
    assert_eq!(listed.user, client_user(&scene));
    assert_eq!(listed.metadata["tenant"], "acme");
    assert_eq!(listed.arguments, None, "a list of many would be too much to hold");
    let found = dead.find(&listed.id).await.expect("an answer").expect("it is there");
    assert_eq!(found.arguments, Some(serde_json::json!([long])));
}

/// The user of the client. `None` in memory, where nobody has a user.
fn client_user(scene: &Scene) -> Option<String> {
    (!scene.url.starts_with("memory")).then(|| "guest".to_owned())
}

#[tokio::test]
async fn an_id_may_be_written_as_people_write_it() {
    let scene = Scene::new();
    let _server = scene.serve(mail().service).await;
    let (dead, transport) = (dead(&scene).await, scene.transport().await);
    let id = send(&scene, &transport, "one").await;
    let other = send(&scene, &transport, "other").await;
    until(&dead, 2).await;
    for written in [id.to_uppercase(), id[..20].to_uppercase(), id.replace('-', "")] {
        assert_eq!(dead.find(&written).await.expect("an answer").expect("it is there").id, id);
    }
    let mut fates = dead.replay(&WhichLetters::Ids(vec![id.to_uppercase()]), |_| {}).await.expect("it goes");
    assert_eq!((fates.len(), fates.remove(0).fate), (1, Fate::Replayed));
    until(&dead, 2).await;
    let which = WhichLetters::Ids(vec![id.replace('-', ""), other.to_uppercase()]);
    let fates: Vec<_> = dead.discard(&which, |_| {}).await.expect("they go").into_iter().map(|one| one.fate).collect();
    assert_eq!(fates, [Fate::Dropped, Fate::Dropped]);
}

/// A message that cannot be read has the id that its publisher wrote.
#[tokio::test]
async fn an_id_that_a_peer_wrote_in_upper_case_is_found_too() {
    let scene = Scene::new();
    let _server = scene.serve(mail().service).await;
    let (dead, transport) = (dead(&scene).await, scene.transport().await);
    let id = Uuid::new_v4().to_string().to_uppercase();
    let publication = Publication {
        exchange: String::new(),
        key: format!("{}.mail.v1.dead", scene.namespace),
        mandatory: true,
        properties: Properties { correlation_id: Some(id.clone()), ..Properties::default() },
        body: b"noise".to_vec().into(),
    };
    assert_eq!(soon(transport.publish(publication)).await, Ok(Confirm::Accepted));
    assert_eq!(dead.find(&id).await.expect("an answer").expect("it is there").id, id.to_lowercase());
}
