//! The rules that a client heeds, and those that it sets.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use super::request::Request;
use super::session::Sessions;
use super::target::Target;
use super::{Client, ClientBuilder};
use crate::error::Error;
use crate::middleware::Policies;
use crate::rules::{
    BreakerRule, HeededRules, Rule, RuleChange, RuleStream, RulesByTarget, RulesPlace, last_of_each, publish,
};
use crate::state::State;
use crate::transport::Role;

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
    heeded: Option<Arc<HeededRules>>,
}

impl Ruling {
    pub(super) fn of(sessions: &Sessions, policies: &Policies) -> Self {
        let Sessions { dial, namespace, .. } = sessions;
        let rates = policies.rates.clone();
        let heeded = HeededRules::new(move |rules| {
            let ruled = rules.values().filter_map(|set| Some((set.target.clone(), set.rule.rate?)));
            rates.rule(&ruled.collect());
        });
        Self {
            place: RulesPlace { dial: dial.clone(), role: Role::Client, namespace: namespace.clone() },
            heeded: policies.settings.has_rules.then(|| Arc::new(heeded)),
        }
    }
}

/// What the rules say of a method: its own, and beyond that the one of its service.
fn rule_of(target: &Target, rules: &RulesByTarget) -> Rule {
    if rules.is_empty() {
        return Rule::default();
    }
    let of = |name: &str| rules.get(name).map(|set| set.rule.clone()).unwrap_or_default();
    of(&target.text).or(of(&target.service_text))
}

/// The error of a call that a rule keeps back.
fn held_back(target: &Target, rules: &RulesByTarget) -> Error {
    let mut sets = [&target.text, &target.service_text].into_iter().filter_map(|name| rules.get(&**name));
    let opened = sets.find(|set| set.rule.breaker.is_some());
    Error::CircuitOpen {
        method: target.to_string(),
        instance: None,
        retry_in: REFUSED_FOR,
        rule: opened.map(|set| set.target.clone()),
        set_by: opened.map(|set| set.user.as_ref().unwrap_or(&set.client).clone()),
    }
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
        if let Some(heeded) = &self.0.rules.heeded {
            let stream = heeded.read(&self.0.rules.place).await?;
            self.follow_rules(heeded.clone(), Some(stream));
        }
        Ok(())
    }

    /// The same, without waiting for it.
    pub(super) fn heed_later(&self) {
        if let Some(heeded) = &self.0.rules.heeded {
            self.follow_rules(heeded.clone(), None);
        }
    }

    /// Follows the rules until the client is closed or dropped.
    fn follow_rules(&self, heeded: Arc<HeededRules>, stream: Option<RuleStream>) {
        let (place, mut state) = (self.0.rules.place.clone(), self.state());
        self.0.runtime.spawn(async move {
            tokio::select! {
                () = heeded.follow(&place, stream) => {}
                // An error means the same.
                _ = state.wait_for(|state| *state == State::Closed) => {}
            }
        });
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
        // Its rate is with those of the client. The rest is for servers.
        let (Rule { timeout, retry, .. }, refusal) = rules.now(|rules| {
            let rule = rule_of(target, rules);
            let is_open = rule.breaker == Some(BreakerRule::Open);
            (rule, (is_open && is_answered).then(|| held_back(target, rules)))
        });
        if let Some(refusal) = refusal {
            target.counted.policies.refused_by_breaker.one_more();
            return Err(refusal);
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
        rules.now(|rules| rules.values().cloned().collect())
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
        let target = Rule::default().target_of(target)?;
        let place = &self.client.0.rules.place;
        let (stream, changes) = place.read().await?;
        let transport = stream.transport;
        let before = last_of_each(changes).remove(&target).map(|set| set.rule).unwrap_or_default();
        let rule = to(before)?;
        rule.target_of(&target)?;
        let (client, at) = (self.client.0.caller.to_string(), SystemTime::now());
        let change = RuleChange { target, rule, user: None, client, at };
        publish(&transport, &place.namespace, &change.document()).await?;
        // Known since something was published.
        Ok(RuleChange { user: transport.user().map(str::to_owned), ..change })
    }
}
