//! The policies of a client, as its user sets them and looks at them. What they do is in `middleware/`.

use std::sync::Arc;
use std::time::Duration;

use futures::future::BoxFuture;
use futures::{FutureExt as _, TryFutureExt as _};
use tokio::time::Instant;
use tracing::warn;

use super::request::{ArgumentWriter, Request};
use super::{Client, ClientBuilder, Target};
use crate::error::Error;
use crate::exchanges::Recipients;
use crate::middleware::{Asked, Breaker, Breakers, CacheSize, Invocation, Paced, Passed, PolicyCounts, Reply};
use crate::route::Route;
use crate::topology::ServiceId;

/// How long the broker has to confirm the oneway call that a call becomes.
const FAIL_BACK: Duration = Duration::from_secs(5);

impl ClientBuilder {
    /// How many more attempts a call has if it fails, as [`Call::retry`](crate::Call::retry) sets it for one call.
    /// Default: 0.
    ///
    /// ```
    /// # async fn example() -> Result<(), hopline::Error> {
    /// let client = hopline::Client::builder().retry(2).connect("amqp://localhost").await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn retry(mut self, retries: u32) -> Self {
        self.policies.asked.retries = retries;
        self
    }

    /// Gives idempotent calls that are late a second attempt at another instance, as [`Call::hedge`](crate::Call::hedge)
    /// does for one call. Default: off.
    ///
    /// ```
    /// # async fn example() -> Result<(), hopline::Error> {
    /// let client = hopline::Client::builder().hedge().connect("amqp://localhost").await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn hedge(mut self) -> Self {
        self.policies.asked.hedges = true;
        self
    }

    /// Puts a circuit [`Breaker`] before each method. Default: none.
    #[must_use]
    pub fn breaker(mut self) -> Self {
        self.policies.has_breakers = true;
        self
    }

    /// For how long the results of idempotent calls are kept, as [`Call::cache`](crate::Call::cache) sets it for one
    /// call. Default: zero, which means that none is kept.
    ///
    /// ```
    /// use std::time::Duration;
    ///
    /// # async fn example() -> Result<(), hopline::Error> {
    /// let client = hopline::Client::builder().cache(Duration::from_secs(5)).connect("amqp://localhost").await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn cache(mut self, time: Duration) -> Self {
        self.policies.asked.cache = time;
        self
    }

    /// For how long after that a result is still taken while a new one is on its way, as
    /// [`Call::stale`](crate::Call::stale) sets it for one call. Default: zero.
    #[must_use]
    pub fn stale(mut self, time: Duration) -> Self {
        self.policies.asked.stale = time;
        self
    }

    /// How much the [cache](crate::Call::cache) holds: so many results, and so many bytes of results and arguments. Default:
    /// 1 000 results and 16 MiB. Each result counts as at least `bytes / entries`. A result that alone is larger than
    /// `bytes` is not kept.
    #[must_use]
    pub fn cache_size(mut self, entries: usize, bytes: usize) -> Self {
        self.policies.cache_size = CacheSize { entries, bytes };
        self
    }

    /// How many calls a second are sent to `service`, which is `name` or `name.vMAJOR`: the client paces them. Default: no
    /// limit.
    ///
    /// As many calls as 100 ms have room for, and at least one, leave at once. Further calls wait for their turn, evenly
    /// spread. A call whose turn is more than 500 ms away, or after its deadline, fails at once with
    /// [`Error::Overloaded`] and has not run. Each attempt counts. Oneway calls, broadcasts and events do not; they wait in
    /// a queue of the broker. It is the rate of this client and its clones: ten clients send ten times as much.
    ///
    /// ```
    /// # async fn example() -> Result<(), hopline::Error> {
    /// let client = hopline::Client::builder().rate("search", 100).connect("amqp://localhost").await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn rate(mut self, service: impl Into<String>, per_second: u32) -> Self {
        self.policies.rates.push((service.into(), per_second));
        self
    }

    /// Checks the rates, and writes their services as `name.vMAJOR`.
    pub(super) fn check_rates(&mut self) -> Result<(), Error> {
        for (service, per_second) in &mut self.policies.rates {
            *service = ServiceId::parse(service).map_err(Error::Invalid)?.to_string();
            if *per_second == 0 {
                return Err(Error::Invalid(format!("a rate of 0 calls/s to `{service}`: give at least 1")));
            }
        }
        Ok(())
    }
}

impl Client {
    /// What the policies of this client have done.
    #[must_use]
    pub fn policies(&self) -> PolicyCounts {
        self.0.targets.called().policies()
    }

    /// The [breakers](ClientBuilder::breaker) of the methods that were called within the last seconds, and those that
    /// are open. Empty without breakers.
    #[must_use]
    pub fn breakers(&self) -> Vec<Breaker> {
        self.0.policies.breakers.as_deref().map(Breakers::all).unwrap_or_default()
    }

    /// Opens the breaker of a method for a time, by hand. `service` is `name` or `name.vMAJOR`. It concerns calls to any
    /// instance. Afterwards three calls are let through one after the other, as always.
    ///
    /// # Errors
    /// `Invalid` if a name cannot be used, or the client has no [breakers](ClientBuilder::breaker).
    pub fn open_breaker(&self, service: &str, method: &str, time: Duration) -> Result<(), Error> {
        let method = self.target(service, method).map_err(Error::Invalid)?.text.clone();
        let no_breakers = || Error::Invalid("the client has no breakers: set `ClientBuilder::breaker`".to_owned());
        self.0.policies.breakers.as_ref().ok_or_else(no_breakers)?.open(method, time);
        Ok(())
    }

    /// Closes the breakers of a method, by hand: that of calls to any instance, and those of its instances. What they
    /// have counted is forgotten.
    ///
    /// # Errors
    /// `Invalid` if a name cannot be used.
    pub fn close_breaker(&self, service: &str, method: &str) -> Result<(), Error> {
        let target = self.target(service, method).map_err(Error::Invalid)?;
        if let Some(breakers) = &self.0.policies.breakers {
            breakers.close(&target.text);
        }
        Ok(())
    }

    /// Forgets all results that the [cache](crate::Call::cache) of this client keeps, as after a change that they do not
    /// show yet. A call that was made before does not bring its result into the cache.
    pub fn forget_results(&self) {
        self.0.policies.forget_results();
    }

    /// What a call gets of what it asks of the policies. Who gives the instance has it run by no other and gets the result
    /// of no other, and what may run only once is not run by several.
    pub(crate) fn granted<P>(&self, request: &Request<P>) -> Asked {
        let asked = request.asked;
        let is_free = || {
            let route = self.route_of(request);
            let is_fixed = matches!(route.as_deref(), Some(Route::One(_) | Route::Key(_)));
            request.recipients == Recipients::Any && !is_fixed
        };
        let wants_any = asked.hedges || asked.forks > 1 || asked.caches();
        let is_free = wants_any && request.idempotent && is_free();
        Asked {
            hedges: asked.hedges && is_free,
            forks: if is_free && asked.forks > 1 { asked.forks } else { 0 },
            fails_back: asked.fails_back && request.idempotent,
            cache: if is_free { asked.cache } else { Duration::ZERO },
            ..asked
        }
    }

    /// What a call asks of the policies that asks for nothing itself.
    pub(crate) fn asked(&self) -> Asked {
        self.0.policies.settings.asked
    }

    /// A request may get another attempt at an instance that the client chooses, so it has to know them by then.
    pub(crate) fn expects<P>(&self, request: &Request<P>) {
        if let Ok(target) = &request.target
            && request.asked.hedges
        {
            self.router().expect(&target.service_text);
        }
    }

    /// Lets an attempt pass the breaker of its method, or that of its method at an instance. `None` without breakers.
    pub(super) fn pass<'c>(&'c self, target: &'c Target, to: &Recipients) -> Result<Option<Passed<'c>>, Error> {
        let Some(breakers) = &self.0.policies.breakers else { return Ok(None) };
        let instance = to.instance().map(Arc::from);
        breakers.enter(&target.text, instance.as_ref(), &target.counted.policies).map(Some)
    }

    /// Whether the calls of a service have a rate.
    pub(super) fn is_paced(&self, target: &Target) -> bool {
        self.0.policies.rates.limit(paced(target))
    }

    /// Waits until it is the turn of an attempt with this deadline. Without a rate that is at once.
    pub(super) async fn pace(&self, target: &Target, deadline: Option<Instant>) -> Result<(), Error> {
        let (now, counted) = (Instant::now(), &target.counted.policies);
        let left = deadline.map_or(Duration::MAX, |deadline| deadline.saturating_duration_since(now));
        match self.0.policies.rates.turn(paced(target), left) {
            Ok(Duration::ZERO) => {}
            Ok(wait) => {
                counted.waited_for_rate.one_more();
                self.timer(now + wait).await;
            }
            Err(calls) => {
                counted.refused_by_rate.one_more();
                let service = &target.service_text;
                return Err(Error::Overloaded {
                    what: format!("this client's {calls} calls/s to `{service}` are used up"),
                });
            }
        }
        Ok(())
    }

    /// The oneway call that a call becomes if it fails.
    pub(super) fn fallen(&self, call: &Invocation, request: &Request) -> Request<ArgumentWriter> {
        let payload = call.payload.clone();
        let arguments: ArgumentWriter = Box::new(move |_, written| {
            written.extend_from_slice(&payload);
            Ok(())
        });
        Request {
            codec: request.codec,
            timeout: Some(FAIL_BACK),
            priority: request.priority,
            metadata: call.metadata.clone().into_vec(),
            context: request.context.clone(),
            ..Request::new(request.target.clone(), arguments)
        }
    }

    /// A call that becomes a oneway call if it fails.
    pub(super) fn or_later(
        &self,
        running: BoxFuture<'static, Result<Reply, Error>>,
        fallen: Option<Request<ArgumentWriter>>,
    ) -> BoxFuture<'static, Result<Reply, Error>> {
        let (Some(fallen), client) = (fallen, self.clone()) else { return running };
        running.or_else(|error| async move { client.fall_back(fallen, error).await }).boxed()
    }

    /// Publishes a call that has failed as a oneway call. Returns the error of the call if that is not possible either.
    async fn fall_back(&self, fallen: Request<ArgumentWriter>, error: Error) -> Result<Reply, Error> {
        if !error.is_transient() {
            return Err(error);
        }
        let codec = fallen.codec.unwrap_or(self.0.settings.codec);
        let target = fallen.target.clone();
        if let Err(why) = self.send_on(fallen).await {
            warn!(%why, "a call that has failed cannot be left to the queue for oneway calls");
            return Err(error);
        }
        if let Ok(target) = target {
            target.counted.policies.failed_back.one_more();
        }
        Reply::result(codec, &())
    }
}

/// The names by which a call may have a rate.
fn paced(target: &Target) -> Paced<'_> {
    Paced { service: &target.service_text, method: &target.text }
}
