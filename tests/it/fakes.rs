//! Services that a test does not have: what they answer, and what they know of those who asked.

use std::panic::AssertUnwindSafe;
use std::time::Duration;

use futures::FutureExt as _;
use hopline::testing::{self, Fake};
use hopline::{CallError, Client, Code, Codec, Error, Fault, Method};
use serde::{Deserialize, Serialize};

use crate::support::{MathClient, MathError, code, soon};

/// What a panic says.
fn said(panicked: Box<dyn std::any::Any + Send>) -> String {
    panicked.downcast::<String>().map(|said| *said).expect("a message that was put together")
}

#[tokio::test(start_paused = true)]
async fn a_fake_answers_the_client_of_a_trait_as_it_is_told() {
    let broker = testing::broker();
    let math = Fake::new("math", 1)
        .returns("add", 5_i64)
        .fails("div", MathError::DivisionByZero { dividend: 7 })
        .answers("join", |(words, separator): (Vec<String>, Option<String>)| {
            Ok::<_, Fault>(words.join(&separator.unwrap_or_default()))
        })
        .hangs("nothing")
        .serve(&broker)
        .await
        .expect("it serves");
    let client = Client::connect(&broker).await.expect("it is there");
    let calculator = MathClient::new(&client);
    assert_eq!(calculator.add(1, 2).await.expect("answered"), 5);
    match calculator.div(7, 0).await {
        Err(CallError::Service(error)) => assert_eq!(error, MathError::DivisionByZero { dividend: 7 }),
        other => panic!("{other:?}"),
    }
    let words = vec!["a".to_owned(), "b".to_owned()];
    assert_eq!(calculator.join(words.clone(), None).await.expect("answered"), "ab");
    let hung = calculator.nothing().timeout(Duration::from_secs(3600)).await;
    assert!(matches!(hung, Err(Error::Timeout { .. })), "{hung:?}");
    assert_eq!(code(calculator.panic().await), Code::Unimplemented, "it was told no answer");
    math.assert_called("add", (1_i64, 2_i64));
    math.assert_called("join", (words, None::<String>));
    math.assert_called("nothing", ());
    assert_eq!(math.calls::<(i64, i64)>("div"), [(7, 0)]);
    assert_eq!(soon(client.registry().instances("math")).await.expect("it answers")[0].instance, math.instance());
    math.drain().await;
}

#[tokio::test(start_paused = true)]
async fn answers_are_given_in_their_order_and_the_last_one_stays() {
    let broker = testing::broker();
    let unavailable = Fault::new(Code::Unavailable, "not yet");
    let fake = Fake::new("shop", 1).fails("price", unavailable).returns("price", 1_u8).returns("price", 2_u8);
    let shop = fake.serve(&broker).await.expect("it serves");
    let client = Client::connect(&broker).await.expect("it is there");
    let price = || client.call::<u8>("shop", "price", ("apple",));
    assert_eq!(code(price().await), Code::Unavailable);
    for expected in [1, 2, 2] {
        assert_eq!(price().await.expect("answered"), expected);
    }
    assert_eq!(shop.calls::<(String,)>("price").len(), 4);
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Order {
    number: u64,
    #[serde(with = "serde_bytes")]
    signature: Vec<u8>,
}

#[tokio::test(start_paused = true)]
async fn a_fake_keeps_oneway_calls_and_events_in_every_codec() {
    for codec in [Codec::Cbor, Codec::Json, Codec::MessagePack] {
        let broker = testing::broker();
        let fake = Fake::new("notes", 2).namespace("elsewhere").returns(Method::new("note").oneway(), ());
        let notes = fake.listens("order.#").serve(&broker).await.expect("it serves");
        let builder = Client::builder().namespace("elsewhere").codec(codec);
        let client = builder.connect(&broker).await.expect("it is there");
        let order = Order { number: 4711, signature: vec![0, 1, 255] };
        notes.assert_not_called("note");
        client.oneway("notes.v2", "note", (order.clone(),)).send().await.expect("the broker has it");
        assert_eq!(notes.next_call::<(Order,)>("note").await, (order.clone(),), "{codec:?}");
        notes.assert_called("note", (order.clone(),));
        client.publish("order.new", &order).await.expect("the broker has it");
        client.publish("order.new.late", &7_u64).await.expect("the broker has it");
        assert_eq!(notes.next_event::<Order>().await, ("order.new".to_owned(), order), "{codec:?}");
        assert_eq!(notes.next_event::<u64>().await, ("order.new.late".to_owned(), 7));
        assert_eq!(notes.events::<serde::de::IgnoredAny>().len(), 2);
    }
}

#[tokio::test(start_paused = true)]
async fn a_fake_says_what_was_called_when_a_test_expects_something_else() {
    let broker = testing::broker();
    let shop = Fake::new("shop", 1).returns("price", 1_u8).serve(&broker).await.expect("it serves");
    let client = Client::connect(&broker).await.expect("it is there");
    client.call::<u8>("shop", "price", ("apple",)).await.expect("answered");

    let wrong = || shop.assert_called("price", ("pear".to_owned(),));
    let wrong = std::panic::catch_unwind(AssertUnwindSafe(wrong)).expect_err("it was called otherwise");
    assert_eq!(said(wrong), r#"`price` of `shop.v1` was not called with ("pear",), but with [("apple",)]"#);
    let called = std::panic::catch_unwind(AssertUnwindSafe(|| shop.assert_not_called("price")));
    assert_eq!(said(called.expect_err("it was called")), "`price` of `shop.v1` was called, 1 times in all");
    let unknown = std::panic::catch_unwind(AssertUnwindSafe(|| shop.calls::<()>("prise")));
    let unknown = said(unknown.expect_err("there is no such method"));
    assert_eq!(unknown, "the fake of `shop.v1` has no method `prise`: say what it answers");
    let other = std::panic::catch_unwind(AssertUnwindSafe(|| shop.calls::<(String, u8)>("price")));
    assert_eq!(said(other.expect_err("other arguments")), "`price` of `shop.v1` was called with 1 arguments, not 2");
    shop.next_call::<(String,)>("price").await;
    let nothing = AssertUnwindSafe(shop.next_call::<(String,)>("price")).catch_unwind().await;
    assert_eq!(said(nothing.expect_err("nothing more comes")), "nobody called `price` of `shop.v1` within 60s");
}
