//! `hopline generate`: what it writes is compiled here, and used. scripts/test has the Python and the TypeScript checked.
//!
//! `cli/tests/generated` holds what it writes. After a change that is meant, `HOPLINE_WRITE_GENERATED=1 cargo test -p
//! hopline-cli --all-features --test generate` writes it anew.

use std::fs;
use std::path::PathBuf;

use hopline::{CallError, Client, Server, testing};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

mod command;

use command::{hopline, is_refused, printed, said};

/// The service whose schema the code is generated from.
mod origin {
    use std::collections::BTreeMap;

    use super::*;

    #[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
    pub(super) struct Order {
        pub(super) lines: Vec<Line>,
        #[serde(default)]
        pub(super) express: bool,
        pub(super) note: Option<String>,
        pub(super) labels: BTreeMap<String, u8>,
    }

    #[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
    pub(super) struct Line {
        #[serde(rename = "type")]
        pub(super) kind: Kind,
        #[serde(rename = "unitPrice")]
        pub(super) unit_price: u32,
        pub(super) size: (f64, f64),
        /// What comes with it.
        pub(super) extra: Option<Box<Line>>,
    }

    #[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
    pub(super) enum Kind {
        Book,
        /// To eat.
        Food,
    }

    #[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
    pub(super) enum ShopError {
        Closed,
        TooMuch { limit: u32 },
        Unknown(String),
    }

    #[hopline::service(version = 2)]
    pub(super) trait Shop {
        #[rpc(idempotent, timeout = "2s")]
        async fn total(&self, order: Order, discount: Option<u32>) -> Result<u32, ShopError>;
        async fn add(&self, a: i64, b: i64) -> i64;
        #[rpc(oneway)]
        async fn note(&self, line: String);
        #[rpc(name = "last-order")]
        async fn last_order(&self) -> Option<Order>;
        async fn opaque(&self, bytes: serde_bytes::ByteBuf);
    }

    pub(super) struct Implementation;

    impl Shop for Implementation {
        async fn total(&self, order: Order, discount: Option<u32>) -> Result<u32, ShopError> {
            let prices = order.lines.iter().flat_map(|line| [Some(line), line.extra.as_deref()]).flatten();
            match prices.map(|line| line.unit_price).sum::<u32>() - discount.unwrap_or_default() {
                0 => Err(ShopError::Closed),
                100.. => Err(ShopError::TooMuch { limit: 99 }),
                _ if order.express => Err(ShopError::Unknown("express".to_owned())),
                sum => Ok(sum),
            }
        }
        async fn add(&self, a: i64, b: i64) -> i64 {
            a + b
        }
        async fn note(&self, _: String) {}
        async fn last_order(&self) -> Option<Order> {
            None
        }
        async fn opaque(&self, _: serde_bytes::ByteBuf) {}
    }
}

/// The trait that was generated.
#[allow(dead_code, unreachable_pub, reason = "the tests use a part of it, and it is meant for a file of its own")]
mod shop {
    include!("generated/shop.rs");
}

/// The same from a schema that is made to break out of the code. That it compiles is what is tested.
#[allow(dead_code, unreachable_pub, reason = "nobody calls it")]
mod hostile {
    include!("generated/hostile.rs");
}

fn kept(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/generated").join(name)
}

/// Fails if a file is not what it should be, or writes it.
#[track_caller]
fn same(name: &str, written: &str) {
    let file = kept(name);
    if std::env::var_os("HOPLINE_WRITE_GENERATED").is_some() {
        return fs::write(file, written).expect("it can be written");
    }
    let kept = fs::read_to_string(&file).expect("it is there");
    assert_eq!(written, kept, "{name} is not what is generated: see the head of this file");
}

/// A broker in memory, with the service that the code is generated from.
async fn served() -> (Server, testing::Broker) {
    let broker = testing::broker();
    let server = Server::connect(&broker.to_string()).await.expect("it is there");
    (server.serve(origin::ShopServer::new(origin::Implementation)), broker)
}

#[tokio::test]
async fn the_code_that_is_kept_is_the_code_that_is_generated() {
    let (server, broker) = served().await;
    let _server = server.start().await.expect("it can be served");
    let client = Client::connect(&broker.to_string()).await.expect("it is there");
    let schema = client.registry().schema("shop.v2").await.expect("it tells");
    let mut schema = serde_json::to_value(schema).expect("JSON");
    schema["instance"] = "".into();
    same("shop.json", &format!("{schema:#}\n"));
    for name in ["shop", "hostile"] {
        for (language, end) in [("rust", "rs"), ("python", "py"), ("typescript", "ts")] {
            let from = kept(&format!("{name}.json"));
            let output = hopline(&["generate", language, "--from", &from.to_string_lossy()]).output();
            let code = printed(output.expect("it can be run"));
            assert!(code.chars().all(|c| c == '\n' || matches!(c, ' '..='~')), "nothing steers a terminal: {code}");
            same(&format!("{name}.{end}"), &format!("{code}\n"));
        }
    }
}

#[tokio::test]
async fn the_client_that_is_generated_calls_the_service_that_it_was_generated_from() {
    use shop::{Kind, Line, Order, ShopError};

    let (server, broker) = served().await;
    let _server = server.start().await.expect("it can be served");
    let client = Client::connect(&broker.to_string()).await.expect("it is there");
    let shop = shop::ShopClient::new(&client);
    assert_eq!(shop.add(2, 3).await.expect("a sum"), 5);
    let line = |price| Line { r#type: Kind::Food, unit_price: price, size: (1.0, 2.5), extra: None };
    let with_extra = Line { extra: Some(Box::new(line(4))), ..line(3) };
    let order = Order { lines: vec![with_extra], express: None, note: None, labels: [("a".to_owned(), 1)].into() };
    assert_eq!(shop.total(order.clone(), Some(2)).await.expect("a sum"), 5);
    let outcome = shop.total(Order { lines: vec![line(500)], ..order.clone() }, None).await;
    let Err(CallError::Service(ShopError::TooMuch(too_much))) = outcome else { panic!("too much: {outcome:?}") };
    assert_eq!(too_much.limit, 99);
    let outcome = shop.total(Order { express: Some(true), ..order.clone() }, None).await;
    assert!(matches!(&outcome, Err(CallError::Service(ShopError::Unknown(what))) if what == "express"), "{outcome:?}");
    let outcome = shop.total(Order { lines: vec![], ..order }, None).await;
    assert!(matches!(&outcome, Err(CallError::Service(ShopError::Closed))), "{outcome:?}");
    assert_eq!(shop.last_order().await.expect("none"), None);
    shop.note("hello".to_owned()).send().await.expect("the broker has it");
}

#[test]
fn code_is_no_json() {
    is_refused(&["generate", "rust", "demo", "--json"], "unexpected argument '--json'");
}

#[test]
fn what_cannot_be_generated_says_why() {
    let directory = std::env::temp_dir().join(format!("hopline-generate-{}", std::process::id()));
    fs::create_dir_all(&directory).expect("it can be made");
    for (number, (text, code, told)) in [
        (r#"{"service": "a b"}"#, 1, "the service `a b` has a ' ' in it"),
        (r#"{"service": "a", "methods": [{"name": "x\n"}]}"#, 1, "the method `x"),
        ("[", 2, "is no schema: EOF"),
    ]
    .into_iter()
    .enumerate()
    {
        let file = directory.join(format!("{number}.json"));
        fs::write(&file, text).expect("it can be written");
        let output = hopline(&["generate", "rust", "--from", &file.to_string_lossy()]).output().expect("it can be run");
        assert_eq!((output.status.code(), &output.stdout[..]), (Some(code), &b""[..]), "{output:?}");
        assert!(said(&output).contains(told), "{output:?}");
    }
    fs::remove_dir_all(directory).expect("it can be removed");
    let output = hopline(&["generate", "rust"]).output().expect("it can be run");
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    let help = printed(hopline(&["generate", "--help"]).output().expect("it can be run"));
    assert!(help.contains("  hopline generate rust demo"), "{help}");
}
