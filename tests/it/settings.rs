//! Every time that a user can set, with very long and very short values. It is kept as far as possible, and breaks
//! nothing.

use std::future::IntoFuture;
use std::time::Duration;

use futures::StreamExt;
use hopline::{Client, Code, Context, Error, Fault, Method, Server, Service, Unanswered, WhenFull};

use crate::support::{Calculator, MathClient, MathServer, Scene, soon};

fn is_unsent<T: std::fmt::Debug>(outcome: Result<T, Error>) {
    assert!(matches!(outcome, Err(Error::Timeout { why: Unanswered::Unsent, .. })), "{outcome:?}");
}

#[tokio::test]
async fn calls_can_have_all_the_time_there_is_and_none() {
    let scene = Scene::new();
    let server = scene.serve(MathServer::new(Calculator)).await;
    let builder = || Client::builder().namespace(&scene.namespace).max_in_flight(usize::MAX, WhenFull::Wait);
    let patient = builder().timeout(Duration::MAX).connect(&scene.url).await.expect("the broker is there");
    let hasty = builder().timeout(Duration::ZERO).connect(&scene.url).await.expect("the broker is there");

    assert_eq!(MathClient::new(&patient).add(1, 2).await.expect("answered"), 3);
    assert_eq!(MathClient::new(&patient).add(1, 2).to(server.instance()).await.expect("answered"), 3);
    assert_eq!(MathClient::new(&hasty).add(1, 2).timeout(Duration::MAX).await.expect("answered"), 3);
    is_unsent(MathClient::new(&hasty).add(1, 2).await);
    is_unsent(MathClient::new(&patient).add(1, 2).timeout(Duration::ZERO).await);

    let heard = |client: &Client| MathClient::new(client).heard();
    heard(&patient).send().await.expect("the broker has it");
    heard(&patient).all().send().await.expect("the broker has it");
    is_unsent(heard(&hasty).send().await);
    patient.publish("something.happened", &()).await.expect("the broker has it");
    // A time of zero may be enough for a fast broker or not.
    let published = soon(hasty.publish("something.happened", &())).await;
    assert!(matches!(published, Ok(_) | Err(Error::Timeout { .. })), "{published:?}");

    let mut replies = MathClient::new(&patient).whoami().all().replies(Duration::MAX).await.expect("it is there");
    assert_eq!(soon(replies.next()).await.expect("it answers").instance, server.instance());
    // They wait for other instances, which may answer at any time.
    let waiting = patient.registry().total(Duration::MAX).stall(Duration::MAX);
    tokio::select! {
        gathered = MathClient::new(&patient).whoami().all().gather(Duration::MAX) => panic!("{gathered:?}"),
        instances = waiting.services() => panic!("{instances:?}"),
        answer = MathClient::new(&hasty).add(1, 2).timeout(Duration::MAX) => assert_eq!(answer.expect("answered"), 3),
    }
    is_unsent(MathClient::new(&patient).whoami().all().gather(Duration::ZERO).await);
    is_unsent(patient.registry().total(Duration::ZERO).all_stats().await);
}

#[tokio::test]
async fn services_can_be_told_to_wait_and_to_remember_for_ever_and_not_at_all() {
    let scene = Scene::new();
    for (name, time) in [("longest", Duration::MAX), ("shortest", Duration::ZERO)] {
        let fails = move |_: Context, _: [(); 0]| async move {
            Err::<(), _>(Fault::new(Code::Unavailable, "not now").retry_after(time))
        };
        let service = Service::new(name, 1).grace(time).method(Method::new("fail").dedup(time), fails);
        let server = scene.serve(service).await;
        let client = scene.client().await;
        let call = || soon(client.call::<()>(name, "fail", [(); 0]).into_future());
        match call().await {
            // Times are milliseconds on the wire.
            Err(Error::Fault(fault)) => {
                assert_eq!(fault.retry_after.is_some_and(|after| !after.is_zero()), !time.is_zero())
            }
            other => panic!("{other:?}"),
        }
        soon(server.drain()).await;
    }
}

#[tokio::test]
async fn connecting_can_take_all_the_time_there_is_and_none() {
    let scene = Scene::new();
    for time in [Duration::MAX, Duration::ZERO] {
        let client = Client::builder().namespace(&scene.namespace).connect_timeout(time).connect(&scene.url);
        let server = Server::builder().namespace(&scene.namespace).connect_timeout(time).connect(&scene.url);
        let (client, server) = soon(futures::future::join(client, server)).await;
        // In memory, connecting takes no time.
        let can_be = time > Duration::ZERO || scene.url.starts_with("memory://");
        assert_eq!((client.is_ok(), server.is_ok()), (can_be, can_be), "{client:?}, {server:?}");
    }
}
