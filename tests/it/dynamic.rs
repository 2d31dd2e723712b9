//! Calls without Rust types: what instances tell of theirs, and what is checked before a call is sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use hopline::dynamic::Dynamic;
use hopline::{CallError, Client, Code, Context, Error, Fault, Method, Service};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::support::{Calculator, MathServer, Scene, soon};

/// What a shop is asked for.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
struct Order {
    lines: Vec<Line>,
    #[serde(default)]
    express: bool,
}

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
struct Line {
    article: String,
    price: u32,
}

#[derive(Debug, Serialize, Deserialize, JsonSchema)]
enum ShopError {
    Closed,
    TooMuch { limit: u32 },
}

#[hopline::service]
trait Shop {
    async fn total(&self, order: Order, discount: Option<u32>) -> Result<u32, ShopError>;
    #[rpc(oneway)]
    async fn note(&self, r#type: String);
    async fn opaque(&self, bytes: serde_bytes::ByteBuf) -> usize;
}

/// Counts the calls that come.
#[derive(Default)]
struct Counting(Arc<AtomicUsize>);

impl Shop for Counting {
    async fn total(&self, order: Order, discount: Option<u32>) -> Result<u32, ShopError> {
        self.0.fetch_add(1, Ordering::SeqCst);
        let sum: u32 = order.lines.iter().map(|line| line.price).sum();
        match sum - discount.unwrap_or_default() {
            0 => Err(ShopError::Closed),
            1000.. => Err(ShopError::TooMuch { limit: 999 }),
            sum => Ok(sum),
        }
    }

    async fn note(&self, _: String) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    async fn opaque(&self, bytes: serde_bytes::ByteBuf) -> usize {
        bytes.len()
    }
}

async fn dynamic(client: &Client, service: &str) -> Dynamic {
    soon(client.dynamic(service)).await.expect("it tells")
}

/// What is said of arguments that do not fit.
#[track_caller]
fn refused(dynamic: &Dynamic, method: &str, arguments: Value) -> String {
    match dynamic.call(method, arguments) {
        Err(Error::Invalid(why)) => why,
        other => panic!("it does not fit: {other:?}"),
    }
}

#[tokio::test]
async fn a_method_is_called_by_the_names_of_its_parameters_or_by_their_places() {
    let scene = Scene::new();
    let _server = scene.serve(ShopServer::new(Counting::default())).await;
    let client = scene.client().await;
    let shop = dynamic(&client, "shop").await;
    let order = json!({"lines": [{"article": "tea", "price": 5}, {"article": "jam", "price": 7}]});
    let total = |arguments: Value| shop.call("total", arguments).expect("it fits");
    assert_eq!(soon(total(json!({"discount": 2, "order": order}))).await.expect("a result"), json!(10));
    assert_eq!(soon(total(json!({"order": order}))).await.expect("a result"), json!(12));
    assert_eq!(soon(total(json!([order]))).await.expect("a result"), json!(12));
    let own = soon(total(json!([order, 12]))).await;
    assert!(matches!(&own, Err(CallError::Service(error)) if *error == json!("Closed")), "{own:?}");
    let dear = json!({"lines": [{"article": "ring", "price": 5000}]});
    let own = soon(total(json!([dear]))).await;
    let expected = json!({"TooMuch": {"limit": 999}});
    assert!(matches!(&own, Err(CallError::Service(error)) if *error == expected), "{own:?}");
}

#[tokio::test]
async fn what_does_not_fit_is_not_sent_and_the_error_names_the_place() {
    let scene = Scene::new();
    let counting = Counting::default();
    let came = counting.0.clone();
    let server = scene.serve(ShopServer::new(counting)).await;
    let client = scene.client().await;
    let shop = dynamic(&client, "shop").await;
    let line = |price: Value| json!({"article": "tea", "price": price});
    let order = json!({"lines": [line(json!(1)), line(json!(2)), line(json!("x"))]});
    assert_eq!(
        refused(&shop, "total", json!({ "order": order })),
        r#"order.lines[2].price must be an integer, and it is "x""#
    );
    assert_eq!(refused(&shop, "total", json!([{"lines": [{"price": 1}]}])), "order.lines[0].article is missing");
    assert_eq!(refused(&shop, "total", json!([{"lines": []}, -1])), "discount must be at least 0, and it is -1");
    assert!(refused(&shop, "total", json!({})).starts_with("order is missing: write `total(order: Order, "));
    assert!(refused(&shop, "total", json!({"order": order, "colour": 1})).ends_with("has no parameter `colour`"));
    let note = shop.oneway("note", json!({"type": 3})).expect_err("it does not fit");
    assert_eq!(note.to_string(), "type must be a string, and it is 3");
    soon(shop.oneway("note", json!({"type": "x"})).expect("it fits").send()).await.expect("the broker has it");
    // A drain would give back a oneway call that waits.
    soon(async {
        while came.load(Ordering::SeqCst) == 0 {
            tokio::task::yield_now().await;
        }
    })
    .await;
    server.drain().await;
    assert_eq!(came.load(Ordering::SeqCst), 1, "the one that fits");
}

#[tokio::test]
async fn a_method_whose_types_have_no_schema_is_served_and_takes_its_arguments_unchecked_and_by_place() {
    let scene = Scene::new();
    let _server = scene.serve(ShopServer::new(Counting::default())).await;
    let client = scene.client().await;
    let shop = dynamic(&client, "shop").await;
    let [instance] = &soon(client.registry().count(1).instances("shop")).await.expect("it tells")[..] else {
        panic!("one is there")
    };
    let schemas: Vec<_> = instance.methods.iter().map(|method| (&*method.name, method.schema)).collect();
    assert_eq!(schemas, [("note", true), ("opaque", false), ("total", true)]);
    let opaque = shop.schema().method("opaque").expect("it is listed");
    assert_eq!((&opaque.parameters, opaque.signature()), (&None, "opaque".to_owned()));
    let three = soon(shop.call("opaque", json!([[1, 2, 3]])).expect("it is not checked")).await;
    assert_eq!(three.expect("a result"), json!(3));
    let why = refused(&shop, "opaque", json!({"bytes": [1]}));
    assert_eq!(why, "`shop.v1` tells no schema of `opaque`: give its arguments as an array, such as [2, 3]");
    let unknown = soon(shop.call("absent", json!([])).expect("the service knows its methods best")).await;
    assert!(matches!(&unknown, Err(CallError::Failed(Error::Fault(fault))) if fault.code == Code::Unimplemented));
}

#[tokio::test]
async fn the_schema_of_a_service_tells_its_methods_and_the_types_that_they_share() {
    let scene = Scene::new();
    let server = scene.serve(ShopServer::new(Counting::default())).await;
    let client = scene.client().await;
    let schema = soon(client.registry().schema("shop.v1")).await.expect("it tells");
    assert_eq!((schema.service.as_str(), schema.instance.as_str()), ("shop.v1", server.instance()));
    let signatures: Vec<_> = schema.methods.iter().map(|method| method.signature()).collect();
    let total = "total(order: Order, discount: integer | null) -> integer, or error ShopError";
    assert_eq!(signatures, ["note(type: string)", "opaque", total]);
    assert_eq!(schema.definitions.keys().collect::<Vec<_>>(), ["Line", "Order", "ShopError"]);
    assert_eq!(schema.definitions["Order"]["required"], json!(["lines"]), "as a reader takes it");
    let kept = serde_json::to_string(&schema).expect("JSON");
    let kept = Dynamic::new(&client, serde_json::from_str(&kept).expect("it is read again"));
    assert!(soon(kept.call("total", json!([{"lines": []}])).expect("it fits")).await.is_err(), "nothing costs nothing");
}

#[tokio::test]
async fn a_service_without_a_trait_tells_the_types_that_it_is_given() {
    let scene = Scene::new();
    let add = |_: Context, (a, b): (i64, i64)| async move { Ok::<_, Fault>(a + b) };
    let method = Method::new("add").schema::<(i64, i64), i64, ()>(&["a", "b"]);
    let _server = scene.serve(Service::new("sums", 2).method(method, add)).await;
    let client = scene.client().await;
    let sums = dynamic(&client, "sums.v2").await;
    assert_eq!(sums.schema().methods[0].signature(), "add(a: integer, b: integer) -> integer");
    let sum = soon(sums.call("add", json!({"b": 3, "a": 2})).expect("it fits")).await;
    assert_eq!(sum.expect("a result"), json!(5));
    let method = Method::new("add").schema::<(i64, i64), i64, ()>(&["a"]);
    let server = scene.server().await.serve(Service::new("sums", 3).method(method, add));
    let refused = server.start().await.expect_err("a name is missing").to_string();
    assert!(refused.contains("`add` takes 2 arguments, and names 1 of them"), "{refused}");
}

#[tokio::test]
async fn an_instance_that_tells_no_schema_is_called_unchecked() {
    let scene = Scene::new();
    let server = scene.server().await.serve(MathServer::new(Calculator));
    let _server = server.allow(|_, method| !method.contains(".hopline.")).start().await.expect("it can be served");
    let client = scene.client().await;
    let refused_to_tell = soon(client.registry().schema("math")).await;
    assert!(matches!(&refused_to_tell, Err(Error::Fault(fault)) if fault.code == Code::PermissionDenied));
    let math = dynamic(&client, "math").await;
    assert_eq!(soon(math.call("add", json!([2, 3])).expect("unchecked")).await.expect("a result"), json!(5));
    assert!(refused(&math, "add", json!({"a": 2})).starts_with("`math` tells no schema of `add`"));
}

#[tokio::test]
async fn nobody_to_ask_is_told_at_once() {
    let scene = Scene::new();
    let client = scene.client().await;
    let outcome = soon(client.dynamic("absent")).await;
    assert!(matches!(outcome, Err(Error::NoService { .. })), "{outcome:?}");
}

#[tokio::test]
async fn a_service_of_a_thousand_methods_tells_its_schema() {
    let scene = Scene::new();
    let nothing = |_: Context, _: (Order,)| async { Ok::<_, Fault>(()) };
    let service = (0..1000).fold(Service::new("large", 1), |service, number| {
        let method = Method::new(format!("method{number}")).schema::<(Order,), (), ShopError>(&["order"]);
        service.method(method, nothing)
    });
    let _server = scene.serve(service).await;
    let large = dynamic(&scene.client().await, "large").await;
    assert_eq!(large.schema().methods.len(), 1000);
    assert_eq!(refused(&large, "method999", json!([1])), "order must be an object, and it is 1");
}
