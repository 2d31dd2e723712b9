//! Who serves what.

use std::time::Duration;

use hopline::Service;

use crate::support::{Calculator, Held, MathServer, Scene, hold, soon, told};

#[tokio::test]
async fn every_instance_tells_what_it_serves() {
    let scene = Scene::new();
    let client = scene.client().await;
    assert_eq!(client.instances(Duration::from_millis(200)).await.expect("nobody is fine"), []);
    let one = scene.serve(MathServer::new(Calculator)).await;
    let two = scene.server().await.serve(MathServer::new(Calculator)).serve(Service::new("other", 2)).start().await;
    let two = two.expect("both can be served");
    let told = told(3, async |window| client.instances(window).await).await;
    let mut expected = [("math.v1", one.instance()), ("math.v1", two.instance()), ("other.v2", two.instance())];
    expected.sort_unstable();
    let served: Vec<_> = told.iter().map(|told| (told.service.as_str(), told.instance.as_str())).collect();
    assert_eq!(served, expected);
    let add = &told[0].methods[0];
    assert_eq!((add.name.as_str(), add.signature.as_str()), ("add", "add(a: i64, b: i64) -> i64"));
    assert!(!add.oneway && !add.idempotent);
    let oneway: Vec<_> = told[0].methods.iter().filter(|method| method.oneway).map(|method| &*method.name).collect();
    assert_eq!(oneway, ["heard"]);
}

#[tokio::test]
async fn an_instance_tells_how_busy_it_is_even_when_every_place_is_taken() {
    let scene = Scene::new();
    let Held { service, mut arrived } = Held::new();
    let server = scene.serve(service.concurrency(1)).await;
    let client = scene.client().await;
    for _ in 0..2 {
        let pending = hold(&client, 1).start().await.expect("on its way");
        soon(arrived.recv()).await.expect("it runs").release();
        pending.await.expect("answered");
    }
    let _pending = hold(&client, 1).start().await.expect("on its way");
    let _running = soon(arrived.recv()).await.expect("it runs");
    let told = told(1, async |window| client.stats(window).await).await;
    let told: Vec<_> = told.iter().map(|told| (told.instance.as_str(), told.running, told.finished)).collect();
    assert_eq!(told, [(server.instance(), 1, 2)]);
}
