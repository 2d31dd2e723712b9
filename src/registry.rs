//! Who serves what, asked over the discovery exchange: every instance that is up answers for itself.

use std::sync::Arc;
use std::time::Duration;

use futures::TryStreamExt;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::client::{Arguments, Client, Request, Target};
use crate::error::Error;
use crate::route::Route;
use crate::topology::ServiceId;

/// The questions. Their names have a dot, so no method of a service can be taken for one.
pub(crate) const PING: &str = "hopline.ping";
pub(crate) const INFO: &str = "hopline.info";
pub(crate) const STATS: &str = "hopline.stats";

/// What an instance of a service says that it serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct Instance {
    /// The service, as `name.vMAJOR`.
    pub service: String,
    /// The instance's id: what [`Call::to`](crate::Call::to) takes.
    pub instance: String,
    /// The version of Hopline that it runs.
    pub hopline: String,
    /// Its methods, by name.
    pub methods: Vec<MethodInfo>,
}

/// What an instance says of one of its methods.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct MethodInfo {
    /// The name to call it by.
    pub name: String,
    /// How it is written in the service's language; the bare name if that is not known.
    pub signature: String,
    /// Whether it takes oneway calls.
    #[serde(default)]
    pub oneway: bool,
    /// Whether it may run twice without harm.
    pub idempotent: bool,
}

/// How busy an instance of a service is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[non_exhaustive]
pub struct InstanceStats {
    /// The service, as `name.vMAJOR`.
    pub service: String,
    /// The instance's id.
    pub instance: String,
    /// Calls that run now.
    pub running: u64,
    /// Calls that it has run since it started, however they ended.
    pub finished: u64,
    /// Deliveries that got the reply of an earlier one, by [`Method::dedup`](crate::Method::dedup); 0 from an instance
    /// that does not tell.
    #[serde(default)]
    pub repeated: u64,
    /// Frames that came to it and could not be read; what followed each in its message counts with it.
    #[serde(default)]
    pub malformed: u64,
    /// Frames that could be read and were not to be run: unknown methods, bombs, what does not belong where it came, and
    /// what came back to be run twice.
    #[serde(default)]
    pub refused: u64,
    /// Cancels of calls that did not run here: of another instance's, for each hears of each; late or forged.
    #[serde(default)]
    pub cancels_ignored: u64,
}

impl Client {
    /// The instances that are up and what they serve, as those tell that answer within `window`; none is fine too.
    /// Sorted by service and instance.
    ///
    /// # Errors
    /// `Disconnected`, `Blocked`.
    pub async fn instances(&self, window: Duration) -> Result<Vec<Instance>, Error> {
        let mut told: Vec<Instance> = ask(self, INFO, window).await?;
        told.sort_by(|one, other| (&one.service, &one.instance).cmp(&(&other.service, &other.instance)));
        Ok(told)
    }

    /// How busy the instances are that answer within `window`. Sorted by service and instance.
    ///
    /// # Errors
    /// As [`Client::instances`].
    pub async fn stats(&self, window: Duration) -> Result<Vec<InstanceStats>, Error> {
        let mut told: Vec<InstanceStats> = ask(self, STATS, window).await?;
        told.sort_by(|one, other| (&one.service, &one.instance).cmp(&(&other.service, &other.instance)));
        Ok(told)
    }
}

async fn ask<T: DeserializeOwned>(client: &Client, question: &str, window: Duration) -> Result<Vec<T>, Error> {
    let service = ServiceId::new("hopline", 1).map_err(Error::Invalid)?;
    let arguments: Arguments = Box::new(|codec, payload| codec.write::<[(); 0]>(&[], payload));
    let target = Arc::new(Target::new(service, question));
    let request = Request { timeout: Some(window), route: Route::Everywhere, ..Request::new(Ok(target), arguments) };
    let answers = match client.ask(request).await {
        Err(Error::NoService { .. }) => return Ok(Vec::new()),
        answers => answers?.try_collect::<Vec<_>>().await?,
    };
    // One that does not know the question, being of another make, is no reason to hear none.
    let known = answers.into_iter().filter_map(|(_, reply)| reply.ok()).filter(|reply| !reply.is_own_error());
    Ok(known.filter_map(|reply| reply.codec().decode(reply.payload()).ok()).collect())
}
