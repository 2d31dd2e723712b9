//! Fakes: a fake answers in place of a service as a test says, and remembers what it was asked.

use std::collections::BTreeMap;
use std::fmt;
use std::future::{pending, ready};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use bytes::Bytes;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::watch;

use crate::codec::{Arguments, Codec, Misfit};
use crate::context::Context;
use crate::error::{Error, Fault};
use crate::server::{Running, Server};
use crate::service::{Failure, Handler, Method, Service, arguments_of, running};

/// How long a test waits for a call or an event before it fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// A fake of a service that a test does not have. A line for each method says what it answers.
///
/// Methods have their names on the wire; for a `#[hopline::service]` these are the names in the trait. Give
/// [`Method::oneway`] for those that accept oneway calls. A method with several answers gives them in this order, one
/// to each call, and the last one to all later calls. A method without answers is refused as `UNIMPLEMENTED`.
///
/// ```
/// use hopline::testing::{self, Fake};
/// use hopline::{Client, Code, Error, Fault, Method};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), Error> {
/// let broker = testing::broker();
/// let shop = Fake::new("shop", 1)
///     .fails("price", Fault::new(Code::Unavailable, "not yet"))
///     .returns("price", 99_u32)
///     .answers("twice", |(number,): (i64,)| Ok::<_, Fault>(2 * number))
///     .returns(Method::new("note").oneway(), ())
///     .listens("order.*")
///     .serve(&broker)
///     .await?;
///
/// let client = Client::connect(&broker).await?;
/// assert!(client.call::<u32>("shop", "price", ("apple",)).await.is_err());
/// assert_eq!(client.call::<u32>("shop", "price", ("pear",)).await?, 99);
/// assert_eq!(client.call::<i64>("shop", "twice", (21,)).await?, 42);
/// client.oneway("shop", "note", ("closed on Monday",)).send().await?;
/// client.publish("order.new", &4711).await?;
///
/// assert_eq!(shop.calls::<(String,)>("price"), [("apple".to_owned(),), ("pear".to_owned(),)]);
/// assert_eq!(shop.next_call::<(String,)>("note").await.0, "closed on Monday");
/// assert_eq!(shop.next_event::<u64>().await, ("order.new".to_owned(), 4711));
/// # Ok(()) }
/// ```
#[derive(Debug)]
#[must_use = "it answers nobody before `.serve()`"]
pub struct Fake {
    service: Service,
    namespace: Option<String>,
    methods: BTreeMap<String, (Method, Script)>,
    patterns: Vec<String>,
}

/// What a method answers: to the first call, to the second, and so on. The last answer is for all later calls.
struct Script(Vec<Handler>);

impl fmt::Debug for Script {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} answers", self.0.len())
    }
}

impl Fake {
    /// A fake of the service with this name and major version. It has no methods yet.
    pub fn new(service: &str, version: u32) -> Self {
        Self {
            service: Service::new(service, version),
            namespace: None,
            methods: BTreeMap::new(),
            patterns: Vec::new(),
        }
    }

    /// Sets the namespace. Default: that of [`Server::connect`].
    pub fn namespace(mut self, namespace: &str) -> Self {
        self.namespace = Some(namespace.to_owned());
        self
    }

    /// Makes the method return `result`, whatever its arguments are.
    pub fn returns<R: Serialize + Clone + Send + Sync + 'static>(self, method: impl Into<Method>, result: R) -> Self {
        self.add(method.into(), running(ignored, move |_, ()| ready(Ok::<_, Fault>(result.clone()))))
    }

    /// Makes the method fail with `failure`: an error of its own, as the trait declares it, or a [`Fault`].
    ///
    /// ```
    /// use hopline::testing::{self, Fake};
    /// use hopline::{CallError, Client, Error};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Error> {
    /// let broker = testing::broker();
    /// let _bank = Fake::new("bank", 1).fails("withdraw", "no money".to_owned()).serve(&broker).await?;
    /// let client = Client::connect(&broker).await?;
    /// let failed = client.call::<()>("bank", "withdraw", (100,)).fails_with::<String>().await;
    /// assert!(matches!(failed, Err(CallError::Service(why)) if why == "no money"));
    /// # Ok(()) }
    /// ```
    pub fn fails<E: Failure + Clone + Send + Sync + 'static>(self, method: impl Into<Method>, failure: E) -> Self {
        self.add(method.into(), running(ignored, move |_, ()| ready(Err::<(), _>(failure.clone()))))
    }

    /// Makes the method answer what `answer` returns for its [arguments](Arguments), which are one tuple.
    pub fn answers<A, R, E>(
        self,
        method: impl Into<Method>,
        answer: impl Fn(A) -> Result<R, E> + Send + Sync + 'static,
    ) -> Self
    where
        A: Arguments + Send + 'static,
        R: Serialize + Send + 'static,
        E: Failure + Send + 'static,
    {
        let method = method.into();
        let read = arguments_of(&method);
        self.add(method, running(read, move |_, arguments| ready(answer(arguments))))
    }

    /// The method never answers: its callers wait for their deadlines.
    ///
    /// ```
    /// # use hopline::testing::{self, Fake};
    /// # use hopline::{Client, Error};
    /// use std::time::Duration;
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), Error> {
    /// # let broker = testing::broker();
    /// let _slow = Fake::new("slow", 1).hangs("work").serve(&broker).await?;
    /// # let client = Client::connect(&broker).await?;
    /// let late = client.call::<()>("slow", "work", ()).timeout(Duration::from_millis(1)).await;
    /// assert!(matches!(late, Err(Error::Timeout { .. })));
    /// # Ok(()) }
    /// ```
    pub fn hangs(self, method: impl Into<Method>) -> Self {
        self.add(method.into(), running(ignored, |_, ()| pending::<Result<(), Fault>>()))
    }

    /// Subscribes to the events whose key matches this pattern: see [`Server::subscribe`].
    pub fn listens(mut self, pattern: &str) -> Self {
        self.patterns.push(pattern.to_owned());
        self
    }

    fn add(mut self, method: Method, answer: Handler) -> Self {
        let (name, answers) = (method.name.clone(), Script(Vec::new()));
        self.methods.entry(name).or_insert((method, answers)).1.0.push(answer);
        self
    }

    /// Serves the fake on a [`broker`](super::broker) or any other, until what this returns is dropped.
    ///
    /// # Errors
    /// As [`Server::connect`] and [`Server::start`].
    pub async fn serve(self, url: impl AsRef<str>) -> Result<FakeServer, Error> {
        let heard = Arc::new(Overheard::default());
        let name = self.service.id.as_ref().map(ToString::to_string).unwrap_or_default();
        let mut service = self.service;
        for (method, answers) in self.methods.into_values() {
            heard.lock().calls.insert(method.name.clone(), Vec::new());
            let handler = heard.clone().keeping(method.name.clone(), answers);
            service = service.add(method, handler);
        }
        let builder = Server::builder();
        let builder = match &self.namespace {
            Some(namespace) => builder.namespace(namespace),
            None => builder,
        };
        let mut server = builder.connect(url).await?.serve(service);
        for pattern in &self.patterns {
            let heard = heard.clone();
            server = server.subscribe(pattern.as_str(), move |context: Context, event: serde_cbor::Value| {
                heard.keep(|book| book.events.push((context.method().to_owned(), event)));
                ready(())
            });
        }
        Ok(FakeServer { name, heard, told: Mutex::default(), running: server.start().await? })
    }
}

/// Reads no arguments, for answers that do not depend on them.
fn ignored(_: &Context, _: Codec, _: &[u8]) -> Result<(), String> {
    Ok(())
}

/// What a fake has heard. Those who wait for more are woken.
#[derive(Debug, Default)]
struct Overheard {
    book: Mutex<Book>,
    more: watch::Sender<()>,
}

/// The calls and events that a fake has heard.
#[derive(Debug, Default)]
struct Book {
    /// The payload of each call, by method.
    calls: BTreeMap<String, Vec<(Codec, Bytes)>>,
    events: Vec<(String, serde_cbor::Value)>,
}

impl Overheard {
    fn lock(&self) -> MutexGuard<'_, Book> {
        self.book.lock().expect("no panic while holding the book")
    }

    fn keep(&self, keep: impl FnOnce(&mut Book)) {
        keep(&mut self.lock());
        self.more.send_replace(());
    }

    /// A handler that notes each call before it answers.
    fn keeping(self: Arc<Self>, method: String, answers: Script) -> Handler {
        Arc::new(move |context, codec, payload| {
            let mut number = 0;
            self.keep(|book| {
                let calls = book.calls.entry(method.clone()).or_default();
                number = calls.len();
                calls.push((codec, payload.clone()));
            });
            let answer = &answers.0[number.min(answers.0.len() - 1)];
            answer(context, codec, payload)
        })
    }
}

/// A [`Fake`] that serves, and what it was asked. It ends when this is dropped.
///
/// ```
/// use hopline::Client;
/// use hopline::testing::{self, Fake};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), hopline::Error> {
/// let broker = testing::broker();
/// let shop = Fake::new("shop", 1).returns("price", 42_u64).serve(broker.url()).await?;
/// let client = Client::connect(&broker).await?;
/// assert_eq!(client.call::<u64>("shop", "price", (7,)).await?, 42);
/// shop.assert_called("price", (7,));
/// # Ok(()) }
/// ```
#[derive(Debug)]
pub struct FakeServer {
    name: String,
    heard: Arc<Overheard>,
    /// How many calls of each method, and how many events, [`FakeServer::next_call`] and [`FakeServer::next_event`]
    /// have returned.
    told: Mutex<BTreeMap<Option<String>, usize>>,
    running: Running,
}

impl FakeServer {
    /// The arguments of all calls of a method so far, in the order of arrival: requests, oneway calls and broadcasts. A
    /// request that was answered is among them. To wait for others, use [`FakeServer::next_call`].
    ///
    /// # Panics
    /// If the fake has no such method, or the arguments are of another type.
    #[must_use]
    pub fn calls<A: Arguments>(&self, method: &str) -> Vec<A> {
        self.kept(method).iter().map(|call| self.read(method, call)).collect()
    }

    /// Waits for the next call of a method that this has not returned yet. Returns its arguments.
    ///
    /// # Panics
    /// If none comes within a minute of tokio's time, if the fake has no such method, or if the arguments are of
    /// another type.
    pub async fn next_call<A: Arguments>(&self, method: &str) -> A {
        let next = |told| self.kept(method).get(told).map(|call| self.read(method, call));
        match self.next(Some(method.to_owned()), next).await {
            Some(call) => call,
            None => panic!("nobody called `{method}` of `{}` within {PATIENCE:?}", self.name),
        }
    }

    /// All events so far, each with its key.
    ///
    /// # Panics
    /// If one of them cannot be read as `T`.
    #[must_use]
    pub fn events<T: DeserializeOwned>(&self) -> Vec<(String, T)> {
        self.heard.lock().events.clone().into_iter().map(read_event).collect()
    }

    /// Waits for the next event that this has not returned yet. Returns its key and the event.
    ///
    /// # Panics
    /// If none comes within a minute of tokio's time, or it cannot be read as `T`.
    pub async fn next_event<T: DeserializeOwned>(&self) -> (String, T) {
        let next = |told| self.heard.lock().events.get(told).cloned();
        match self.next(None, next).await {
            Some(event) => read_event(event),
            None => panic!("no event came within {PATIENCE:?}"),
        }
    }

    /// Asserts that a method was called with these arguments, at least once.
    ///
    /// # Panics
    /// If it was not. The message tells the arguments with which it was called.
    #[track_caller]
    pub fn assert_called<A: Arguments + PartialEq + fmt::Debug>(&self, method: &str, arguments: A) {
        let calls = self.calls::<A>(method);
        assert!(
            calls.contains(&arguments),
            "`{method}` of `{}` was not called with {arguments:?}, but with {calls:?}",
            self.name
        );
    }

    /// That a method was not called at all.
    ///
    /// # Panics
    /// If it was. The message tells how often.
    #[track_caller]
    pub fn assert_not_called(&self, method: &str) {
        let calls = self.kept(method).len();
        assert!(calls == 0, "`{method}` of `{}` was called, {calls} times in all", self.name);
    }

    /// The id of the server that plays the service: what [`Call::to`](crate::Call::to) takes.
    #[must_use]
    pub fn instance(&self) -> &str {
        self.running.instance()
    }

    /// Drains the server, as [`Running::drain`] does, so that others may take the calls that wait.
    pub async fn drain(self) {
        self.running.drain().await;
    }

    /// The next of something that has not been told, once it is there.
    async fn next<T>(&self, what: Option<String>, next: impl Fn(usize) -> Option<T>) -> Option<T> {
        let mut more = self.heard.more.subscribe();
        let until = tokio::time::Instant::now() + PATIENCE;
        loop {
            {
                let mut told = self.told.lock().expect("no panic while holding what was told");
                let told = told.entry(what.clone()).or_default();
                if let Some(next) = next(*told) {
                    *told += 1;
                    return Some(next);
                }
            }
            tokio::time::timeout_at(until, more.changed()).await.ok()?.ok()?;
        }
    }

    #[track_caller]
    fn kept(&self, method: &str) -> Vec<(Codec, Bytes)> {
        let calls = self.heard.lock().calls.get(method).cloned();
        match calls {
            Some(calls) => calls,
            None => panic!("the fake of `{}` has no method `{method}`: say what it answers", self.name),
        }
    }

    #[track_caller]
    fn read<A: Arguments>(&self, method: &str, (codec, payload): &(Codec, Bytes)) -> A {
        match codec.arguments(payload) {
            Ok(arguments) => arguments,
            Err(Misfit::Count { takes, got }) => {
                panic!("`{method}` of `{}` was called with {got} arguments, not {takes}", self.name)
            }
            Err(Misfit::Other(why)) => panic!("the arguments of `{method}` of `{}` {why}", self.name),
        }
    }
}

fn read_event<T: DeserializeOwned>((key, event): (String, serde_cbor::Value)) -> (String, T) {
    match serde_cbor::value::from_value(event) {
        Ok(event) => (key, event),
        Err(error) => panic!("the event `{key}` is something else: {error}"),
    }
}
