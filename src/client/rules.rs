//! Rules: settings of calls that operators change while clients run. They are in a stream of the broker, where the last
//! rule of a service or method counts.

mod rule;
mod stream;

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};
use std::time::{Duration, SystemTime};

use tokio::time::{Instant, sleep};
use tracing::{debug, info};

use self::rule::target_of;
pub use self::rule::{BreakerRule, Rule, RuleChange};
use self::stream::{RuleStream, publish};
use super::request::Request;
use super::session::Sessions;
use super::target::Target;
use super::{Client, ClientBuilder, WeakClient};
use crate::error::Error;
use crate::limits::ANSWER_TIMEOUT;
use crate::state::State;
use crate::topology::Namespace;
use crate::transport::{Dial, Role};

/// How long to wait before the stream is tried again.
const PAUSE: Duration = Duration::from_secs(1);
/// When a call is worth another try that a rule has refused. By then another rule is in force if there is one.
const REFUSED_FOR: Duration = Duration::from_secs(1);

/// The rules of a namespace: settings of calls that are changed while clients run. [`Client::rules`] makes one.
///
/// A client heeds them if it was built with [`ClientBuilder::rules`]. Any client can set them whose user may write to
/// the exchange `hopline.rules`.
///
/// ```
/// use hopline::Client;
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), hopline::Error> {
/// let client = Client::builder().rules().connect("memory://").await?;
/// client.rules().set("shop.order", &"timeout=2s retry=1".parse()?).await?;
/// for set in client.rules().get().await? {
///     println!("{}: {}, set by {}", set.target, set.rule, set.client);
/// }
/// client.rules().unset("shop.order", &[]).await?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone)]
pub struct Rules {
    client: Client,
}

/// What a client has to do with rules.
#[derive(Debug)]
pub(super) struct Ruling {
    place: RulesPlace,
    /// `None` unless it heeds them.
    heeded: Option<HeededRules>,
}

impl Ruling {
    pub(super) fn of(sessions: &Sessions, heeds: bool) -> Self {
        let place = RulesPlace { dial: sessions.dial.clone(), namespace: sessions.namespace.clone() };
        Self { place, heeded: heeds.then(HeededRules::default) }
    }
}

/// The rules that a client heeds, by service or method.
#[derive(Debug, Default)]
struct HeededRules(RwLock<BTreeMap<String, RuleChange>>);

impl HeededRules {
    /// What the rules say of a method: its own, and beyond that the one of its service.
    fn of(&self, target: &Target) -> Rule {
        let rules = self.0.read().unwrap_or_else(PoisonError::into_inner);
        if rules.is_empty() {
            return Rule::default();
        }
        let of = |name: &str| rules.get(name).map(|set| set.rule.clone()).unwrap_or_default();
        of(&target.text).or(of(&target.service_text))
    }
}

/// Where the rules are.
#[derive(Debug, Clone)]
struct RulesPlace {
    dial: Dial,
    namespace: Namespace,
}

impl RulesPlace {
    /// Reads all changes, over a connection of its own.
    async fn read(&self) -> Result<(RuleStream, Vec<RuleChange>), Error> {
        let began = Instant::now();
        loop {
            let transport = self.dial.connect(Role::Client).await?;
            match RuleStream::read(transport, &self.namespace).await {
                // A stream that is not ready yet costs the connection.
                Err(Error::Disconnected { .. }) if began.elapsed() < ANSWER_TIMEOUT => sleep(PAUSE).await,
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

/// The last change of each target counts. One that says nothing leaves nothing.
fn keep(rules: &mut BTreeMap<String, RuleChange>, change: RuleChange) {
    if change.rule.is_empty() {
        rules.remove(&change.target);
    } else {
        rules.insert(change.target.clone(), change);
    }
}

fn last_of_each(changes: Vec<RuleChange>) -> BTreeMap<String, RuleChange> {
    let mut rules = BTreeMap::new();
    changes.into_iter().for_each(|change| keep(&mut rules, change));
    rules
}

impl ClientBuilder {
    /// Has the client heed [`Rules`]: what they say of a service or a method wins over what the code says. Default: it
    /// does not.
    ///
    /// [`connect`](Self::connect) returns when all rules have been read. A change is in force a moment after it was set.
    /// While there is no connection the client goes by what it has heard. With [`connect_lazy`](Self::connect_lazy),
    /// calls that begin before there is a connection are made as the code says.
    ///
    /// ```
    /// # async fn example() -> Result<(), hopline::Error> {
    /// let client = hopline::Client::builder().rules().connect("amqp://localhost").await?;
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn rules(mut self) -> Self {
        self.policies.has_rules = true;
        self
    }
}

impl Client {
    /// The rules of the client's namespace, to look at them and to set them.
    #[must_use]
    pub fn rules(&self) -> Rules {
        Rules { client: self.clone() }
    }

    /// Reads the rules if the client heeds them, and follows them from then on.
    pub(super) async fn heed(&self) -> Result<(), Error> {
        if self.0.rules.heeded.is_some() {
            let (stream, changes) = self.0.rules.place.read().await?;
            self.now_heeds(|heeded| *heeded = last_of_each(changes));
            self.follow_rules(Some(stream));
        }
        Ok(())
    }

    /// The same, without waiting for it.
    pub(super) fn heed_later(&self) {
        if self.0.rules.heeded.is_some() {
            self.follow_rules(None);
        }
    }

    /// Follows the rules until the client is closed or dropped.
    fn follow_rules(&self, stream: Option<RuleStream>) {
        let following = follow(self.downgrade(), self.0.rules.place.clone(), stream);
        let mut state = self.state();
        self.0.runtime.spawn(async move {
            tokio::select! {
                () = following => {}
                // An error means the same.
                _ = state.wait_for(|state| *state == State::Closed) => {}
            }
        });
    }

    /// Changes what the client heeds.
    fn now_heeds(&self, change: impl FnOnce(&mut BTreeMap<String, RuleChange>)) {
        let Some(rules) = &self.0.rules.heeded else { return };
        let mut heeded = rules.0.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut heeded);
        let rates = heeded.values().filter_map(|set| Some((set.target.clone(), set.rule.rate?)));
        self.0.policies.rates.rule(&rates.collect());
    }

    /// A request as the rules want it.
    ///
    /// # Errors
    /// `CircuitOpen` if a rule keeps calls with an answer back.
    pub(crate) fn ruled<P>(&self, mut request: Request<P>, is_answered: bool) -> Result<Request<P>, Error> {
        let (Some(rules), Ok(target)) = (&self.0.rules.heeded, &request.target) else { return Ok(request) };
        if target.is_question() {
            return Ok(request);
        }
        // Its rate is with those of the client.
        let Rule { timeout, retry, rate: _, breaker } = rules.of(target);
        if breaker == Some(BreakerRule::Open) && is_answered {
            self.0.policies.counted.refused_by_breaker.one_more();
            return Err(Error::CircuitOpen { method: target.to_string(), instance: None, retry_in: REFUSED_FOR });
        }
        if let Some(most) = timeout {
            request.timeout = Some(request.timeout.map_or(most, |own| own.min(most)));
        }
        request.asked.retries = retry.unwrap_or(request.asked.retries);
        Ok(request)
    }
}

impl Rules {
    /// What this client heeds now, by service or method. Empty if it does not [heed rules](ClientBuilder::rules).
    #[must_use]
    pub fn heeded(&self) -> Vec<RuleChange> {
        let Some(rules) = &self.client.0.rules.heeded else { return Vec::new() };
        rules.0.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// All rules that are set, by service or method, as the broker has them.
    ///
    /// # Errors
    /// `Broker` if this user may not read them, `Disconnected`.
    pub async fn get(&self) -> Result<Vec<RuleChange>, Error> {
        Ok(last_of_each(self.history().await?).into_values().collect())
    }

    /// All changes that the broker still has, the oldest first. It keeps 16 MiB of them, which is some ten thousand.
    ///
    /// # Errors
    /// As [`get`](Self::get).
    pub async fn history(&self) -> Result<Vec<RuleChange>, Error> {
        Ok(self.client.0.rules.place.read().await?.1)
    }

    /// Sets a rule for `target`, which is a service, as `name` or `name.vMAJOR`, or one of its methods, as
    /// `name.method` or `name.vMAJOR.method`. Settings that an earlier rule has and this one does not name stay.
    /// Returns the rule as it is then.
    ///
    /// Of two who set the rule of one target at the same moment, the later one wins.
    ///
    /// # Errors
    /// `Invalid` for a target that cannot be, or a rule that says nothing. `Broker` if this user may not set rules.
    /// `Disconnected`.
    pub async fn set(&self, target: &str, rule: &Rule) -> Result<RuleChange, Error> {
        if rule.is_empty() {
            return Err(Error::Invalid("the rule says nothing: name a setting, such as timeout=2s".to_owned()));
        }
        self.change(target, |before| Ok(rule.clone().or(before))).await
    }

    /// Takes away settings of a rule, by their names, or the whole rule if none is named. Returns the rule as it is then.
    ///
    /// # Errors
    /// As [`set`](Self::set), and `Invalid` for a setting that does not exist.
    pub async fn unset(&self, target: &str, settings: &[&str]) -> Result<RuleChange, Error> {
        self.change(target, |mut before| {
            settings.iter().try_for_each(|setting| before.unset(setting))?;
            Ok(if settings.is_empty() { Rule::default() } else { before })
        })
        .await
    }

    async fn change(&self, target: &str, to: impl FnOnce(Rule) -> Result<Rule, Error>) -> Result<RuleChange, Error> {
        let target = target_of(target)?;
        let place = &self.client.0.rules.place;
        let (stream, changes) = place.read().await?;
        let transport = stream.transport;
        let before = last_of_each(changes).remove(&target).map(|set| set.rule).unwrap_or_default();
        let rule = to(before)?;
        let (client, at) = (self.client.0.caller.to_string(), SystemTime::now());
        let change = RuleChange { target, rule, user: None, client, at };
        publish(&transport, &place.namespace, &change.document()).await?;
        // Known since something was published.
        Ok(RuleChange { user: transport.user().map(str::to_owned), ..change })
    }
}

/// Takes what changes, and reads everything again when the stream or its connection was lost.
async fn follow(client: WeakClient, place: RulesPlace, mut stream: Option<RuleStream>) {
    loop {
        while let Some(change) = match &mut stream {
            Some(stream) => stream.next().await,
            None => None,
        } {
            let Some(client) = client.upgrade() else { return };
            let RuleChange { target, rule, user, client: by, .. } = &change;
            info!(target, %rule, user, client = by, "a rule has changed");
            client.now_heeds(|heeded| keep(heeded, change));
        }
        match place.read().await {
            Ok((again, changes)) => {
                let Some(client) = client.upgrade() else { return };
                client.now_heeds(|heeded| *heeded = last_of_each(changes));
                stream = Some(again);
            }
            Err(error) => {
                debug!(%error, "the rules cannot be read now");
                stream = None;
                sleep(PAUSE).await;
            }
        }
    }
}
