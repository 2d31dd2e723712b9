//! Calls from end to end on the broker in this process: what Hopline itself costs, without a network.

use std::sync::Arc;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use futures::future::try_join_all;
use hopline::{Client, Context, Fault, Method, Running, Server, Service};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;

const URL: &str = "memory://";
const SERVICE: &str = "demo.v1";
const AT_ONCE: usize = 64;

fn round_trips(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("a runtime");
    let room = Arc::new(Semaphore::new(AT_ONCE));
    let (server, client) = runtime.block_on(both_sides(room.clone()));
    let mut group = criterion.benchmark_group("memory");

    group.throughput(Throughput::Elements(1));
    group.bench_function("call/1", |bencher| bencher.to_async(&runtime).iter(|| add(&client)));
    group.bench_function(format!("oneway/up to {AT_ONCE} not handled"), |bencher| {
        bencher.to_async(&runtime).iter(|| async {
            room.acquire().await.expect("never closed").forget();
            client.oneway(SERVICE, "note", (1_i64,)).send().await.expect("the broker takes it");
        });
    });

    group.throughput(Throughput::Elements(AT_ONCE as u64));
    group.bench_function(format!("call/{AT_ONCE}"), |bencher| {
        bencher.to_async(&runtime).iter(|| async {
            let calls = (0..AT_ONCE).map(|_| client.call::<i64>(SERVICE, "add", (2_i64, 3_i64)).into_future());
            assert_eq!(try_join_all(calls).await.expect("answers").len(), AT_ONCE);
        });
    });
    group.finish();

    runtime.block_on(async {
        client.close().await;
        server.drain().await;
    });
}

/// Each oneway call that has been handled makes room for another, since its sender waits for the broker alone and would
/// leave more and more behind.
async fn both_sides(room: Arc<Semaphore>) -> (Running, Client) {
    let note = move |_: Context, (_,): (i64,)| {
        room.add_permits(1);
        async { Ok::<(), Fault>(()) }
    };
    let service = Service::new("demo", 1)
        .method(Method::new("add"), |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) })
        .method(Method::new("note").oneway(), note);
    let server = Server::connect(URL).await.expect("a broker").serve(service).start().await.expect("serves");
    let client = Client::connect(URL).await.expect("a broker");
    // From the first reply on, the client knows that these calls are quick, and may share a message.
    add(&client).await;
    (server, client)
}

async fn add(client: &Client) {
    let sum: i64 = client.call(SERVICE, "add", (2_i64, 3_i64)).await.expect("an answer");
    assert_eq!(sum, 5);
}

criterion_group!(benches, round_trips);
criterion_main!(benches);
