//! The result cache of a client: what it keeps, for how long, for whom, and how calls share one.

use std::future::{Future as _, IntoFuture as _, poll_fn};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use std::time::Duration;

use futures::future::join_all;
use hopline::{Call, Client, Code, Codec, Context, Error, Fault, Invocation, Method, Middleware, Next, Reply, Route};
use hopline::{ClientBuilder, Running, Service};

use crate::support::{Arrival, Held, PATIENCE, Scene, soon};

const FRESH: Duration = Duration::from_secs(5);
const STALE: Duration = Duration::from_secs(30);

/// A shop that counts how often it is asked for a price, which is this number.
struct Shop {
    server: Running,
    asked: Arc<AtomicU64>,
}

impl Shop {
    async fn open(scene: &Scene) -> Self {
        let asked = Arc::<AtomicU64>::default();
        let counted = asked.clone();
        let price = move |context: Context, (article,): (String,)| {
            let price = counted.fetch_add(1, Ordering::Relaxed) + 1;
            let outcome = match (context.metadata("fails"), article.as_str()) {
                (Some(_), _) => Err(Fault::new(Code::NotFound, "no price")),
                (None, "large") => Ok("x".repeat(40_000)),
                (None, _) => Ok(price.to_string()),
            };
            async move { outcome }
        };
        let service = Service::new("shop", 1).method(Method::new("price").idempotent(), price);
        Self { server: scene.serve(service).await, asked }
    }

    fn asked(&self) -> u64 {
        self.asked.load(Ordering::Relaxed)
    }
}

fn price(client: &Client, article: &str) -> Call<String> {
    client.call("shop", "price", (article.to_owned(),)).idempotent()
}

async fn told(call: Call<String>) -> String {
    soon(call.into_future()).await.expect("answered")
}

fn builder(scene: &Scene) -> ClientBuilder {
    Client::builder().namespace(&scene.namespace).timeout(PATIENCE)
}

/// Lets a shared call that is under way, or that nobody wants any more, go on.
async fn a_while() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_result_is_kept_for_each_argument_codec_and_metadata() {
    let scene = Scene::new();
    let shop = Shop::open(&scene).await;
    let client = builder(&scene).cache(PATIENCE).connect(&scene.url).await.expect("it is there");
    for _ in 0..3 {
        assert_eq!(told(price(&client, "pen")).await, "1");
        assert_eq!(told(price(&client, "ink")).await, "2");
        assert_eq!(told(price(&client, "pen").codec(Codec::Json)).await, "3");
        assert_eq!(told(price(&client, "pen").metadata("tenant", "acme")).await, "4");
        assert_eq!(told(price(&client, "pen").metadata("tenant", "ajax")).await, "5");
    }
    let counts = client.policies();
    assert_eq!((shop.asked(), counts.cache_misses, counts.cache_hits), (5, 5, 10));
    // Any clone has the same, and another client has its own.
    assert_eq!(told(price(&client.clone(), "pen")).await, "1");
    let other = builder(&scene).cache(PATIENCE).connect(&scene.url).await.expect("it is there");
    assert_eq!(told(price(&other, "pen")).await, "6");
    // One that is not to be kept is asked for.
    assert_eq!(told(price(&client, "pen").cache(Duration::ZERO)).await, "7");
    assert_eq!(told(price(&client, "pen")).await, "1");
    client.forget_results();
    assert_eq!(told(price(&client, "pen")).await, "8");
}

#[tokio::test]
async fn what_any_instance_may_not_answer_again_is_always_sent() {
    let scene = Scene::new();
    let shop = Shop::open(&scene).await;
    let client = builder(&scene).cache(PATIENCE).connect(&scene.url).await.expect("it is there");
    let instance = shop.server.instance();
    let not_idempotent = || client.call::<String>("shop", "price", ("pen",));
    for n in [0, 6] {
        assert_eq!(told(not_idempotent()).await, format!("{}", n + 1));
        assert_eq!(told(not_idempotent()).await, format!("{}", n + 2));
        assert_eq!(told(price(&client, "pen").to(instance)).await, format!("{}", n + 3));
        assert_eq!(told(price(&client, "pen").route(Route::Key("pen".into()))).await, format!("{}", n + 4));
        for _ in 0..2 {
            let fails = soon(price(&client, "pen").metadata("fails", "yes").into_future()).await;
            assert_eq!(fails.expect_err("no price").code(), Code::NotFound);
        }
    }
    assert_eq!(told(price(&client, "pen").route(Route::RoundRobin)).await, "13");
    assert_eq!(told(price(&client, "pen")).await, "13");
    assert_eq!(client.policies().cache_hits, 1);
}

#[tokio::test]
async fn the_users_middleware_sees_each_call_and_what_it_sets_is_in_the_key() {
    struct Token(AtomicU64);
    impl Middleware for Token {
        async fn handle(&self, mut call: Invocation, next: Next) -> Result<Reply, Error> {
            let calls = self.0.fetch_add(1, Ordering::Relaxed);
            call.set_metadata("token", if calls < 2 { "one" } else { "two" });
            next.run(call).await
        }
    }
    let scene = Scene::new();
    let shop = Shop::open(&scene).await;
    let token = Arc::new(Token(AtomicU64::new(0)));
    let client = builder(&scene).with(token.clone()).cache(PATIENCE).connect(&scene.url).await.expect("it is there");
    let mut prices = Vec::new();
    for _ in 0..4 {
        prices.push(told(price(&client, "pen")).await);
    }
    assert_eq!(
        (prices, shop.asked(), token.0.load(Ordering::Relaxed)),
        (["1", "1", "2", "2"].map(Into::into).into(), 2, 4)
    );
}

#[tokio::test(start_paused = true)]
async fn a_result_is_as_old_as_the_call_allows_and_then_one_call_brings_a_new_one() {
    let scene = Scene::in_memory();
    let shop = Shop::open(&scene).await;
    let client = scene.client().await;
    let ask = || price(&client, "pen").cache(FRESH);
    assert_eq!(told(ask()).await, "1");
    tokio::time::advance(FRESH - Duration::from_millis(100)).await;
    assert_eq!(told(ask()).await, "1");
    assert_eq!(told(price(&client, "pen").cache(FRESH / 2)).await, "2", "this one wants a newer one");
    tokio::time::advance(FRESH).await;
    assert_eq!(told(ask()).await, "3");
    // All of these are answered at once, and one of them asks for a new price.
    tokio::time::advance(FRESH + STALE - Duration::from_millis(100)).await;
    let old = join_all((0..20).map(|_| told(ask().stale(STALE)))).await;
    assert!(old.iter().all(|price| price == "3"), "{old:?}");
    while shop.asked() == 3 {
        tokio::task::yield_now().await;
    }
    soon(async {
        while told(ask().stale(STALE)).await == "3" {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert_eq!((told(ask()).await, shop.asked()), ("4".into(), 4));
    tokio::time::advance(FRESH + STALE).await;
    assert_eq!(told(ask().stale(STALE)).await, "5", "nobody gets one that is older");
}

#[tokio::test]
async fn old_results_are_taken_while_a_new_one_comes_from_the_broker() {
    let scene = Scene::new();
    let shop = Shop::open(&scene).await;
    let client = scene.client().await;
    let ask = || price(&client, "pen").cache(Duration::from_nanos(1)).stale(PATIENCE);
    assert_eq!(told(ask()).await, "1");
    soon(async {
        while told(ask()).await == "1" {
            tokio::task::yield_now().await;
        }
    })
    .await;
    assert!(client.policies().cache_stale >= 2 && shop.asked() >= 2, "{:?}", client.policies());
    assert_eq!(client.policies().cache_misses, 1);
}

/// A service whose idempotent calls wait for the test.
fn held() -> Held {
    Held::of(Method::new("hold").idempotent())
}

fn hold(client: &Client) -> Call<u64> {
    client.call("held", "hold", (7,)).idempotent().cache(PATIENCE)
}

async fn next(held: &mut Held) -> Arrival {
    soon(held.arrived.recv()).await.expect("it runs")
}

#[tokio::test]
async fn calls_of_the_same_share_one_and_it_goes_on_while_anybody_waits() {
    let scene = Scene::new();
    let mut held = held();
    let _server = scene.serve(std::mem::replace(&mut held.service, Service::new("none", 1))).await;
    let client = scene.client().await;
    let waiting: Vec<_> = (0..20).map(|_| tokio::spawn(hold(&client).into_future())).collect();
    let run = next(&mut held).await;
    soon(async {
        while client.policies().cache_shared < 19 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    // Whoever made it gives it up, with all others but one.
    waiting[..19].iter().for_each(|call| call.abort());
    a_while().await;
    run.release();
    let last = waiting.into_iter().next_back().expect("20 of them");
    assert_eq!(soon(last).await.expect("it was not aborted").expect("answered"), 7);
    assert_eq!(soon(hold(&client).into_future()).await.expect("kept"), 7);
    assert!(held.arrived.try_recv().is_err(), "one call was sent");
    let counts = client.policies();
    assert_eq!((counts.cache_misses, counts.cache_shared, counts.cache_hits), (1, 19, 1));
}

#[tokio::test]
async fn a_call_that_is_not_polled_any_more_holds_up_nobody_who_wants_the_same() {
    let scene = Scene::new();
    let mut held = held();
    let _server = scene.serve(std::mem::replace(&mut held.service, Service::new("none", 1))).await;
    let client = scene.client().await;
    let mut idle = Box::pin(hold(&client).into_future());
    let is_pending = poll_fn(|context| Poll::Ready(idle.as_mut().poll(context).is_pending())).await;
    assert!(is_pending);
    next(&mut held).await.release();
    assert_eq!(soon(hold(&client).into_future()).await.expect("answered"), 7);
    assert_eq!(soon(idle).await.expect("answered"), 7);
}

#[tokio::test]
async fn a_shared_call_is_cancelled_when_nobody_waits_any_more_and_the_next_is_a_new_one() {
    let scene = Scene::new();
    let mut held = held();
    let _server = scene.serve(std::mem::replace(&mut held.service, Service::new("none", 1))).await;
    let client = scene.client().await;
    let waiting: Vec<_> = (0..2).map(|_| tokio::spawn(hold(&client).into_future())).collect();
    let run = next(&mut held).await;
    waiting.iter().for_each(|call| call.abort());
    soon(run.context.cancelled()).await;
    let again = tokio::spawn(hold(&client).into_future());
    next(&mut held).await.release();
    assert_eq!(soon(again).await.expect("it runs").expect("answered"), 7);
    assert_eq!(client.policies().cache_misses, 2);
}

#[tokio::test(start_paused = true)]
async fn who_has_more_time_than_the_shared_call_makes_another_and_who_has_less_times_out() {
    let scene = Scene::in_memory();
    let mut held = held();
    let _server = scene.serve(std::mem::replace(&mut held.service, Service::new("none", 1))).await;
    let client = scene.client().await;
    let [short, middle, long] =
        [1, 2, 10].map(|seconds| hold(&client).timeout(Duration::from_secs(seconds)).into_future());
    let middle = tokio::spawn(middle);
    let first = next(&mut held).await;
    let (short, long) = (tokio::spawn(short), tokio::spawn(long));
    let error = short.await.expect("it runs").expect_err("its time is over");
    assert!(matches!(error, Error::Timeout { after, .. } if after == Duration::from_secs(1)), "{error:?}");
    assert!(error.may_have_run());
    middle.await.expect("it runs").expect_err("its time is over too");
    next(&mut held).await.release();
    assert_eq!(long.await.expect("it runs").expect("another call"), 7);
    drop(first);
}

#[tokio::test]
async fn the_cache_holds_no_more_results_and_bytes_than_it_may() {
    let scene = Scene::new();
    let shop = Shop::open(&scene).await;
    let client =
        builder(&scene).cache(PATIENCE).cache_size(10, 100_000).connect(&scene.url).await.expect("it is there");
    for article in 0..50 {
        told(price(&client, &article.to_string())).await;
    }
    let before = shop.asked();
    for article in (0..50).rev() {
        told(price(&client, &article.to_string())).await;
    }
    let hits = client.policies().cache_hits;
    assert!((1..=10).contains(&hits) && shop.asked() == before + 50 - hits, "{hits} were kept");
    // Two large ones fit beside two small ones.
    for tenant in ["1", "2", "3", "4", "1"] {
        told(price(&client, "large").metadata("tenant", tenant)).await;
    }
    assert_eq!(client.policies().cache_hits, hits, "the first of four is not there any more");
}

#[tokio::test]
async fn a_method_of_a_trait_is_kept_and_tried_again_as_its_options_say() {
    #[derive(Default)]
    struct Weather(AtomicU64);
    #[hopline::service]
    trait Forecast {
        #[rpc(idempotent, retry = 2, cache = "1m", stale = "1m")]
        async fn today(&self) -> Result<u64, Fault>;
    }
    impl Forecast for Weather {
        async fn today(&self) -> Result<u64, Fault> {
            match self.0.fetch_add(1, Ordering::Relaxed) {
                0 => Err(Fault::new(Code::Unavailable, "still asleep")),
                runs => Ok(runs),
            }
        }
    }
    let scene = Scene::new();
    let _server = scene.server().await.serve(ForecastServer::new(Weather::default())).start().await.expect("served");
    let client = scene.client().await;
    let forecast = ForecastClient::new(&client);
    for _ in 0..2 {
        assert_eq!(soon(forecast.today().into_future()).await.expect("at the second attempt"), 1);
    }
    let counts = client.policies();
    assert_eq!((counts.retries, counts.cache_misses, counts.cache_hits), (1, 1, 1));
}
