//! How a client sends a call along its [`Route`]: it chooses an instance, and another one if that is gone.
//!
//! The [`Router`] holds the instances of the services that such calls go to. `registry/follow.rs` keeps it up to date.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use tokio::sync::{mpsc, watch};
use tokio::time::Instant;

use super::request::Request;
use super::{Attempt, Client, Target};
use crate::error::{Code, Error, Fault, Unanswered};
use crate::exchanges::Recipients;
use crate::middleware::{Apart, Reply};
use crate::route::{Candidate, Route, Turns};
use crate::state::State;

/// How long a call waits for what is known of its service, if there is a connection.
const KNOWN: Duration = Duration::from_millis(200);
/// How often a call goes to another instance.
const MOVES: usize = 3;
/// How long the reply of an instance is waited for that is known to be gone. One that has lost its connection replies when
/// it has one again.
const LATE_REPLY: Duration = Duration::from_secs(5);
/// How many routes of a service have turns of their own.
const ROUTES: usize = 64;

/// The instances that calls are sent to along routes.
#[derive(Debug, Default)]
pub(crate) struct Router {
    services: Mutex<HashMap<Arc<str>, Arc<RoutedService>>>,
    /// The way to whoever follows the instances. Without it, nobody does yet.
    follower: OnceLock<mpsc::UnboundedSender<Wanted>>,
}

/// What a call along a route wants to know.
#[derive(Debug)]
pub(crate) enum Wanted {
    /// Which instances a service has.
    Service(Arc<RoutedService>),
    /// Whether an instance is still there.
    Instance { service: Arc<str>, instance: Arc<str> },
}

/// A service that calls are sent to along routes.
#[derive(Debug)]
pub(crate) struct RoutedService {
    /// As `name.vMAJOR`.
    pub(crate) name: Arc<str>,
    candidates: watch::Sender<Arc<[Candidate]>>,
    /// Whose turn it is, by route.
    turns: Mutex<Vec<(Arc<Route>, Arc<Turns>)>>,
    /// For the routes that have none.
    no_turns: Arc<Turns>,
}

impl RoutedService {
    /// Whose turn it is by a route. Calls by another route do not take turns away from it.
    fn turns_of(&self, route: &Arc<Route>) -> Arc<Turns> {
        if matches!(**route, Route::Key(_) | Route::LeastInFlight) {
            return self.no_turns.clone();
        }
        let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, turns)) = turns.iter().find(|(known, _)| known == route) {
            return turns.clone();
        }
        if turns.len() == ROUTES {
            turns.remove(0);
        }
        let new = Arc::<Turns>::default();
        turns.push((route.clone(), new.clone()));
        new
    }

    /// These are its instances now.
    pub(crate) fn has(&self, candidates: Arc<[Candidate]>) {
        self.candidates.send_replace(candidates);
    }
}

impl Router {
    /// What calls will want to know, for whoever is to follow the instances from now on. `None` if somebody does.
    pub(crate) fn begin(&self) -> Option<mpsc::UnboundedReceiver<Wanted>> {
        let (sender, wanted) = mpsc::unbounded_channel();
        self.follower.set(sender).is_ok().then_some(wanted)
    }

    fn service(&self, name: &Arc<str>) -> Arc<RoutedService> {
        let mut services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || {
            let candidates = watch::Sender::new(Arc::from([]));
            let (turns, no_turns) = (Mutex::default(), Arc::default());
            Arc::new(RoutedService { name: name.clone(), candidates, turns, no_turns })
        };
        services.entry(name.clone()).or_insert_with(new).clone()
    }

    /// Calls will want to know the instances of a service later.
    pub(super) fn expect(&self, name: &Arc<str>) {
        let services = self.services.lock().unwrap_or_else(PoisonError::into_inner);
        if !services.contains_key(name) {
            drop(services);
            self.want(Wanted::Service(self.service(name)));
        }
    }

    /// A call to any instance had this reply, after this time.
    fn heard(&self, name: &Arc<str>, reply: &Reply, took: Duration) {
        let Some(instance) = &reply.instance else { return };
        let service = self.services.lock().unwrap_or_else(PoisonError::into_inner).get(name).cloned();
        let Some(service) = service else { return };
        let candidates = service.candidates.borrow().clone();
        if let Some(candidate) = candidates.iter().find(|candidate| candidate.instance == *instance) {
            // How long it waited in the queue that all share says nothing of the instance.
            candidate.has_taken(reply.handler_time.unwrap_or(took));
        }
    }

    fn want(&self, wanted: Wanted) {
        if let Some(follower) = self.follower.get() {
            // It ends with the client.
            let _ = follower.send(wanted);
        }
    }
}

impl Request {
    /// The instances that it is rather not to go to, since it is not known how quick they are.
    fn unknown(&self, candidates: &[Candidate]) -> Vec<Arc<str>> {
        let is_in_haste = self.apart.as_ref().is_some_and(Apart::is_in_haste);
        let unknown = candidates.iter().filter(|candidate| is_in_haste && !candidate.is_known());
        unknown.map(|candidate| candidate.instance.clone()).collect()
    }
}

impl Client {
    /// The route of a request if it is not that to any instance: its own, or that of its service.
    pub(crate) fn route_of<P>(&self, request: &Request<P>) -> Option<Arc<Route>> {
        if request.recipients != Recipients::Any {
            return None;
        }
        let of_service = || match &request.target {
            // Who asks about a service wants an answer from anyone.
            Ok(target) if !self.0.settings.routes.is_empty() && !target.is_question() => {
                self.0.settings.routes.get(&target.service).cloned()
            }
            _ => None,
        };
        request.route.clone().or_else(of_service).filter(|route| **route != Route::Any)
    }

    pub(crate) fn router(&self) -> &Router {
        &self.0.router
    }

    /// The instances of a service that take calls, as far as they are known. It waits for them like a call along a route.
    pub(crate) async fn known_instances(&self, target: &Target) -> Vec<String> {
        let service = self.0.router.service(&target.service_text);
        let known = self.candidates(&service, target, None).await.unwrap_or_default();
        let taking = known.iter().filter(|candidate| !candidate.is_draining);
        taking.map(|candidate| candidate.instance.to_string()).collect()
    }

    /// Sends a request along its route, and waits for the reply.
    pub(super) async fn deliver(&self, request: Request) -> Result<Reply, Error> {
        let route = match self.route_of(&request) {
            Some(route) => route,
            // An instance has failed, or is late, so another one is chosen.
            None if request.recipients == Recipients::Any && (!request.avoid.is_empty() || request.is_elsewhere()) => {
                Arc::new(Route::LeastInFlight)
            }
            None => return self.deliver_straight(request).await,
        };
        if let Route::One(instance) = &*route {
            let recipients = Recipients::One(instance.clone());
            return self.deliver_straight(Request { recipients, ..request }).await;
        }
        let mut has_lost_one = false;
        let outcome = self.deliver_along(&route, request, &mut has_lost_one).await;
        outcome.map_err(|error| if has_lost_one { error.after_another_attempt() } else { error })
    }

    /// Sends a request to its recipients, and waits for the reply.
    async fn deliver_straight(&self, request: Request) -> Result<Reply, Error> {
        let target = request.target.clone().map_err(Error::Invalid)?;
        let passed = self.pass(&target, &request.recipients)?;
        self.pace(&target, request.attempt.as_deref().map(|attempt| attempt.deadline)).await?;
        let heard_of = request.apart.is_some().then_some(&target);
        let since = Instant::now();
        let outcome = self.dispatch(request)?.await;
        if let Some(passed) = passed {
            passed.ends(&outcome);
        }
        if let (Some(target), Ok(reply)) = (heard_of, &outcome) {
            self.0.router.heard(&target.service_text, reply, since.elapsed());
        }
        outcome
    }

    /// Sends a request along a route. Sets `has_lost_one` if an instance may have run it, and does not answer.
    async fn deliver_along(
        &self,
        route: &Arc<Route>,
        mut request: Request,
        has_lost_one: &mut bool,
    ) -> Result<Reply, Error> {
        let target = request.target.clone().map_err(Error::Invalid)?;
        let service = self.0.router.service(&target.service_text);
        let turns = service.turns_of(route);
        // A key stays with its instance.
        let avoided = if matches!(**route, Route::Key(_)) { Vec::new() } else { std::mem::take(&mut request.avoid) };
        let (mut moves, mut tried, mut last) = (0, Vec::new(), None);
        while moves <= MOVES {
            let candidates = if tried.is_empty() {
                self.candidates(&service, &target, request.attempt.as_deref()).await?
            } else {
                service.candidates.borrow().clone()
            };
            // The only one has the other attempt already.
            if request.apart.as_ref().is_some_and(Apart::is_in_haste)
                && candidates.iter().filter(|candidate| !candidate.is_draining).count() < 2
            {
                break;
            }
            let choose = |taken: &[Arc<str>]| {
                let (not, rather_not) =
                    ([&*tried, taken].concat(), [&*avoided, &*request.unknown(&candidates)].concat());
                let others = || route.choose(&candidates, &[&*not, &*rather_not].concat(), &turns);
                let chosen = if rather_not.is_empty() { None } else { others() };
                chosen.or_else(|| route.choose(&candidates, &not, &turns))
            };
            let chosen = match &request.apart {
                Some(apart) => apart.choose(choose, |chosen| chosen.instance.clone()),
                None => choose(&[]),
            };
            let Some(chosen) = chosen else { break };
            tried.push(chosen.instance.clone());
            let recipients = Recipients::One(chosen.instance.to_string());
            let passed = match self.pass(&target, &recipients) {
                Ok(passed) => passed,
                Err(open) => {
                    last.get_or_insert(open);
                    continue;
                }
            };
            self.pace(&target, request.attempt.as_deref().map(|attempt| attempt.deadline)).await?;
            request.has_moved(moves);
            moves += 1;
            let counted = chosen.count();
            let mut sent = self.dispatch(Request { recipients, ..request.clone() })?;
            let outcome = tokio::select! {
                biased;
                outcome = &mut sent => Some(outcome),
                () = self.lost(chosen, request.idempotent) => None,
            };
            if let (Some(passed), Some(outcome)) = (passed, &outcome) {
                passed.ends(outcome);
            }
            let said = sent.said();
            if let Some(running) = said.running {
                chosen.says_running(running);
            }
            // The line may have sent an idempotent call more than once.
            *has_lost_one |= request.idempotent && said.is_leaving;
            match outcome {
                Some(Ok(reply)) => {
                    counted.has_ended();
                    return Ok(reply);
                }
                None => {
                    let why = format!("instance {} is gone, and may have run `{target}`", chosen.instance);
                    let gone = Error::Fault(Fault::new(Code::Aborted, why));
                    if !request.idempotent {
                        return Err(gone);
                    }
                    *has_lost_one = true;
                    last = Some(gone);
                }
                // It has not run.
                Some(Err(error)) if said.is_leaving || matches!(error, Error::NoService { .. }) => {
                    chosen.missed();
                    let (service, instance) = (service.name.clone(), chosen.instance.clone());
                    self.0.router.want(Wanted::Instance { service, instance });
                    last = Some(error);
                }
                // This client's connection was lost, and the instance's queue perhaps with it.
                Some(Err(error @ Error::Disconnected { may_have_run: true, .. }))
                    if request.idempotent && !self.is_closed() =>
                {
                    *has_lost_one = true;
                    last = Some(error);
                }
                Some(Err(error)) => {
                    if matches!(error, Error::Timeout { .. }) {
                        counted.has_ended();
                    }
                    return Err(error);
                }
            }
        }
        // Without any other instance, whoever takes it.
        let is_for_any = tried.is_empty() && self.route_of(&request).is_none();
        if !request.is_elsewhere() && (matches!(**route, Route::Zone { .. }) || is_for_any) {
            request.has_moved(moves);
            request.route = None;
            return self.deliver_straight(request).await;
        }
        Err(last.unwrap_or_else(|| Error::NoService { service: service.name.to_string(), method: None }))
    }

    /// Resolves when an instance does not answer a call any more. An idempotent call may go to another at once. Any other
    /// waits for a reply that is on its way.
    async fn lost(&self, chosen: &Candidate, idempotent: bool) {
        if idempotent {
            return chosen.lost().await;
        }
        chosen.gone().await;
        self.timer(Instant::now() + LATE_REPLY).await;
    }

    /// The instances of a service. If none is known that takes calls, it waits for a connection and asks.
    async fn candidates(
        &self,
        service: &Arc<RoutedService>,
        target: &Target,
        attempt: Option<&Attempt>,
    ) -> Result<Arc<[Candidate]>, Error> {
        let is_known = |candidates: &Arc<[Candidate]>| candidates.iter().any(|candidate| !candidate.is_draining);
        let known = service.candidates.borrow().clone();
        if is_known(&known) {
            return Ok(known);
        }
        let attempt = attempt.copied().unwrap_or_else(|| Attempt::first(self.time_for(None, None)));
        let mut state = self.state();
        tokio::select! {
            biased;
            _ = state.wait_for(|state| *state == State::Closed || state.missing().is_none()) => {}
            () = self.timer(attempt.deadline) => {
                let (method, after) = (target.to_string(), attempt.timeout);
                return Err(Error::Timeout { method, after, why: Unanswered::Unsent });
            }
        }
        if self.is_closed() {
            return Err(self.disconnected(target, false));
        }
        let mut seen = service.candidates.subscribe();
        self.0.router.want(Wanted::Service(service.clone()));
        tokio::select! {
            biased;
            _ = seen.wait_for(is_known) => {}
            () = self.timer(attempt.deadline.min(Instant::now() + KNOWN)) => {}
        }
        Ok(service.candidates.borrow().clone())
    }
}
