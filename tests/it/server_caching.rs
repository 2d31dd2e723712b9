//! The result cache of a server: for whom it keeps a result, what it never keeps, and how calls share a run.

use std::future::IntoFuture as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use futures::future::join_all;
use hopline::{Call, Client, Code, Codec, Context, Dispatch, Error, Fault, Method, ResultCache, Running, Service};
use tokio::sync::Notify;

use crate::support::{Arrival, Held, PATIENCE, Scene, code, later, soon};

const FRESH: Duration = Duration::from_secs(5);
const STALE: Duration = Duration::from_secs(30);

/// A shop that counts how often a handler runs, and answers with that number.
fn shop() -> (Service, Arc<AtomicU64>) {
    let runs = Arc::<AtomicU64>::default();
    let run = |runs: &Arc<AtomicU64>| {
        let runs = runs.clone();
        move |context: Context, (article,): (String,)| {
            let number = runs.fetch_add(1, Ordering::Relaxed) + 1;
            async move {
                match (context.metadata("fails"), article.as_str()) {
                    (Some(_), _) => Err(Fault::new(Code::NotFound, "no price")),
                    (None, "large") => Ok("x".repeat(40_000)),
                    (None, _) => Ok(number.to_string()),
                }
            }
        }
    };
    let service = Service::new("shop", 1)
        .method(Method::new("price").idempotent(), run(&runs))
        .method(Method::new("stock").idempotent(), run(&runs))
        .method("sell", run(&runs));
    (service, runs)
}

fn call(client: &Client, method: &str, article: &str) -> Call<String> {
    client.call("shop", method, (article.to_owned(),))
}

async fn told(call: Call<String>) -> String {
    soon(call.into_future()).await.expect("answered")
}

#[tokio::test]
async fn a_result_is_kept_for_each_method_argument_codec_and_metadata_and_is_every_clients() {
    let scene = Scene::new();
    let cache = Arc::new(ResultCache::for_time(PATIENCE));
    let (service, runs) = shop();
    let _server = scene.serve(service.with(cache.clone())).await;
    for _ in 0..2 {
        let client = scene.client().await;
        assert_eq!(told(call(&client, "price", "pen")).await, "1");
        assert_eq!(told(call(&client, "price", "ink")).await, "2");
        assert_eq!(told(call(&client, "stock", "pen")).await, "3");
        assert_eq!(told(call(&client, "price", "pen").codec(Codec::Json)).await, "4");
        assert_eq!(told(call(&client, "price", "pen").metadata("tenant", "acme")).await, "5");
    }
    let counts = cache.counts();
    assert_eq!((counts.misses, counts.hits, runs.load(Ordering::Relaxed)), (5, 5, 5));
    cache.forget();
    assert_eq!(told(call(&scene.client().await, "price", "pen")).await, "6");
}

#[tokio::test]
async fn only_results_of_idempotent_methods_that_are_named_are_kept() {
    let scene = Scene::new();
    let cache = Arc::new(ResultCache::for_time(PATIENCE).methods(["price", "sell"]));
    let (service, runs) = shop();
    let server = scene.serve(service.with(cache.clone())).await;
    let client = scene.client().await;
    for _ in 0..2 {
        // What the caller says of the method does not count.
        told(call(&client, "sell", "pen").idempotent()).await;
        told(call(&client, "stock", "pen")).await;
        let fails = soon(call(&client, "price", "pen").metadata("fails", "yes").into_future()).await;
        assert_eq!(code(fails), Code::NotFound);
        let all = call(&client, "price", "pen").all().gather(Duration::from_millis(200)).await.expect("asked");
        assert_eq!(all.len(), 1);
    }
    assert_eq!((runs.load(Ordering::Relaxed), cache.counts().hits, cache.counts().misses), (8, 0, 2));
    told(call(&client, "price", "pen").to(server.instance())).await;
    told(call(&client, "price", "pen")).await;
    assert_eq!((runs.load(Ordering::Relaxed), cache.counts().hits), (9, 1));
}

#[tokio::test]
async fn no_user_gets_the_result_of_another_nor_one_that_may_not_call() {
    let scene = Scene::in_memory();
    let cache = Arc::new(ResultCache::for_time(PATIENCE));
    let (service, runs) = shop();
    let service = service.with(cache.clone());
    let server = scene.server().await.serve(service);
    let _server = server.allow(|caller, _| caller.user != Some("mallory")).start().await.expect("served");
    let price = async |user: &str| {
        let url = scene.url.replacen("memory://", &format!("memory://{user}@"), 1);
        let client = Client::builder().namespace(&scene.namespace).connect(url).await.expect("the broker is there");
        call(&client, "price", "pen").await
    };
    for _ in 0..2 {
        assert_eq!(price("alice").await.expect("answered"), "1");
        assert_eq!(price("bob").await.expect("answered"), "2");
        assert_eq!(code(price("mallory").await), Code::PermissionDenied);
    }
    assert_eq!((runs.load(Ordering::Relaxed), cache.counts().hits, cache.counts().misses), (2, 2, 2));
}

#[tokio::test]
async fn the_rule_of_a_server_is_asked_about_calls_whose_result_is_kept() {
    let scene = Scene::new();
    let (service, runs) = shop();
    let (cache, asked) = (Arc::new(ResultCache::for_time(PATIENCE)), Arc::<AtomicU64>::default());
    let rule = {
        let asked = asked.clone();
        move |_: &hopline::Caller<'_>, method: &str| {
            method != "shop.v1.price" || asked.fetch_add(1, Ordering::Relaxed) < 2
        }
    };
    let server = scene.server().await.serve(service.with(cache.clone())).allow(rule);
    let _server = server.start().await.expect("served");
    let client = scene.client().await;
    for _ in 0..2 {
        assert_eq!(told(call(&client, "price", "pen")).await, "1");
    }
    assert_eq!(code(soon(call(&client, "price", "pen").into_future()).await), Code::PermissionDenied);
    assert_eq!((runs.load(Ordering::Relaxed), cache.counts().hits), (1, 1));
}

#[tokio::test(start_paused = true)]
async fn an_old_result_is_taken_while_one_call_brings_a_new_one_and_nobody_gets_one_that_is_older() {
    let scene = Scene::in_memory();
    let mut held = held();
    let cache = Arc::new(ResultCache::for_time(FRESH).stale(STALE));
    let _server = serve(&scene, &mut held, &cache, Dispatch::Spawn).await;
    let client = scene.client().await;
    let first = tokio::spawn(hold(&client).into_future());
    next(&mut held).await.release();
    first.await.expect("it runs").expect("answered");
    tokio::time::advance(FRESH - Duration::from_millis(100)).await;
    hold(&client).await.expect("it is new enough");
    tokio::time::advance(STALE).await;
    let refreshing = tokio::spawn(hold(&client).into_future());
    let run = next(&mut held).await;
    for _ in 0..3 {
        hold(&client).await.expect("the old one");
    }
    assert!(!refreshing.is_finished());
    run.release();
    refreshing.await.expect("it runs").expect("answered");
    hold(&client).await.expect("the new one");
    let counts = cache.counts();
    assert_eq!((counts.misses, counts.hits, counts.stale), (2, 2, 3));
    tokio::time::advance(FRESH + STALE).await;
    let again = tokio::spawn(hold(&client).into_future());
    next(&mut held).await.release();
    again.await.expect("it runs").expect("answered");
    assert_eq!((cache.counts().misses, cache.counts().stale), (3, 3));
}

/// A service whose idempotent calls wait for the test.
fn held() -> Held {
    Held::of(Method::new("hold").idempotent())
}

fn hold(client: &Client) -> Call<u64> {
    client.call("held", "hold", (7,))
}

async fn serve(scene: &Scene, held: &mut Held, cache: &Arc<ResultCache>, dispatch: Dispatch) -> Running {
    let service = std::mem::replace(&mut held.service, Service::new("none", 1));
    scene.serve(service.with(cache.clone()).dispatch(dispatch)).await
}

async fn next(held: &mut Held) -> Arrival {
    soon(held.arrived.recv()).await.expect("it runs")
}

/// Waits until so many calls wait for the run of another.
async fn sharing(cache: &ResultCache, calls: u64) {
    soon(async {
        while cache.counts().shared < calls {
            tokio::task::yield_now().await;
        }
    })
    .await;
}

/// Waits until so many calls of a server were given up.
async fn given_up(client: &Client, calls: u64) {
    soon(async {
        loop {
            let stats = client.registry().stats("held").await.expect("it can be asked");
            if stats.iter().flat_map(|stats| &stats.methods).map(|method| method.cancelled).sum::<u64>() == calls {
                return;
            }
        }
    })
    .await;
}

#[tokio::test]
async fn calls_of_the_same_share_a_run_that_goes_on_while_anybody_waits_wherever_handlers_run() {
    for dispatch in [Dispatch::Spawn, Dispatch::Blocking, Dispatch::Pool(2)] {
        let scene = Scene::new();
        let (mut held, cache) = (held(), Arc::new(ResultCache::for_time(PATIENCE)));
        let _server = serve(&scene, &mut held, &cache, dispatch).await;
        let client = scene.client().await;
        let first = hold(&client).start().await.expect("on its way");
        let run = next(&mut held).await;
        let waiting = join_all((0..19).map(|_| hold(&client).start())).await;
        let mut waiting: Vec<_> = waiting.into_iter().map(|call| call.expect("on its way")).collect();
        sharing(&cache, 19).await;
        // Who began it gives it up, with all others but one.
        drop(first);
        let last = waiting.pop().expect("19 of them");
        drop(waiting);
        given_up(&client, 19).await;
        assert!(!run.context.is_cancelled(), "{dispatch:?}: somebody waits");
        run.release();
        assert_eq!(soon(last).await.expect("answered"), 7, "{dispatch:?}");
        assert_eq!(soon(hold(&client).into_future()).await.expect("kept"), 7);
        assert!(held.arrived.try_recv().is_err(), "{dispatch:?}: one has run");
        let counts = cache.counts();
        assert_eq!((counts.misses, counts.shared, counts.hits), (1, 19, 1), "{dispatch:?}");
    }
}

#[tokio::test]
async fn a_shared_run_is_cancelled_when_nobody_waits_any_more_and_the_next_call_begins_another() {
    let scene = Scene::new();
    let (mut held, cache) = (held(), Arc::new(ResultCache::for_time(PATIENCE)));
    let _server = serve(&scene, &mut held, &cache, Dispatch::Spawn).await;
    let client = scene.client().await;
    let first = hold(&client).start().await.expect("on its way");
    let run = next(&mut held).await;
    let second = hold(&client).start().await.expect("on its way");
    sharing(&cache, 1).await;
    drop((first, second));
    soon(run.context.cancelled()).await;
    let again = hold(&client).start().await.expect("on its way");
    next(&mut held).await.release();
    assert_eq!(soon(again).await.expect("answered"), 7);
    assert_eq!(cache.counts().misses, 2);
}

#[tokio::test]
async fn who_has_more_time_than_the_call_that_began_the_run_begins_another() {
    let scene = Scene::new();
    let (mut held, cache) = (held(), Arc::new(ResultCache::for_time(PATIENCE)));
    let _server = serve(&scene, &mut held, &cache, Dispatch::Spawn).await;
    let client = scene.client().await;
    let (short, long) = (Duration::from_secs(5), Duration::from_secs(500));
    let began = hold(&client).timeout(short).start().await.expect("on its way");
    let first = next(&mut held).await;
    let waits = hold(&client).timeout(long).start().await.expect("on its way");
    sharing(&cache, 1).await;
    let error = later(short, began).await.expect_err("its time is over");
    assert!(matches!(error, Error::Timeout { .. }), "{error:?}");
    soon(first.context.cancelled()).await;
    next(&mut held).await.release();
    assert_eq!(soon(waits).await.expect("by another run"), 7);
    assert_eq!((cache.counts().misses, cache.counts().shared), (2, 1));
}

fn no_fault() -> Fault {
    panic!("as the test asks")
}

#[tokio::test]
async fn a_handler_that_panics_has_panicked_for_all_who_wait_and_nothing_is_kept() {
    let scene = Scene::new();
    let (cache, go) = (Arc::new(ResultCache::for_time(PATIENCE)), Arc::new(Notify::new()));
    let (runs, gone) = (Arc::<AtomicU64>::default(), go.clone());
    let counted = runs.clone();
    let panics = move |_: Context, _: [(); 0]| {
        counted.fetch_add(1, Ordering::Relaxed);
        let gone = gone.clone();
        async move {
            gone.notified().await;
            Err::<(), Fault>(no_fault())
        }
    };
    let service = Service::new("shop", 1).method(Method::new("price").idempotent(), panics);
    let _server = scene.serve(service.with(cache.clone())).await;
    let client = scene.client().await;
    for run in 1..=2 {
        let price = || client.call::<()>("shop", "price", [(); 0]).start();
        let calls = [price().await.expect("on its way"), price().await.expect("on its way")];
        sharing(&cache, run).await;
        go.notify_one();
        for call in calls {
            let error = soon(call).await.expect_err("it panics");
            assert!(error.to_string().contains("`shop.v1.price`, or a middleware around it, panicked"), "{error}");
            assert_eq!((error.code(), runs.load(Ordering::Relaxed)), (Code::Internal, run));
        }
    }
}

#[tokio::test]
async fn it_holds_no_more_results_and_bytes_than_it_may() {
    let scene = Scene::new();
    let cache = Arc::new(ResultCache::for_time(PATIENCE).size(10, 100_000));
    let (service, _) = shop();
    let _server = scene.serve(service.with(cache.clone())).await;
    let client = scene.client().await;
    for article in (0..50).chain((0..50).rev()) {
        told(call(&client, "price", &article.to_string())).await;
    }
    let hits = cache.counts().hits;
    assert!((1..=10).contains(&hits), "{hits} were kept");
    for tenant in ["1", "2", "3", "4", "1"] {
        told(call(&client, "price", "large").metadata("tenant", tenant)).await;
    }
    assert_eq!(cache.counts().hits, hits, "two large ones fit");
}

#[tokio::test]
async fn of_two_caches_around_a_method_the_outer_one_keeps_the_results() {
    let scene = Scene::new();
    let (cache, inner) = (Arc::new(ResultCache::for_time(PATIENCE)), Arc::new(ResultCache::for_time(PATIENCE)));
    let (service, runs) = shop();
    // The second time it is inside of its own run.
    let _server = scene.serve(service.with(cache.clone()).with(cache.clone()).with(inner.clone())).await;
    let client = scene.client().await;
    for _ in 0..2 {
        assert_eq!(told(call(&client, "price", "pen")).await, "1");
    }
    let (counts, unused) = (cache.counts(), inner.counts());
    assert_eq!((runs.load(Ordering::Relaxed), counts.misses, counts.hits, unused.misses), (1, 1, 1, 0));
}

#[tokio::test(start_paused = true)]
async fn a_handler_that_says_it_has_no_time_says_so_to_all_who_share_its_run() {
    let scene = Scene::in_memory();
    let (cache, runs) = (Arc::new(ResultCache::for_time(FRESH)), Arc::<AtomicU64>::default());
    let counted = runs.clone();
    let late = move |_: Context, (): ()| {
        counted.fetch_add(1, Ordering::Relaxed);
        async {
            tokio::time::sleep(Duration::from_millis(100)).await;
            Err::<(), _>(Fault::new(Code::DeadlineExceeded, "what it asks is late"))
        }
    };
    let service = Service::new("late", 1).method(Method::new("ask").idempotent(), late).with(cache.clone());
    let _server = scene.serve(service).await;
    let client = scene.client().await;
    let calls = (0..20).map(|_| client.call::<()>("late", "ask", ()).into_future());
    assert!(join_all(calls).await.into_iter().all(|outcome| code(outcome) == Code::DeadlineExceeded));
    let counts = cache.counts();
    assert_eq!((runs.load(Ordering::Relaxed), counts.misses, counts.shared), (1, 1, 19));
    // So does a client's.
    runs.store(0, Ordering::Relaxed);
    let client =
        Client::builder().namespace(&scene.namespace).cache(FRESH).connect(&scene.url).await.expect("a broker");
    let calls = (0..20).map(|_| client.call::<()>("late", "ask", ()).idempotent().into_future());
    assert!(join_all(calls).await.into_iter().all(|outcome| code(outcome) == Code::DeadlineExceeded));
    let counts = client.policies();
    assert_eq!((runs.load(Ordering::Relaxed), counts.cache_misses, counts.cache_shared), (1, 1, 19));
}
