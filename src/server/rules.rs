//! The rules that a server heeds: the rates of its methods, and how many calls of its services run at once.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use tokio::sync::OnceCell;
use tracing::warn;

use super::builder::ServerBuilder;
use super::places::{ChangingPlaces, RunPlaces};
use super::site::Site;
use crate::document::RuleInForce;
use crate::error::{Error, Fault};
use crate::middleware::{Invocation, Middleware, PacedBy, RateLimit, ServerPolicy};
use crate::rules::{HeededRules, RuleChange, RuleStream, RulesByTarget, RulesPlace};
use crate::state::State;

impl ServerBuilder {
    /// Has the server heed [`Rules`](crate::Rules): what they say of its services and methods wins over what the code
    /// says. Default: it does not. It heeds `server_rate` and `server_concurrency`, and no other settings of rules.
    ///
    /// [`Server::start`](crate::Server::start) returns when all rules are in force, so before the first call. A change is
    /// in force a moment after it was set. While there is no connection the server goes by what it has heard. For the
    /// rules it has a connection of its own.
    ///
    /// A server that [connects lazily](Self::connect_lazy) takes its first call when it has read the rules, too. If the
    /// broker does not let it read them, it says so in its log and serves as the code says.
    ///
    /// # Errors
    /// [`Server::start`](crate::Server::start) then fails as [`Rules::get`](crate::Rules::get) does.
    ///
    /// ```
    /// # async fn example(calculator: hopline::Service) -> Result<(), hopline::Error> {
    /// let server = hopline::Server::builder().rules().connect("amqp://localhost").await?.serve(calculator);
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn rules(mut self) -> Self {
        self.has_rules = true;
        self
    }
}

/// What a server has to do with rules.
pub(super) struct ServerRules {
    place: RulesPlace,
    heeded: Arc<HeededRules>,
    pub(super) rates: Arc<RuledRates>,
    places: Arc<RuledPlaces>,
    /// Set once they are read and followed.
    followed: OnceCell<()>,
}

/// The places of services, by their names. Those of a method with its own are never more than the program says.
type RuledPlaces = Mutex<Vec<(Arc<str>, Arc<ChangingPlaces>, usize)>>;

impl ServerRules {
    pub(super) fn new(place: RulesPlace) -> Self {
        let (rates, places) = (Arc::<RuledRates>::default(), Arc::<RuledPlaces>::default());
        let (ruled, governed) = (rates.clone(), places.clone());
        let heeded = Arc::new(HeededRules::new(move |rules| {
            ruled.rule(rules);
            for (service, places, most) in &*governed.lock().unwrap_or_else(PoisonError::into_inner) {
                let said = rules.get(&**service).and_then(|set| set.rule.server_concurrency);
                places.rule(said.map(|calls| (calls as usize).min(*most)));
            }
        }));
        Self { place, heeded, rates, places, followed: OnceCell::new() }
    }

    /// Has rules say how many calls of a service run at once in these places, up to `most`. Called before the rules are read.
    pub(super) fn govern(&self, service: &Arc<str>, places: &RunPlaces, most: usize) {
        let governed = places.changing().map(|places| (service.clone(), places.clone(), most));
        self.places.lock().unwrap_or_else(PoisonError::into_inner).extend(governed);
    }

    /// What the rules say of a service and its methods to its servers.
    pub(super) fn in_force(&self, service: &str) -> Vec<RuleInForce> {
        let is_of =
            |target: &str| target.strip_prefix(service).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
        self.heeded.now(|rules| {
            let sets = rules.values().filter(|set| is_of(&set.target));
            sets.filter_map(RuleChange::for_servers).collect()
        })
    }
}

impl Site {
    /// Reads the rules if the server heeds them, unless that is done, and follows them until the server is closed.
    ///
    /// # Errors
    /// If they cannot be read.
    pub(super) async fn heed(&self) -> Result<(), Error> {
        let Some(rules) = &self.rules else { return Ok(()) };
        let followed = rules.followed.get_or_try_init(async || {
            let stream = rules.heeded.read(&rules.place).await?;
            self.follow(rules, Some(stream));
            Ok(())
        });
        followed.await.copied()
    }

    /// The same for a server that others wait for: what the broker refuses is logged, and the server goes by its code.
    ///
    /// # Errors
    /// `Connect`, `Disconnected`.
    pub(super) async fn heed_if_allowed(&self) -> Result<(), Error> {
        match self.heed().await {
            Err(error @ (Error::Connect { .. } | Error::Disconnected { .. })) => Err(error),
            Err(error) => {
                warn!(name = &*self.name, %error, "the rules cannot be read: it serves as its code says until they can");
                if let Some(rules) = self.rules.as_ref().filter(|rules| rules.followed.set(()).is_ok()) {
                    self.follow(rules, None);
                }
                Ok(())
            }
            Ok(()) => Ok(()),
        }
    }

    fn follow(&self, rules: &ServerRules, stream: Option<RuleStream>) {
        let (heeded, place, mut state) = (rules.heeded.clone(), rules.place.clone(), self.health.state.subscribe());
        tokio::spawn(async move {
            tokio::select! {
                () = heeded.follow(&place, stream) => {}
                // An error means the same.
                _ = state.wait_for(|state| *state == State::Closed) => {}
            }
        });
    }
}

/// The rates that rules say, by service as `name.vMAJOR` or by method as `name.vMAJOR.method`.
#[derive(Default)]
pub(super) struct RuledRates {
    rates: RwLock<HashMap<String, RuledRate>>,
    /// Whether there are any, which is cheaper to ask.
    are_some: AtomicBool,
}

struct RuledRate {
    calls: u32,
    limit: Arc<RateLimit>,
}

impl RuledRates {
    /// Goes by these rules. A rate that stays as it was goes on.
    fn rule(&self, rules: &RulesByTarget) {
        let mut rates = self.rates.write().unwrap_or_else(PoisonError::into_inner);
        let said = |target: &str| rules.get(target).and_then(|set| set.rule.server_rate);
        rates.retain(|target, rate| said(target) == Some(rate.calls));
        for target in rules.keys() {
            if let Some(calls) = said(target) {
                let new = || RuledRate { calls, limit: Arc::new(RateLimit::per_user(calls.into())) };
                rates.entry(target.clone()).or_insert_with(new);
            }
        }
        self.are_some.store(!rates.is_empty(), Ordering::Relaxed);
    }

    /// The rate of a call's method, or else that of its service.
    fn of(&self, call: &Invocation) -> Option<Arc<RateLimit>> {
        if !self.are_some.load(Ordering::Relaxed) {
            return None;
        }
        let rates = self.rates.read().unwrap_or_else(PoisonError::into_inner);
        let own = format!("{}.{}", call.service(), call.method());
        rates.get(&own).or_else(|| rates.get(call.service())).map(|rate| rate.limit.clone())
    }
}

impl Middleware for RuledRates {
    fn admit(&self, call: &Invocation) -> Result<(), Fault> {
        self.of(call).map_or(Ok(()), |rate| rate.admit(call))
    }

    fn policy(&self) -> Option<&dyn ServerPolicy> {
        Some(self)
    }
}

impl ServerPolicy for RuledRates {
    fn holds(&self) -> bool {
        true
    }

    fn paces(&self, call: &Invocation) -> Option<PacedBy> {
        self.of(call).map(|_| PacedBy::Rule)
    }
}
