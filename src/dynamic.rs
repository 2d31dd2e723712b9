//! Calls without the Rust types of a service: of JSON values, checked before they are sent. Needs the cargo feature
//! `schema`.
//!
//! ```
//! use hopline::{Client, Context, Server};
//! use serde_json::json;
//!
//! #[hopline::service]
//! pub trait Demo {
//!     async fn add(&self, a: i64, b: i64) -> i64;
//! }
//! # struct Implementation;
//! # impl Demo for Implementation {
//! #     async fn add(&self, a: i64, b: i64) -> i64 { a + b }
//! # }
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let url = hopline::testing::broker();
//! # let server = Server::connect(&url).await?.serve(DemoServer::new(Implementation)).start().await?;
//! # let client = Client::connect(&url).await?;
//! let demo = client.dynamic("demo").await?;
//! // By name, or by place.
//! assert_eq!(demo.call("add", json!({"a": 2, "b": 3}))?.await?, json!(5));
//! assert_eq!(demo.call("add", json!([2, 3]))?.await?, json!(5));
//! // What does not fit is not sent.
//! let refused = demo.call("add", json!({"a": 2, "b": "x"})).expect_err("it does not fit");
//! assert_eq!(refused.to_string(), r#"b must be an integer, and it is "x""#);
//! # server.drain().await;
//! # Ok(()) }
//! ```

mod bounded;
mod check;
mod integers;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, OnceLock};

use serde_json::Value;

use self::check::Parameters;
use crate::call::{Call, Oneway};
use crate::client::Client;
use crate::document::ServiceSchema;
use crate::error::Error;

/// A service whose methods are called with JSON values. [`Client::dynamic`] makes one.
///
/// ```
/// # use std::time::Duration;
/// # async fn example(client: hopline::Client) -> Result<(), Box<dyn std::error::Error>> {
/// let demo = client.dynamic("demo").await?;
/// let sum = demo.call("add", serde_json::json!({"a": 2, "b": 3}))?.timeout(Duration::from_secs(2)).await?;
/// println!("{sum}");
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct Dynamic {
    client: Client,
    described: Arc<Described>,
}

/// A schema, and what is made of it when a method is called for the first time.
struct Described {
    schema: ServiceSchema,
    parameters: BTreeMap<String, OnceLock<Result<Parameters, String>>>,
}

impl Client {
    /// A service by its name, `name` or `name.vMAJOR`, whose methods are called with JSON values. This asks one of its
    /// instances for the schema, as [`Registry::schema`](crate::Registry::schema) does. If that instance tells none, calls
    /// can be made all the same: they are not checked, and take their arguments as an array. Needs the cargo feature
    /// `schema`.
    ///
    /// ```
    /// # async fn example(client: hopline::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// let sum = client.dynamic("demo").await?.call("add", serde_json::json!({"a": 2, "b": 3}))?.await?;
    /// println!("{sum}");
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`Registry::schema`](crate::Registry::schema), without its `Fault`.
    pub async fn dynamic(&self, service: &str) -> Result<Dynamic, Error> {
        match self.registry().schema(service).await {
            Ok(schema) => Ok(Dynamic::new(self, schema)),
            // It knows no schemas, or does not tell.
            Err(Error::Fault(_)) => {
                let schema = ServiceSchema { service: service.to_owned(), ..ServiceSchema::default() };
                Ok(Dynamic::new(self, schema))
            }
            Err(error) => Err(error),
        }
    }
}

impl Dynamic {
    /// The service that `schema` describes, such as one that was kept in a file.
    ///
    /// ```
    /// # fn example(client: hopline::Client) -> Result<(), Box<dyn std::error::Error>> {
    /// let schema = serde_json::from_str(&std::fs::read_to_string("demo.json")?)?;
    /// let demo = hopline::dynamic::Dynamic::new(&client, schema);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn new(client: &Client, schema: ServiceSchema) -> Self {
        let described = schema.methods.iter().filter(|method| method.parameters.is_some());
        let parameters = described.map(|method| (method.name.clone(), OnceLock::new())).collect();
        Self { client: client.clone(), described: Arc::new(Described { schema, parameters }) }
    }

    /// What the service takes and returns. It has no methods if the instance told nothing.
    #[must_use]
    pub fn schema(&self) -> &ServiceSchema {
        &self.described.schema
    }

    /// A call of a method, which has not been made yet: await it, or set its options before. `arguments` is an array, or
    /// an object with the argument of each parameter. The call fails with the method's own error as a JSON value.
    ///
    /// # Errors
    /// `Invalid`, if an argument does not fit the schema. It names the place, such as `order.lines[2].price`. Nothing has
    /// been sent then. Also if arguments come by name, and the schema of the method is not known.
    pub fn call(&self, method: &str, arguments: Value) -> Result<Call<Value, Value>, Error> {
        let arguments = self.checked(method, arguments)?;
        let call = self.client.call::<Value>(&self.described.schema.service, method, arguments);
        Ok(call.fails_with::<Value>())
    }

    /// A oneway call of a method, which has not been sent yet. Otherwise as [`call`](Self::call).
    ///
    /// ```
    /// # async fn example(demo: hopline::dynamic::Dynamic) -> Result<(), hopline::Error> {
    /// demo.oneway("note", serde_json::json!({"line": "hello"}))?.send().await
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn oneway(&self, method: &str, arguments: Value) -> Result<Call<Oneway>, Error> {
        let arguments = self.checked(method, arguments)?;
        Ok(self.client.oneway(&self.described.schema.service, method, arguments))
    }

    /// The arguments as they are sent: an array, in which each fits its parameter.
    ///
    /// ```
    /// # fn example(demo: hopline::dynamic::Dynamic) -> Result<(), hopline::Error> {
    /// let arguments = demo.checked("add", serde_json::json!({"b": 3, "a": 2}))?;
    /// assert_eq!(arguments, [2, 3]);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`call`](Self::call).
    pub fn checked(&self, method: &str, arguments: Value) -> Result<Vec<Value>, Error> {
        let service = &self.described.schema.service;
        let Some(parameters) = self.described.parameters.get(method) else {
            return match arguments {
                Value::Array(arguments) => Ok(arguments),
                _ => Err(Error::Invalid(format!(
                    "`{service}` tells no schema of `{method}`: give its arguments as an array, such as [2, 3]"
                ))),
            };
        };
        let parameters = parameters.get_or_init(|| Parameters::new(&self.described.schema, method));
        let checked = parameters.as_ref().map_err(String::clone).and_then(|parameters| parameters.checked(arguments));
        checked.map_err(Error::Invalid)
    }
}

impl fmt::Debug for Dynamic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dynamic").field("service", &self.described.schema.service).finish_non_exhaustive()
    }
}
