//! Rules: settings of services and methods that operators change while clients and servers run. They are in a stream of
//! the broker, where the last rule of a service or method counts.

mod rule;
mod stream;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{PoisonError, RwLock};
use std::time::Duration;

use tokio::time::{Instant, sleep};
use tracing::{debug, info};

pub use self::rule::{BreakerRule, Rule, RuleChange};
pub(crate) use self::stream::{RuleStream, publish};
use crate::error::Error;
use crate::limits::ANSWER_TIMEOUT;
use crate::topology::Namespace;
use crate::transport::{Dial, Role, is_down};

/// How long to wait before the stream is tried again.
const PAUSE: Duration = Duration::from_secs(1);

/// The last rule of each service or method.
pub(crate) type RulesByTarget = BTreeMap<String, RuleChange>;

/// Where the rules are, and who connects to read them.
#[derive(Debug, Clone)]
pub(crate) struct RulesPlace {
    pub(crate) dial: Dial,
    pub(crate) role: Role,
    pub(crate) namespace: Namespace,
}

impl RulesPlace {
    /// Reads all changes, over a connection of its own.
    pub(crate) async fn read(&self) -> Result<(RuleStream, Vec<RuleChange>), Error> {
        let began = Instant::now();
        loop {
            let transport = self.dial.connect(self.role).await?;
            match RuleStream::read(transport, &self.namespace).await {
                Err(error) if is_not_ready(&error) && began.elapsed() < ANSWER_TIMEOUT => sleep(PAUSE).await,
                Err(Error::Disconnected { reason, .. }) => {
                    let why = format!(
                        "it ends each connection that asks for it ({reason}). If its node was killed just after the stream \
                         was made, the broker has lost it: delete the queue, and set the rules again"
                    );
                    return Err(Error::refused(format!("read the stream `{}`", self.namespace.rules()), why));
                }
                read => return read,
            }
        }
    }
}

/// Whether the stream may be there soon, as after a restart. To ask for it too early costs the connection at times.
fn is_not_ready(error: &Error) -> bool {
    match error {
        Error::Disconnected { .. } => true,
        Error::Broker { reason, .. } => is_down(reason),
        _ => false,
    }
}

/// The rules that a client or a server heeds.
pub(crate) struct HeededRules {
    rules: RwLock<RulesByTarget>,
    /// Puts in force what is not asked for at each call.
    apply: Box<dyn Fn(&RulesByTarget) + Send + Sync>,
}

impl HeededRules {
    /// None yet. Each time that they have changed, `apply` gets all of them.
    pub(crate) fn new(apply: impl Fn(&RulesByTarget) + Send + Sync + 'static) -> Self {
        Self { rules: RwLock::default(), apply: Box::new(apply) }
    }

    /// Looks at the rules as they are now.
    pub(crate) fn now<T>(&self, look: impl FnOnce(&RulesByTarget) -> T) -> T {
        look(&self.rules.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn change(&self, change: impl FnOnce(&mut RulesByTarget)) {
        let mut rules = self.rules.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut rules);
        (self.apply)(&rules);
    }

    /// Reads all rules.
    ///
    /// # Errors
    /// As [`RuleStream::read`].
    pub(crate) async fn read(&self, place: &RulesPlace) -> Result<RuleStream, Error> {
        let (stream, changes) = place.read().await?;
        self.change(|rules| *rules = last_of_each(changes));
        Ok(stream)
    }

    /// Takes what changes, without end, and reads everything again when the stream or its connection was lost.
    pub(crate) async fn follow(&self, place: &RulesPlace, mut stream: Option<RuleStream>) {
        loop {
            while let Some(change) = match &mut stream {
                Some(stream) => stream.next().await,
                None => None,
            } {
                let RuleChange { target, rule, user, client: by, .. } = &change;
                info!(target, %rule, user, client = by, "a rule has changed");
                self.change(|rules| keep(rules, change));
            }
            stream = match self.read(place).await {
                Ok(again) => Some(again),
                Err(error) => {
                    debug!(%error, "the rules cannot be read now");
                    sleep(PAUSE).await;
                    None
                }
            };
        }
    }
}

impl fmt::Debug for HeededRules {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.now(|rules| f.debug_tuple("HeededRules").field(rules).finish())
    }
}

/// The last change of each target counts. One that says nothing leaves nothing.
fn keep(rules: &mut RulesByTarget, change: RuleChange) {
    if change.rule.is_empty() {
        rules.remove(&change.target);
    } else {
        rules.insert(change.target.clone(), change);
    }
}

pub(crate) fn last_of_each(changes: Vec<RuleChange>) -> RulesByTarget {
    let mut rules = BTreeMap::new();
    changes.into_iter().for_each(|change| keep(&mut rules, change));
    rules
}
