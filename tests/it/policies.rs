//! Policies of a client: what it tries again, and when it stops calling.

use std::future::IntoFuture as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use hopline::{
    BreakerState, Call, CallError, Client, Code, Context, Error, Fault, Invocation, Method, Middleware, Route, Running,
    Service,
};
use tokio::time::Instant;
use uuid::Uuid;

use crate::support::{Held, PATIENCE, Scene, hold, soon};

/// A service that fails for a while, and what it has seen.
#[derive(Debug, Default)]
struct Shaky {
    /// How many calls fail from now on.
    fails: AtomicU64,
    /// How many calls are refused from now on, before a handler runs.
    refuses: AtomicU64,
    fault: Mutex<Option<Fault>>,
    /// Call ids and request ids of all runs.
    runs: Mutex<Vec<(Uuid, Uuid)>>,
    /// How many attempts have arrived.
    arrived: AtomicU64,
}

fn take_one(left: &AtomicU64) -> bool {
    left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1)).is_ok()
}

/// Refuses calls as the [`Shaky`] service says.
struct Door(Arc<Shaky>);

impl Middleware for Door {
    fn admit(&self, call: &Invocation) -> Result<(), Fault> {
        if call.method() != "count" {
            return Ok(());
        }
        self.0.arrived.fetch_add(1, Ordering::Relaxed);
        if take_one(&self.0.refuses) { Err(self.0.fault()) } else { Ok(()) }
    }
}

impl Shaky {
    fn fault(&self) -> Fault {
        let fault = self.fault.lock().expect("no panic").clone();
        fault.unwrap_or_else(|| Fault::new(Code::Unavailable, "not now"))
    }

    fn runs(&self) -> usize {
        self.runs.lock().expect("no panic").len()
    }

    fn arrived(&self) -> u64 {
        self.arrived.load(Ordering::Relaxed)
    }

    fn fails(&self, calls: u64, fault: Fault) {
        *self.fault.lock().expect("no panic") = Some(fault);
        self.fails.store(calls, Ordering::Relaxed);
    }

    fn refuses(&self, calls: u64, fault: Fault) {
        *self.fault.lock().expect("no panic") = Some(fault);
        self.refuses.store(calls, Ordering::Relaxed);
    }

    async fn serve(scene: &Scene) -> (Running, Arc<Self>) {
        let shaky = Arc::<Self>::default();
        let seen = shaky.clone();
        let count = move |context: Context, (): ()| {
            seen.runs.lock().expect("no panic").push((context.call_id(), context.request_id()));
            let outcome = if take_one(&seen.fails) { Err(seen.fault()) } else { Ok(context.instance().to_owned()) };
            async move { outcome }
        };
        let service = Service::new("shaky", 1).method(Method::new("count"), count).with(Door(shaky.clone()));
        (scene.serve(service).await, shaky)
    }
}

fn count(client: &Client) -> Call<String> {
    client.call("shaky", "count", ())
}

#[tokio::test]
async fn what_has_not_run_is_tried_again_whatever_the_method_is() {
    let scene = Scene::new();
    let (_server, shaky) = Shaky::serve(&scene).await;
    let client = scene.client().await;
    for code in [Code::Unavailable, Code::ResourceExhausted] {
        shaky.refuses(1, Fault::new(code, "not now"));
        let error = soon(count(&client).into_future()).await.expect_err("without a policy");
        assert!(error.code() == code && !error.may_have_run(), "{error:?}");
        shaky.refuses(2, Fault::new(code, "not now"));
        soon(count(&client).retry(2).timeout(PATIENCE).into_future()).await.expect("the third attempt");
    }
    assert_eq!((shaky.runs(), shaky.arrived(), client.policies().retries), (2, 8, 4));
    // The third attempt has another id than the first, whose id is that of the call.
    let (call, attempt) = shaky.runs.lock().expect("no panic")[0];
    assert_ne!(call, attempt);
}

#[tokio::test]
async fn a_call_that_a_full_queue_refuses_is_tried_again() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let _server = scene.serve(service.prefetch(1).concurrency(1).max_queue(1)).await;
    let client = scene.client().await;
    let mut waiting = vec![hold(&client, 0).timeout(PATIENCE).start().await.expect("on its way")];
    let busy = soon(arrived.recv()).await.expect("it came");
    loop {
        let mut pending = hold(&client, 1).timeout(PATIENCE).start().await.expect("on its way");
        // Either the broker refuses the call, or the answer to a later one shows that it has it.
        tokio::select! {
            outcome = &mut pending => break assert!(matches!(outcome, Err(Error::Overloaded { .. })), "{outcome:?}"),
            _ = client.call::<()>("nobody", "home", [(); 0]).into_future() => waiting.push(pending),
        }
    }
    let mut again = hold(&client, 2).retry(20).timeout(PATIENCE).start().await.expect("on its way");
    while client.policies().retries == 0 {
        tokio::task::yield_now().await;
    }
    busy.release();
    let release = async {
        loop {
            arrived.recv().await.expect("it serves").release();
        }
    };
    tokio::select! {
        outcome = &mut again => assert_eq!(outcome.expect("answered"), 2),
        () = soon(release) => unreachable!("it goes on"),
    }
}

#[tokio::test]
async fn what_may_have_run_is_tried_again_only_if_it_is_idempotent() {
    let scene = Scene::new();
    let (_server, shaky) = Shaky::serve(&scene).await;
    let client = Client::builder().namespace(&scene.namespace).retry(3).connect(&scene.url).await.expect("it is there");
    for code in [Code::Unavailable, Code::ResourceExhausted, Code::Aborted] {
        shaky.fails(1, Fault::new(code, "in the middle"));
        let before = shaky.runs();
        let error = soon(count(&client).into_future()).await.expect_err("once");
        assert!(error.code() == code && error.may_have_run() && shaky.runs() == before + 1, "{error:?}");
        shaky.fails(1, Fault::new(code, "in the middle"));
        soon(count(&client).idempotent().timeout(PATIENCE).into_future()).await.expect("the second attempt");
        assert_eq!(shaky.runs(), before + 3);
    }
}

/// What a shop's own methods fail with.
#[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
enum ShopError {
    Locked,
    Unknown,
}

#[hopline::service]
trait Shop {
    #[rpc(idempotent, retry = 3, retry_on(ShopError::Locked))]
    async fn put(&self, error: Option<ShopError>) -> Result<u64, ShopError>;
}

/// Counts its runs, of which some fail with its own error.
struct Runs {
    runs: Arc<AtomicU64>,
    fails: Arc<AtomicU64>,
}

impl Shop for Runs {
    async fn put(&self, error: Option<ShopError>) -> Result<u64, ShopError> {
        let run = self.runs.fetch_add(1, Ordering::Relaxed) + 1;
        error.filter(|_| take_one(&self.fails)).map_or(Ok(run), Err)
    }
}

#[tokio::test]
async fn after_an_own_error_that_passes_a_call_is_tried_again() {
    let scene = Scene::new();
    let (runs, fails) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicU64::new(0)));
    let _server = scene.serve(ShopServer::new(Runs { runs: runs.clone(), fails: fails.clone() })).await;
    let client = scene.client().await;
    let shop = ShopClient::new(&client);
    let outcome = async |call: Call<u64, ShopError>, failing: u64| {
        runs.store(0, Ordering::Relaxed);
        fails.store(failing, Ordering::Relaxed);
        let outcome = soon(call.timeout(PATIENCE).into_future()).await;
        let outcome = outcome.map_err(|error| match error {
            CallError::Service(error) => error,
            CallError::Failed(error) => panic!("{error:?}"),
        });
        (outcome, runs.load(Ordering::Relaxed))
    };
    let (locked, unknown) = (|| Some(ShopError::Locked), || Some(ShopError::Unknown));
    assert_eq!(outcome(shop.put(locked()), 2).await, (Ok(3), 3));
    assert_eq!(outcome(shop.put(locked()), 9).await, (Err(ShopError::Locked), 4), "three more attempts");
    assert_eq!(outcome(shop.put(unknown()), 9).await, (Err(ShopError::Unknown), 1), "it is not among them");
    let put = || client.call::<u64>("shop", "put", (locked(),)).fails_with::<ShopError>().retry(3);
    assert_eq!(
        outcome(put().idempotent(), 9).await,
        (Err(ShopError::Locked), 1),
        "an answer, unless the call says else"
    );
    let not_idempotent = put().retry_on(|error| *error == ShopError::Locked);
    assert_eq!(outcome(not_idempotent, 9).await, (Err(ShopError::Locked), 1), "it has run");
    assert_eq!(client.policies().retries, 2 + 3);
}

#[tokio::test]
async fn what_does_not_help_is_not_tried_again() {
    let scene = Scene::new();
    let (_server, shaky) = Shaky::serve(&scene).await;
    let client = scene.client().await;
    let mut faults: Vec<_> = [Code::Internal, Code::InvalidArgument, Code::NotFound, Code::DeadlineExceeded]
        .map(|code| Fault::new(code, "no"))
        .into();
    faults.push(Fault::new(Code::Unavailable, "closed for good").permanent());
    faults.push(Fault::new(Code::Unavailable, "closed for good").retry_after(Duration::from_millis(1)).permanent());
    for fault in faults {
        shaky.fails(1, fault.clone());
        let before = shaky.arrived();
        let error = soon(count(&client).idempotent().retry(3).into_future()).await.expect_err("once");
        assert!(error.code() == fault.code && shaky.arrived() == before + 1, "{error:?}");
        shaky.refuses(1, fault.clone());
        let error = soon(count(&client).idempotent().retry(3).into_future()).await.expect_err("once");
        assert!(error.code() == fault.code && shaky.arrived() == before + 2, "{error:?}");
        let Error::Fault(told) = error else { panic!("{error:?}") };
        assert_eq!(told.is_permanent, fault.is_permanent);
    }
    assert_eq!(client.policies().retries, 0);
}

#[tokio::test(start_paused = true)]
async fn the_pause_is_the_one_that_the_server_asks_for_if_there_is_time_for_it() {
    let scene = Scene::in_memory();
    let (_server, shaky) = Shaky::serve(&scene).await;
    let client = scene.client().await;
    let asked = Duration::from_secs(7);
    shaky.refuses(1, Fault::new(Code::ResourceExhausted, "later").retry_after(asked));
    let began = Instant::now();
    count(&client).retry(1).await.expect("the second attempt");
    let took = began.elapsed();
    assert!(took >= asked && took < asked + Duration::from_millis(100), "{took:?}");
    shaky.refuses(1, Fault::new(Code::ResourceExhausted, "later").retry_after(asked));
    let began = Instant::now();
    let error = count(&client).retry(1).timeout(asked).await.expect_err("there is no time");
    assert!(began.elapsed() < Duration::from_millis(100) && error.retry_after() == Some(asked), "{error:?}");
}

#[tokio::test(start_paused = true)]
async fn a_service_that_refuses_everything_gets_no_more_attempts_than_the_budget_has() {
    let scene = Scene::in_memory();
    let (_server, shaky) = Shaky::serve(&scene).await;
    let client = scene.client().await;
    shaky.refuses(u64::MAX, Fault::new(Code::Unavailable, "not now"));
    let outcomes = join_all((0..1000).map(|_| count(&client).retry(3).into_future())).await;
    assert!(outcomes.iter().all(|outcome| matches!(outcome, Err(error) if error.code() == Code::Unavailable)));
    let counts = client.policies();
    // A fifth of the calls, and ten in this second. Each call ends when there is no more.
    assert_eq!((shaky.arrived(), counts.retries, counts.refused_by_budget), (1210, 210, 1000));
}

#[tokio::test]
async fn another_attempt_goes_to_another_instance() {
    let scene = Scene::new();
    let [(_one, good), (_two, bad)] = [Shaky::serve(&scene).await, Shaky::serve(&scene).await];
    bad.fails(u64::MAX, Fault::new(Code::Aborted, "broken"));
    let client = scene.client().await;
    for route in [Route::Any, Route::RoundRobin, Route::LeastInFlight] {
        let before = bad.runs();
        // Ten attempts a second are always there.
        for _ in 0..6 {
            let call = count(&client).route(route.clone()).idempotent().retry(1).timeout(PATIENCE);
            soon(call.into_future()).await.expect("the other instance is well");
        }
        assert!(bad.runs() > before || route == Route::LeastInFlight, "{route:?}: the broken one had a call");
    }
    assert_eq!(good.runs(), 18);
    assert_eq!(client.policies().retries, bad.runs() as u64);
}

#[tokio::test(start_paused = true)]
async fn an_open_breaker_sends_nothing_and_lets_three_probes_through() {
    let scene = Scene::in_memory();
    let (_server, shaky) = Shaky::serve(&scene).await;
    let client =
        Client::builder().namespace(&scene.namespace).breaker().connect(&scene.url).await.expect("it is there");
    shaky.fails(u64::MAX, Fault::new(Code::Internal, "dead"));
    for _ in 0..20 {
        assert_eq!(count(&client).await.expect_err("it fails").code(), Code::Internal);
    }
    for _ in 0..100 {
        let error = count(&client).await.expect_err("open");
        assert!(matches!(error, Error::CircuitOpen { .. }) && error.retry_after().is_some(), "{error:?}");
    }
    assert_eq!(shaky.arrived(), 20);
    // A call that waits long enough is tried again as soon as the breaker lets it through.
    shaky.fails(0, Fault::new(Code::Internal, "alive"));
    for _ in 0..3 {
        count(&client).retry(1).timeout(PATIENCE).await.expect("it is well");
    }
    assert_eq!(client.breakers()[0].state, BreakerState::Closed);
    let counts = client.policies();
    assert_eq!((counts.opened, counts.refused_by_breaker, counts.retries), (1, 101, 1));
}

#[tokio::test]
async fn along_a_route_each_instance_has_a_breaker_of_its_own() {
    let scene = Scene::new();
    let [(one, good), (two, bad)] = [Shaky::serve(&scene).await, Shaky::serve(&scene).await];
    bad.fails(u64::MAX, Fault::new(Code::Internal, "broken"));
    let client =
        Client::builder().namespace(&scene.namespace).breaker().connect(&scene.url).await.expect("it is there");
    let mut failures = 0;
    while client.policies().opened == 0 {
        failures += usize::from(soon(count(&client).route(Route::RoundRobin).into_future()).await.is_err());
    }
    assert_eq!(failures, 20);
    let (before, well) = (bad.runs(), good.runs());
    for _ in 0..20 {
        let instance = soon(count(&client).route(Route::RoundRobin).into_future()).await.expect("the other one");
        assert_eq!(instance, one.instance());
    }
    assert_eq!((bad.runs(), good.runs()), (before, well + 20));
    let error = soon(count(&client).to(two.instance()).into_future()).await.expect_err("open");
    assert!(matches!(&error, Error::CircuitOpen { instance: Some(at), .. } if at == two.instance()), "{error:?}");
}

#[tokio::test]
async fn a_breaker_is_opened_and_closed_by_hand() {
    let scene = Scene::new();
    let (_server, shaky) = Shaky::serve(&scene).await;
    let plain = scene.client().await;
    let error = plain.open_breaker("shaky", "count", PATIENCE).expect_err("it has none");
    assert!(error.to_string().contains("ClientBuilder::breaker"), "{error}");
    let client =
        Client::builder().namespace(&scene.namespace).breaker().connect(&scene.url).await.expect("it is there");
    client.open_breaker("shaky", "count", PATIENCE).expect("a good name");
    let error = soon(count(&client).into_future()).await.expect_err("open");
    assert!(error.to_string().starts_with("`shaky.v1.count` has not run: its breaker is open for"), "{error}");
    client.close_breaker("shaky.v1", "count").expect("a good name");
    soon(count(&client).into_future()).await.expect("closed");
    assert_eq!(shaky.runs(), 1);
}

#[tokio::test(start_paused = true)]
async fn many_clients_that_try_again_do_not_add_more_than_a_quarter_to_the_load() {
    const CLIENTS: usize = 100;
    /// Calls that each client makes in a second.
    const RATE: u32 = 250;
    let scene = Scene::in_memory();
    let (_server, shaky) = Shaky::serve(&scene).await;
    let mut clients = Vec::new();
    for _ in 0..CLIENTS {
        clients.push(scene.client().await);
    }
    let calls = u64::from(RATE) * CLIENTS as u64;
    for _ in 0..2 {
        let (before, mut started) = (shaky.arrived(), Vec::new());
        for turn in 0..RATE {
            // Every second call is refused.
            if turn % 2 == 0 {
                shaky.refuses(CLIENTS as u64, Fault::new(Code::Unavailable, "not now"));
            }
            started.extend(clients.iter().map(|client| tokio::spawn(count(client).retry(3).into_future())));
            tokio::time::sleep(Duration::from_secs(1) / RATE).await;
        }
        join_all(started).await;
        let load = (shaky.arrived() - before) as f64 / calls as f64;
        assert!(load > 1.05 && load <= 1.25, "{load}");
    }
}
