//! The settings that clients, servers and operators have in common.

use std::time::Duration;

use crate::environment::Environment;
use crate::error::Error;
use crate::topology::Namespace;
use crate::transport::DialSettings;
#[cfg(feature = "tls")]
use crate::transport::Tls;

/// The settings that the code has set. For those that it has not, the environment is asked if `with_env` is set.
#[derive(Debug, Clone, Default)]
pub(crate) struct Settings {
    pub(crate) namespace: Option<String>,
    pub(crate) name: Option<String>,
    pub(crate) connect_timeout: Option<Duration>,
    pub(crate) timeout: Option<Duration>,
    #[cfg(feature = "tls")]
    pub(crate) tls: Option<Tls>,
    pub(crate) with_env: bool,
}

/// The settings after the environment was asked.
#[derive(Debug)]
pub(crate) struct Decided {
    pub(crate) namespace: Namespace,
    /// `None` if neither the code nor the environment sets it.
    pub(crate) timeout: Option<Duration>,
    pub(crate) dial: DialSettings,
}

impl Settings {
    /// Reads the environment if `with_env` is set. What the code has set is used first.
    ///
    /// # Errors
    /// `Invalid` for a namespace or a variable that cannot be used.
    pub(crate) fn decide(&self) -> Result<Decided, Error> {
        let environment = if self.with_env { Environment::read()? } else { Environment::default() };
        let namespace = self.namespace.as_deref().map(Namespace::new).transpose().map_err(Error::Invalid)?;
        let default = DialSettings::default();
        Ok(Decided {
            namespace: namespace.or(environment.namespace).unwrap_or_default(),
            timeout: self.timeout.or(environment.timeout),
            dial: DialSettings {
                timeout: self.connect_timeout.or(environment.connect_timeout).unwrap_or(default.timeout),
                name: self.name.clone().or(environment.name),
                #[cfg(feature = "tls")]
                tls: self.tls.clone().or(environment.tls),
            },
        })
    }
}

/// The methods that the three builders have in common, with the same docs. `$role` is how the broker shows the
/// connection. Each builder has its [`Settings`] in the field `settings`.
macro_rules! common_settings {
    ($role:literal) => {
        /// The prefix of every name on the broker, `[A-Za-z0-9_-]+`. Programs in different namespaces do not see each
        /// other. Default: `hopline`.
        #[must_use]
        pub fn namespace(mut self, name: impl Into<String>) -> Self {
            self.settings.namespace = Some(name.into());
            self
        }

        #[doc = concat!(
            "The name of this program, by which people find its connections: the broker shows them as `NAME ", $role,
            "`, and the log has it. 1 to 64 bytes, without control characters. Default: the program's name."
        )]
        #[must_use]
        pub fn name(mut self, name: impl Into<String>) -> Self {
            self.settings.name = Some(name.into());
            self
        }

        /// How long each address of the broker may take until its connection can be used, with looking up its name. An
        /// address can set its own with `?connection_timeout=`, in milliseconds. Default: 10 s.
        #[must_use]
        pub fn connect_timeout(mut self, timeout: ::std::time::Duration) -> Self {
            self.settings.connect_timeout = Some(timeout);
            self
        }

        /// The CAs to trust and the certificate to show for `amqps://`. Default: the system's CAs, and no certificate.
        #[cfg(feature = "tls")]
        #[must_use]
        pub fn tls(mut self, tls: $crate::transport::Tls) -> Self {
            self.settings.tls = Some(tls);
            self
        }

        /// Takes the settings from the environment that the code does not set, before this or after.
        /// [`environment`](crate::environment) lists the variables. They are read when it connects.
        #[must_use]
        pub fn with_env(mut self) -> Self {
            self.settings.with_env = true;
            self
        }
    };
}
pub(crate) use common_settings;
