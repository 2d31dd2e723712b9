//! The settings for looking after groups, and connecting.

use std::time::Duration;

use super::Groups;
use crate::dead::queue_timeout;
use crate::environment;
use crate::error::Error;
use crate::settings::{Settings, common_settings};
use crate::transport::Role;

/// Settings for [`Groups`], to change before connecting.
///
/// ```no_run
/// # async fn example() -> Result<(), hopline::Error> {
/// let builder = hopline::Groups::builder().namespace("shop").timeout(std::time::Duration::from_secs(5));
/// let groups = builder.connect("amqp://operator:secret@broker.example.com").await?;
/// println!("{} groups", groups.list().await?.len());
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Default)]
pub struct GroupsBuilder {
    settings: Settings,
}

impl GroupsBuilder {
    common_settings!("operator PROCESS");

    /// How long a queue may take for each answer. Default: 8 s. At most 30 s. A queue does not answer if its node is
    /// down, or most of its nodes are.
    #[must_use]
    pub fn timeout(mut self, timeout: Duration) -> Self {
        self.settings.timeout = Some(timeout);
        self
    }

    /// Connects to the broker in the variable `HOPLINE_URL`, with all other settings from the environment that the code
    /// does not set: see [`environment`](crate::environment).
    ///
    /// # Errors
    /// As [`connect`](Self::connect), and `Invalid` for a variable that is missing or cannot be used.
    pub async fn connect_env(self) -> Result<Groups, Error> {
        self.with_env().connect(environment::url()?).await
    }

    /// Connects to the broker at `url`. For the forms of `url`, see
    /// [`ClientBuilder::connect`](crate::ClientBuilder::connect). If the connection is lost, it is not opened again.
    ///
    /// # Errors
    /// `Invalid` for an address or a setting that cannot be used. `Connect` if no broker answers, or the broker refuses.
    pub async fn connect(self, url: impl AsRef<str>) -> Result<Groups, Error> {
        let decided = self.settings.decide()?;
        let timeout = queue_timeout(&decided);
        let dial = decided.dial.dial(url.as_ref())?;
        let transport = dial.connect(Role::Operator).await?;
        Ok(Groups { dial, transport, namespace: decided.namespace, timeout })
    }
}
