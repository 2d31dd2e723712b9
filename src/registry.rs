//! Discovery from the client's side: a client asks the instances, and each that is up replies for itself. Nothing keeps
//! a list of them. `registry/watch.rs` follows what changes.

mod follow;
mod instance_watch;
mod queues;
mod tap;
mod watch;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use tokio::time::Instant;

pub(crate) use self::follow::follow;
pub use self::queues::ServiceQueues;
pub use self::watch::Change;
#[cfg(feature = "schema")]
use crate::client::Absent;
use crate::client::{ArgumentWriter, Client, Request, Target};
use crate::clock::later;
use crate::codec::CodecError;
#[cfg(feature = "schema")]
use crate::document::ServiceSchema;
use crate::document::{DRAIN, Document, Instance, InstanceStats, PING, Typed};
#[cfg(feature = "schema")]
use crate::error::Code;
use crate::error::Error;
use crate::exchanges::Recipients;
use crate::middleware::Reply;
use crate::state::State;
use crate::topology::ServiceId;

/// How long a registry waits in all for instances to reply.
const TOTAL: Duration = Duration::from_secs(2);
/// How long it waits for the next reply after one has come.
const STALL: Duration = Duration::from_millis(250);

/// Who serves what, as the instances say themselves when they are asked. [`Client::registry`] makes one.
///
/// Nobody knows beforehand how many instances will reply. So asking ends when
/// - nobody has replied for the [stall time](Self::stall) after a reply,
/// - or the [known number](Self::count) has replied,
/// - or the [total time](Self::total) is over,
///
/// and at once if the broker knows that nobody is there.
///
/// ```
/// # use std::time::Duration;
/// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
/// for (service, instances) in client.registry().services().await? {
///     println!("{service} has {} instances", instances.len());
/// }
/// // Three are there: this returns as soon as they have replied.
/// let three = client.registry().count(3).stall(Duration::MAX).instances("demo").await?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct Registry {
    client: Client,
    total: Duration,
    stall: Duration,
    count: Option<usize>,
}

/// An instance that has replied to a [ping](Registry::ping).
///
/// ```
/// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
/// for pong in client.registry().ping("demo").await? {
///     println!("{} replies after {:?}", pong.instance, pong.round_trip);
/// }
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Pong {
    /// The instance's id.
    pub instance: String,
    /// How long it took until its reply was here, and the broker had confirmed the question.
    pub round_trip: Duration,
}

impl Client {
    /// Who serves what, and how busy they are.
    #[must_use]
    pub fn registry(&self) -> Registry {
        Registry { client: self.clone(), total: TOTAL, stall: STALL, count: None }
    }
}

impl Registry {
    /// How long asking may take in all. Default: 2 s.
    #[must_use]
    pub fn total(mut self, time: Duration) -> Self {
        self.total = time;
        self
    }

    /// How long to wait for the next reply after one has come. Default: 250 ms. The first reply may take the
    /// [total time](Self::total).
    #[must_use]
    pub fn stall(mut self, time: Duration) -> Self {
        self.stall = time;
        self
    }

    /// How many instances will reply, if that is known: asking ends with the last of them. An instance replies once for
    /// each of its services. Default: unknown.
    #[must_use]
    pub fn count(mut self, instances: usize) -> Self {
        self.count = Some(instances);
        self
    }

    /// All services, each written `name.vMAJOR`, and their instances, sorted by their ids. Empty if nobody replies.
    ///
    /// A service whose instances all hang is not in it, since nobody tells its name. Who knows it asks
    /// [`queues`](Self::queues) how many read its calls.
    ///
    /// # Errors
    /// `Disconnected`, `Blocked`, `Timeout` if the broker has not confirmed the question in time, and the `Fault` of an
    /// instance if all that reply refuse to answer, for example since a [rule](crate::Server::allow) forbids it.
    pub async fn services(&self) -> Result<BTreeMap<String, Vec<Instance>>, Error> {
        let mut services: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for instance in self.documents::<Instance>(None).await? {
            services.entry(instance.service.clone()).or_default().push(instance);
        }
        Ok(services)
    }

    /// The instances of `service`, which is `name` or `name.vMAJOR`, sorted by their ids. Empty if nobody replies.
    ///
    /// # Errors
    /// As [`services`](Self::services), and `Invalid` for a name that no service can have.
    pub async fn instances(&self, service: &str) -> Result<Vec<Instance>, Error> {
        self.documents(Some(service)).await
    }

    /// How busy the instances of `service` are, sorted by their ids.
    ///
    /// # Errors
    /// As [`instances`](Self::instances).
    pub async fn stats(&self, service: &str) -> Result<Vec<InstanceStats>, Error> {
        self.documents(Some(service)).await
    }

    /// How busy the instances of all services are, sorted by service and instance.
    ///
    /// # Errors
    /// As [`services`](Self::services).
    pub async fn all_stats(&self) -> Result<Vec<InstanceStats>, Error> {
        self.documents(None).await
    }

    /// What the methods of `service` take and return, as one of its instances says, any of them. While a new version is
    /// rolled out, another may say something else. Needs the cargo feature `schema`.
    ///
    /// ```
    /// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
    /// let schema = client.registry().schema("demo").await?;
    /// println!("{} methods", schema.methods.len());
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// `NoService` if no instance is there, a `Fault` with the code `UNIMPLEMENTED` from one that knows no schemas, and as
    /// a call: `Disconnected`, `Blocked`, `Timeout` after the [total time](Self::total), and `UnreadableReply`.
    #[cfg(feature = "schema")]
    pub async fn schema(&self, service: &str) -> Result<ServiceSchema, Error> {
        let request = self.request(ServiceSchema::QUESTION, ServiceId::parse(service), Recipients::Any);
        // Any instance may tell it, as often as it is asked, and one that is not there yet has no use.
        let request = Request { absent: Some(Absent::Fail), idempotent: true, ..request };
        match self.client.begin(request)?.await {
            Ok(reply) => read(&reply).ok_or_else(not_a::<ServiceSchema>),
            Err(Error::Fault(mut fault)) if fault.code == Code::Unimplemented => {
                let why = "knows no schemas: its server needs the cargo feature `schema` of Hopline";
                fault.message = format!("an instance of `{service}` {why}");
                Err(Error::Fault(fault))
            }
            Err(error) => Err(error),
        }
    }

    /// The instances of `service` that are there, sorted by their ids, and how long each takes to say so. No handler runs
    /// for it, and it does not wait for a place among the calls that run.
    ///
    /// # Errors
    /// As [`instances`](Self::instances).
    pub async fn ping(&self, service: &str) -> Result<Vec<Pong>, Error> {
        let (began, mut pongs) = (Instant::now(), BTreeMap::new());
        let take = |reply: &Reply| {
            let instance = reply.instance.as_deref().unwrap_or_default().to_owned();
            let before = pongs.len();
            pongs.entry(instance).or_insert_with(|| began.elapsed());
            pongs.len() > before
        };
        self.ask(PING, Some(service), take).await?;
        Ok(pongs.into_iter().map(|(instance, round_trip)| Pong { instance, round_trip }).collect())
    }

    /// The documents `D` of the instances of one service, or of all, each of them once.
    async fn documents<D: Document>(&self, service: Option<&str>) -> Result<Vec<D>, Error> {
        let mut documents = BTreeMap::new();
        let take = |reply: &Reply| {
            let Some(document) = read::<D>(reply) else { return false };
            let (service, instance) = document.source();
            documents.insert((service.to_owned(), instance.to_owned()), document).is_none()
        };
        self.ask(D::QUESTION, service, take).await?;
        Ok(documents.into_values().collect())
    }

    /// Asks the instances of one service, or of all. `take` gets each reply, and says whether it answers the question and
    /// is the first of its instance. Fails with the fault of one of them if all have refused.
    async fn ask(
        &self,
        question: &str,
        service: Option<&str>,
        mut take: impl FnMut(&Reply) -> bool,
    ) -> Result<(), Error> {
        let (service, recipients) = match service {
            Some(service) => (ServiceId::parse(service), Recipients::All),
            None => (ServiceId::new("hopline", 1), Recipients::Everywhere),
        };
        let mut replies = match self.client.ask(self.request(question, service, recipients)).await {
            Err(Error::NoService { .. }) => return Ok(()),
            replies => replies.map_err(|error| self.unless_blocked(error))?,
        };
        let (mut taken, mut stalls_at, mut refused) = (0, None, None);
        while self.count.is_none_or(|count| taken < count) {
            let reply = tokio::select! {
                biased;
                reply = replies.next() => reply,
                () = self.wait_until(stalls_at) => None,
            };
            let Some((_, reply)) = reply.transpose()? else { break };
            stalls_at = Some(later(Instant::now(), self.stall));
            match reply {
                Ok(reply) if !reply.is_own_error() && take(&reply) => taken += 1,
                Ok(_) => {}
                // Another may have a different version, or another rule.
                Err(fault) => refused = Some(fault),
            }
        }
        refused.filter(|_| taken == 0).map_or(Ok(()), Err)
    }

    /// Has one instance of `service` drain, as by a signal: see [`Server::allow_drain`](crate::Server::allow_drain). Returns
    /// when the instance has begun to.
    ///
    /// ```
    /// # async fn example(client: hopline::Client) -> Result<(), hopline::Error> {
    /// for instance in client.registry().instances("demo").await? {
    ///     client.registry().drain("demo", &instance.instance).await?;
    /// }
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// `Fault` with `PermissionDenied` if the server does not allow it to this user, and with `Unimplemented` if it runs a
    /// version of Hopline that cannot be drained from afar. `NoService` if the instance is not there. `Invalid` for a name
    /// that no service can have. `Timeout`, `Disconnected`, `Blocked`.
    pub async fn drain(&self, service: &str, instance: &str) -> Result<(), Error> {
        self.ask_one(DRAIN, service, instance).await.map(drop)
    }

    /// The document `D` of one instance of a service.
    async fn one<D: Document>(&self, service: &str, instance: &str) -> Result<D, Error> {
        let reply = self.ask_one(D::QUESTION, service, instance).await?;
        read(&reply).ok_or_else(not_a::<D>)
    }

    /// Asks one instance of a service.
    async fn ask_one(&self, question: &str, service: &str, instance: &str) -> Result<Reply, Error> {
        let request = self.request(question, ServiceId::parse(service), Recipients::One(instance.to_owned()));
        self.client.begin(request)?.await
    }

    /// Asks one instance whether it is there. This is no call of the program: no middleware sees it. An instance that would
    /// know more of the caller is there all the same, and refuses.
    async fn is_there(&self, service: &str, instance: &str) -> Result<Reply, Error> {
        let request = self.request(PING, ServiceId::parse(service), Recipients::One(instance.to_owned()));
        self.client.dispatch(request)?.await
    }

    fn request(
        &self,
        question: &str,
        service: Result<ServiceId, String>,
        recipients: Recipients,
    ) -> Request<ArgumentWriter> {
        let arguments: ArgumentWriter = Box::new(|codec, payload| codec.write::<[(); 0]>(&[], payload));
        self.request_with(question, arguments, service, recipients)
    }

    fn request_with(
        &self,
        question: &str,
        arguments: ArgumentWriter,
        service: Result<ServiceId, String>,
        recipients: Recipients,
    ) -> Request<ArgumentWriter> {
        let target = service.map(|service| Arc::new(Target::new(service, question)));
        Request { timeout: Some(self.total), recipients, ..Request::new(target, arguments) }
    }

    /// The error for a question that the broker has not confirmed in time. More time does not help while it takes nothing.
    fn unless_blocked(&self, error: Error) -> Error {
        match (error, &*self.client.state().borrow()) {
            (Error::Timeout { method, after, .. }, State::Blocked { reason, .. }) => {
                Error::Blocked { method: Some(method), reason: reason.to_string(), after, may_have_run: false }
            }
            (error, _) => error,
        }
    }

    async fn wait_until(&self, instant: Option<Instant>) {
        match instant {
            Some(instant) => self.client.timer(instant).await,
            None => std::future::pending().await,
        }
    }
}

fn not_a<D: Document>() -> Error {
    Error::UnreadableReply(CodecError(format!("the reply is no `{}`", D::TYPE)))
}

/// The document in a reply. `None` if it is another document than `D`, or unreadable.
fn read<D: Document>(reply: &Reply) -> Option<D> {
    let typed: Typed = reply.codec().decode(reply.payload()).ok()?;
    typed.is::<D>().then(|| reply.codec().decode(reply.payload()).ok())?
}
