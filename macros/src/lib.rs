//! The procedural macros of the `hopline` crate: `#[hopline::service]` makes a server and a client out of a trait, and
//! `#[hopline::event]` makes an event out of a type.
//!
//! Use them by these names. This crate has no other purpose.

mod event;
mod expand;
mod options;
mod parse;
mod refusals;
mod text;
mod types;

use proc_macro::TokenStream;

/// Makes a service out of a trait: `trait Calculator` gives `CalculatorServer` and `CalculatorClient`.
///
/// ```
/// use hopline::Context;
///
/// #[derive(Debug, serde::Serialize, serde::Deserialize)]
/// pub enum MathError {
///     DivisionByZero,
/// }
///
/// #[hopline::service]
/// pub trait Calculator {
///     /// Adds.
///     async fn add(&self, a: i64, b: i64) -> i64;
///     async fn div(&self, a: i64, b: i64) -> Result<i64, MathError>;
///     #[rpc(idempotent, timeout = "2s")]
///     async fn pi(&self, ctx: &Context, digits: u32) -> String;
///     #[rpc(oneway)]
///     async fn log(&self, line: String);
///     #[rpc(oneway, attempts = 3, pause = "2s")]
///     async fn mail(&self, line: String) -> Result<(), String>;
/// }
///
/// struct Calc;
///
/// impl Calculator for Calc {
///     async fn add(&self, a: i64, b: i64) -> i64 {
///         a + b
///     }
///     async fn div(&self, a: i64, b: i64) -> Result<i64, MathError> {
///         a.checked_div(b).ok_or(MathError::DivisionByZero)
///     }
///     async fn pi(&self, _ctx: &Context, digits: u32) -> String {
///         format!("{:.1$}", std::f64::consts::PI, digits as usize)
///     }
///     async fn log(&self, line: String) {
///         println!("{line}");
///     }
///     async fn mail(&self, line: String) -> Result<(), String> {
///         Err(format!("no mail today for {line}: try again"))
///     }
/// }
///
/// let service: hopline::Service = CalculatorServer::new(Calc);
/// ```
///
/// # What it generates
///
/// - The trait as written, without the `#[rpc]` attributes. Each `async fn` becomes a function that returns
///   `impl Future + Send`. An implementation still writes plain `async fn`, and everything that it awaits must be
///   `Send`. A method with a body is a default, and needs `Self: Sync`.
/// - `CalculatorServer::new(implementation)`: a `hopline::Service`, which a `hopline::Server` serves. The
///   implementation has to be `Send + Sync + 'static`.
/// - `CalculatorClient::new(&client)`, with a method for each of the trait's. It returns a `hopline::Call`, which does
///   nothing until it is awaited, started or sent. `-> T` gives `Call<T>`, and a oneway method gives `Call<Oneway>`.
///   `-> Result<T, E>` gives `Call<T, E>`, which fails with `hopline::CallError<E>`. If `E` is `hopline::Fault`, by
///   whatever name, that is the same type as `Call<T>`, which fails with `hopline::Error`.
///
/// When the caller of a call gives up, or its deadline passes, the server drops the handler's future at the `.await`
/// where it is, and the rest of it does not run. The option `finishes` below changes that.
///
/// Both types have the trait's visibility. `#[cfg]`, `#[deprecated]`, `#[allow]` and the docs of a method hold for its
/// client method too. A method that `#[cfg]` leaves out is not served.
///
/// # Options of the trait
///
/// `#[hopline::service(name = "calculator", version = 2)]`
///
/// | option | meaning | default |
/// | --- | --- | --- |
/// | `name = "..."` | the service's name on the broker: `[A-Za-z0-9_-]+`, at most 64 bytes | the trait's name in `snake_case` |
/// | `version = N` | its major version, 1 or more. Versions are separate services, which can run side by side | 1 |
///
/// # Options of a method
///
/// `#[rpc(idempotent, timeout = "500ms")]`
///
/// Times are written as a whole number with the unit `ms`, `s` or `m`.
///
/// | option | meaning | default |
/// | --- | --- | --- |
/// | `idempotent` | running it twice does no harm: when a server or the connection is lost, the call is run again | it is not run again |
/// | `finishes` | a handler that has begun runs to its end, even when its caller gives up or the deadline passes. For work that must not stay half done: see `hopline::Method::finishes` | it is dropped where it waits |
/// | `oneway` | there is no answer. The broker keeps the call until a server has run it, at least once. It fails if the handler panics, or returns an error where the method returns `Result<(), E>`; then it is tried again | a call with an answer |
/// | `attempts = N` | how many attempts a oneway call has, with the first one, before it becomes a dead letter | 8 |
/// | `pause = "..."` | how long a oneway call waits after its first failed attempt. Each further pause is twice as long, up to 30 s | `500ms`: 61.5 s in all with 8 attempts |
/// | `dedup = "..."` | for this time after a call has ended, another delivery or another attempt of it that comes to the same instance gets the first reply without running. While the first run goes on, it waits for its end. A oneway call that has ended well is not run again. Each instance remembers for itself, in memory: see `hopline::Method::dedup` | each delivery runs |
/// | `timeout = "..."` | how long a call may take, unless the caller sets another time | the client's timeout |
/// | `retry = N` | how many more attempts a call has if it fails, unless the caller sets another number: see `hopline::Call::retry`. Without `idempotent`, only what has certainly not run is tried again | the client's number, 0 unless set |
/// | `retry_on(...)` | the method's own errors after which a call is tried again, written as in a `match`: `retry_on(StockError::Locked)`. See `hopline::Call::retry_on`. Only with `idempotent`, and without effect unless there are retries | none |
/// | `hedge` | a call that is late gets a second attempt at another instance: see `hopline::Call::hedge`. Only with `idempotent` | the client's setting, off unless set |
/// | `fork = N` | the call goes to so many instances at once, and the first good reply wins: see `hopline::Call::fork`. Only with `idempotent` | 1 |
/// | `fail_back` | a call that has failed is left to the broker as a oneway call: see `hopline::Call::fail_back`. The service has a queue for it, and `attempts` and `pause` can be set as for a oneway method. Only with `idempotent`, and for a method that returns nothing | the error is returned |
/// | `cache = "..."` | for how long a client keeps a result, unless the caller sets another time: see `hopline::Call::cache`. Only with `idempotent` | the client's time, no cache unless set |
/// | `stale = "..."` | for how long after that an old result is still taken while a new one is on its way: see `hopline::Call::stale`. Only with `cache` | the client's time, none unless set |
/// | `name = "..."` | the method's name on the wire: `[A-Za-z0-9_-]+`, at most 64 bytes | the method's name, without `r#` |
///
/// # Arguments and results
///
/// A method has at most 16 arguments. Each is a plain name with an owned type that serde writes and reads: `String`,
/// not `&str`. They are sent as one array, in the order of declaration. A first argument `&Context` is not one of them:
/// the server passes it, with the deadline and the cancellation of the call.
///
/// A method can get one more argument at its end if its type is an `Option`, or a struct in which every field is an
/// `Option` or has `#[serde(default)]`. For callers that do not know it yet, it is absent. Update the servers first.
///
/// Some values do not come back from every codec:
///
/// - `Some` of a value that is null itself arrives as `None`: `Some(())`, `Some(None)`,
///   `Some(serde_json::Value::Null)`. `Option<()>` and `Option<Option<T>>` do not compile.
/// - CBOR, the default, carries `u128` and `i128` only up to 64 bits.
/// - JSON writes NaN and infinite floats as null, which no float reads. Its maps have keys that are text, numbers or
///   `bool`s.
/// - Values that nest deeper than 127 levels are refused.
///
/// Types such as `IpAddr`, which serde writes in another form for people, have that form in all codecs.
///
/// The macro sees names, not types. So write a fallible method as `Result<T, E>` with both types, and use the name
/// `Context` for hopline's type only.
///
/// # Errors
///
/// A trait that cannot be a service does not compile. Each error points to the code and says what to write instead.
/// These are refused:
///
/// - anything but a plain trait of `async fn`s with `&self`;
/// - type parameters, lifetimes and `where` clauses;
/// - borrowed or `impl Trait` arguments and results, and an `Option` of a type that may be null itself;
/// - a method called `new`, and two methods with one name on the wire;
/// - a oneway method with a result, a `timeout`, `idempotent`, `finishes`, `retry`, `retry_on`, `hedge`, `fork`, `fail_back`,
///   `cache` or `stale`;
/// - `cache`, `retry_on`, `hedge`, `fork` or `fail_back` on a method that is not idempotent, and `stale` without `cache`;
/// - `fail_back` on a method with a result, and `retry_on` on one without an error of its own;
/// - `attempts` or `pause` on a method that is neither oneway nor `fail_back`;
/// - unknown, repeated or malformed options.
#[proc_macro_attribute]
pub fn service(options: TokenStream, item: TokenStream) -> TokenStream {
    parse::service(options.into(), item.into())
        .map(|service| expand::service(&service))
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}

/// Makes an event out of a struct or an enum: the type gets a key and a version, on which publishers and subscribers agree.
///
/// ```
/// use hopline::{Client, Error, Event};
/// use serde::{Deserialize, Serialize};
///
/// #[hopline::event(key = "order.created", version = 2)]
/// #[derive(Serialize, Deserialize)]
/// struct OrderCreated {
///     id: u64,
///     items: Vec<String>,
/// }
///
/// async fn created(client: &Client, id: u64) -> Result<(), Error> {
///     client.emit(&OrderCreated { id, items: vec!["tea".to_owned()] }).await?;
///     Ok(())
/// }
///
/// assert_eq!(OrderCreated::KEY, "order.created");
/// # let _ = created;
/// ```
///
/// # What it generates
///
/// The type as written, and `impl hopline::Event` for it. The type has to be one that serde writes and reads: derive
/// `Serialize` and `Deserialize`, as for the types of a service.
///
/// # Options
///
/// | option | meaning | default |
/// | --- | --- | --- |
/// | `key = "..."` | what has happened: words with single dots between them, 1 to 255 bytes, without `*` and `#` | it must be written |
/// | `version = N` | which form of the event this is, 1 or more | 1 |
///
/// A subscriber that takes the type refuses an event of another version. A field that is an `Option`, or has
/// `#[serde(default)]`, can be added without a new version. Anything else needs one: publish both versions for as long as
/// there are subscribers of the old one.
///
/// # Errors
///
/// These do not compile, and the error says what to write instead: a function or anything else that is no struct or enum,
/// a generic type, a missing key or one that cannot be used, version 0, and unknown, repeated or malformed options.
#[proc_macro_attribute]
pub fn event(options: TokenStream, item: TokenStream) -> TokenStream {
    event::event(options.into(), item.into()).unwrap_or_else(syn::Error::into_compile_error).into()
}
