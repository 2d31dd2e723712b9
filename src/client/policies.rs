//! The policies of a client, as its user sets them and looks at them. What they do is in `middleware/`.

use std::sync::Arc;
use std::time::Duration;

use super::{Client, ClientBuilder};
use crate::error::Error;
use crate::exchanges::Recipients;
use crate::middleware::{Asked, Breaker, Breakers, Passed, PolicyCounts};

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

    /// Puts a circuit [`Breaker`] before each method. Default: none.
    #[must_use]
    pub fn breaker(mut self) -> Self {
        self.policies.has_breakers = true;
        self
    }
}

impl Client {
    /// What the policies of this client have done.
    #[must_use]
    pub fn policies(&self) -> PolicyCounts {
        self.0.policies.counted.now()
    }

    /// The [breakers](ClientBuilder::breaker) of the methods that were called within the last seconds, and those that
    /// are open. Empty without breakers.
    #[must_use]
    pub fn breakers(&self) -> Vec<Breaker> {
        self.0.policies.breakers.as_ref().map(Breakers::all).unwrap_or_default()
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

    /// What a call asks of the policies that asks for nothing itself.
    pub(crate) fn asked(&self) -> Asked {
        self.0.policies.settings.asked
    }

    /// Lets an attempt pass the breaker of its method, or that of its method at an instance. `None` without breakers.
    pub(super) fn pass(&self, method: &Arc<str>, recipients: &Recipients) -> Result<Option<Passed<'_>>, Error> {
        let Some(breakers) = &self.0.policies.breakers else { return Ok(None) };
        let instance = recipients.instance().map(Arc::from);
        breakers.enter(method, instance.as_ref()).map(Some)
    }
}
