//! The attribute of the `hopline` crate: from a service trait to its server and its client.
//!
//! Use it as `#[hopline::service]`; this crate has no other purpose.

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
///   `impl Future + Send`; an implementation writes plain `async fn`, and what it awaits must be `Send`.
///   A method with a body is a default, and asks for `Self: Sync`. When a call's caller gives up, or its deadline passes,
///   that future is dropped at the `.await` where it is, and what comes after is not run: see `finishes` below.
/// - `CalculatorServer::new(implementation)`, for an implementation that is `Send + Sync + 'static`: a
///   `hopline::Service`, which a `hopline::Server` serves.
/// - `CalculatorClient::new(&client)`, with a method for each of the trait's. It returns a `hopline::Call`, which
///   does nothing until it is awaited, started or sent. `-> T` gives `Call<T>`, `-> Result<T, E>` gives
///   `Call<T, E>`, which fails with `hopline::CallError<E>`, and a oneway method gives `Call<Oneway>`. `Call<T>` is
///   `Call<T, hopline::Fault>`, by whatever name `Fault` goes, and fails with `hopline::Error`.
///
/// Both types have the trait's visibility. `#[cfg]`, `#[deprecated]`, `#[allow]` and docs of a method hold for its
/// client method too, and a method that `#[cfg]` leaves out is not served.
///
/// # Options of the trait
///
/// `#[hopline::service(name = "calculator", version = 2)]`
///
/// | option | meaning | default |
/// | --- | --- | --- |
/// | `name = "..."` | the service's name on the broker: `[A-Za-z0-9_-]+`, at most 64 bytes | the trait's name in `snake_case` |
/// | `version = N` | its major version, 1 or more; versions are separate services, which can run side by side | 1 |
///
/// # Options of a method
///
/// `#[rpc(idempotent, timeout = "500ms")]`
///
/// | option | meaning | default |
/// | --- | --- | --- |
/// | `idempotent` | running it twice does no harm: it is tried again when a server or the connection is lost | not tried again |
/// | `finishes` | a handler that has begun runs to its end, though its caller gives up or the deadline passes: for work that must not stay half done, see `hopline::Method::finishes` | it is dropped where it waits |
/// | `oneway` | there is no answer; the broker keeps the call until a server has run it, at least once. It fails by a panic, or by an error if it returns `Result<(), E>`, and is then tried again | a call with an answer |
/// | `attempts = N` | how often a oneway call is tried, the first time included, before it goes to the dead letters | 8 |
/// | `pause = "..."` | how long a oneway call waits after its first failed attempt, twice as long after each other, up to 30 s: a whole number of `ms`, `s` or `m` | `500ms`: with 8 attempts 61.5 s in all |
/// | `dedup = "..."` | for this time after a call has ended, another delivery of it to the same instance gets the first reply without running, and while it runs, waits for that; a oneway call that ended well is not run again. Instances remember in memory, each for itself: see `hopline::Method::dedup` | each delivery runs |
/// | `timeout = "..."` | how long a call may take, unless the caller says otherwise: a whole number of `ms`, `s` or `m` | the client's timeout |
/// | `name = "..."` | the method's name on the wire: `[A-Za-z0-9_-]+`, at most 64 bytes | the method's name, without `r#` |
///
/// # Arguments and results
///
/// Arguments are at most 16 plain names with owned types that serde writes and reads: `String`, not `&str`. They
/// travel as one array, in the order of declaration. A first argument `&Context` is not one of them: the server
/// passes it in, with the deadline and the cancellation of the call.
///
/// A method may get an argument more at its end, if that is an `Option` or a struct of which every field is one or has a
/// `#[serde(default)]`: for callers that do not know of it, it is absent. Servers are to know of it first.
///
/// What serde cannot bring back in every serialization:
///
/// - `Some` of what is null itself arrives as `None`: `Some(())`, `Some(None)`, `Some(serde_json::Value::Null)`. `Option<()>` and
///   `Option<Option<T>>` are refused where they are written.
/// - `u128` and `i128` beyond 64 bits do not go through CBOR, the default.
/// - In JSON, NaN and infinite floats become null, which no float reads, and maps have keys that are text, numbers or `bool`s.
/// - What nests deeper than 127 levels is refused.
///
/// What serde writes in a form of its own for people, such as an `IpAddr`, has that form in all of them.
///
/// The macro sees names, not types. So a fallible method returns `Result<T, E>`, with both types written out, and
/// an argument type `Context` is always hopline's.
///
/// # Errors
///
/// What cannot be a service does not compile; each error points at the spot and says what to write instead. These
/// are refused: anything but a plain trait of `async fn`s with `&self`; type parameters, lifetimes and `where`
/// clauses; borrowed or `impl Trait` arguments and results; an `Option` of what is null too; a method called `new`; two
/// methods with one wire name; a oneway method with a result, a timeout, `idempotent` or `finishes`, and another one with
/// `attempts` or `pause`; unknown, repeated or malformed options.
#[proc_macro_attribute]
pub fn service(options: TokenStream, item: TokenStream) -> TokenStream {
    parse::service(options.into(), item.into())
        .map(|service| expand::service(&service))
        .unwrap_or_else(syn::Error::into_compile_error)
        .into()
}
