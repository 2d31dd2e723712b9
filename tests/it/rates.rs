//! The rate of a client: its calls to a service are paced, and those that would wait for too long are not sent.

use std::future::IntoFuture as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::join_all;
use hopline::{Call, Client, Code, Context, Error, Fault, Method, Route, Service};
use tokio::time::Instant;

use crate::support::{PATIENCE, Scene, soon};

fn search() -> (Service, Arc<AtomicU64>) {
    let ran = Arc::<AtomicU64>::default();
    let counted = ran.clone();
    let service = Service::new("search", 1).method(Method::new("find").idempotent(), move |_: Context, (): ()| {
        let n = counted.fetch_add(1, Ordering::Relaxed);
        async move { Ok::<_, Fault>(n) }
    });
    (service, ran)
}

fn find(client: &Client) -> Call<u64> {
    client.call("search", "find", ())
}

async fn paced(scene: &Scene, per_second: u32) -> Client {
    let builder = Client::builder().namespace(&scene.namespace).timeout(PATIENCE);
    builder.rate("search", per_second).connect(&scene.url).await.expect("it is there")
}

#[tokio::test(start_paused = true)]
async fn calls_over_the_rate_wait_for_half_a_second_and_what_would_wait_longer_is_not_sent() {
    let scene = Scene::in_memory();
    let (service, ran) = search();
    let _server = scene.serve(service).await;
    let client = paced(&scene, 100).await;
    for route in [Route::Any, Route::RoundRobin] {
        let before = ran.load(Ordering::Relaxed);
        find(&client).route(route.clone()).await.expect("so that its instances are known");
        tokio::time::sleep(Duration::from_secs(1)).await;
        let (since, counts) = (Instant::now(), client.policies());
        let outcomes = join_all((0..200).map(|_| find(&client).route(route.clone()).into_future())).await;
        let took = since.elapsed();
        assert!(took >= Duration::from_millis(500) && took < Duration::from_millis(600), "{took:?}");
        let refused: Vec<_> = outcomes.into_iter().filter_map(Result::err).collect();
        // Ten at once, fifty in half a second.
        assert_eq!((refused.len(), ran.load(Ordering::Relaxed) - before), (140, 61));
        for error in &refused {
            assert!(matches!(error, Error::Overloaded { .. }) && !error.may_have_run(), "{error:?}");
        }
        assert!(refused[0].to_string().contains("100 calls/s to `search.v1`"), "{}", refused[0]);
        let now = client.policies();
        let (waited, refused) =
            (now.waited_for_rate - counts.waited_for_rate, now.refused_by_rate - counts.refused_by_rate);
        assert_eq!((waited, refused), (50, 140));
    }
    // A call that has no time to wait for its turn is not sent either.
    let others = join_all((0..20).map(|_| find(&client).into_future()));
    let (_, outcome) = tokio::join!(others, find(&client).timeout(Duration::from_millis(20)));
    let error = outcome.expect_err("its turn is later");
    assert!(matches!(error, Error::Overloaded { .. }), "{error:?}");
}

#[tokio::test]
async fn a_rate_is_that_of_one_service_and_an_attempt_that_it_refuses_is_tried_again() {
    let scene = Scene::new();
    let (service, ran) = search();
    let _server = scene.serve(service).await;
    let _other = scene
        .serve(Service::new("other", 1).method(Method::new("find"), async |_: Context, (): ()| Ok::<_, Fault>(1_u64)))
        .await;
    let client = paced(&scene, 1).await;
    soon(find(&client).into_future()).await.expect("the first of this second");
    for _ in 0..20 {
        soon(client.call::<u64>("other", "find", ()).into_future()).await.expect("it has no rate");
    }
    let refused = soon(find(&client).into_future()).await.expect_err("within the same second");
    assert_eq!((refused.code(), ran.load(Ordering::Relaxed)), (Code::ResourceExhausted, 1));
    soon(find(&client).retry(9).into_future()).await.expect("a later attempt");
    assert_eq!(ran.load(Ordering::Relaxed), 2);
    assert!(client.policies().retries > 0, "{:?}", client.policies());
}

#[tokio::test]
async fn a_rate_that_cannot_be_is_refused() {
    for (service, per_second, why) in [("search.1", 5, "search.1"), ("search", 0, "give at least 1")] {
        let refused = Client::builder().rate(service, per_second).connect(Scene::in_memory().url).await;
        let Err(Error::Invalid(said)) = refused else { panic!("{refused:?}") };
        assert!(said.contains(why), "{said}");
    }
}
