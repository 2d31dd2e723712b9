//! A broker that requeues what was not acknowledged in time. The time is its `consumer_timeout`, half an hour by
//! default.

use std::collections::HashMap;
use std::future::IntoFuture as _;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use hopline::{Code, Context, Error, Fault, Method, Running, Service, State};
use tokio::sync::watch;

use super::LONG;
use crate::node::{Node, version};
use crate::support::{Scene, soon};

/// The `consumer_timeout` in milliseconds. Each job works for this long, and waits for nothing.
const LIMIT: &str = "2000";
const WORK: Duration = Duration::from_secs(5);

/// How many times each job has begun, how many jobs have ended, and whether a job whose work is done may end.
#[derive(Clone)]
struct Runs {
    begun: Arc<Mutex<HashMap<u64, usize>>>,
    ended: Arc<watch::Sender<usize>>,
    may_end: Arc<watch::Sender<bool>>,
}

impl Runs {
    fn new() -> Self {
        Self { begun: Arc::default(), ended: Arc::new(watch::channel(0).0), may_end: Arc::new(watch::channel(true).0) }
    }

    /// Jobs that do not end before the test [lets](Self::let_end) them, which it does after the broker has requeued
    /// them.
    fn held() -> Self {
        Self { may_end: Arc::new(watch::channel(false).0), ..Self::new() }
    }

    fn let_end(&self) {
        self.may_end.send_replace(true);
    }

    fn begun(&self) -> HashMap<u64, usize> {
        self.begun.lock().expect("no panic").clone()
    }
}

async fn impatient(version: &str) -> Node {
    let node = Node::with(version, &format!("consumer_timeout = {LIMIT}\n"), &[], &[]).await;
    // Before 4.3 each channel checks this only once a minute.
    node.eval("application:set_env(rabbit, channel_tick_interval, 500).").await;
    node
}

/// An instance that runs two jobs at a time, and has prefetched two more.
async fn worker(scene: &Scene, runs: &Runs) -> Running {
    let runs = runs.clone();
    let job = move |_: Context, (number,): (u64,)| {
        *runs.begun.lock().expect("no panic").entry(number).or_default() += 1;
        let (ended, mut may_end) = (runs.ended.clone(), runs.may_end.subscribe());
        async move {
            tokio::time::sleep(WORK).await;
            may_end.wait_for(|may| *may).await.expect("the test holds it");
            ended.send_modify(|ended| *ended += 1);
            Ok::<_, Fault>(number)
        }
    };
    scene.serve(Service::new("jobs", 1).method(Method::new("work").oneway(), job).concurrency(2).prefetch(4)).await
}

/// Whether the broker requeues what was not acknowledged in time. 3.10 has one limit for all consumers. 4.3 has it only
/// for quorum queues, whose consumers set their own.
fn takes_back(version: &str) -> bool {
    version == "3.10"
}

/// Checks that the server knows that the broker has requeued something, if this version does; otherwise, that nothing
/// is wrong.
async fn was_told(version: &str, running: &Running) {
    if takes_back(version) {
        let mut state = running.state();
        let told =
            |state: &State| matches!(state, State::Degraded { reason, .. } if reason.contains("consumer_timeout"));
        soon(state.wait_for(told)).await.expect("it serves");
    } else {
        assert_eq!(*running.state().borrow(), State::Ready);
    }
}

fn once(jobs: u64) -> HashMap<u64, usize> {
    (0..jobs).map(|job| (job, 1)).collect()
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn oneway_jobs_that_take_or_wait_for_longer_than_the_limit_run_once() {
    let version = version();
    let node = impatient(&version).await;
    let (scene, runs) = (Scene::at(node.url()), Runs::new());
    let [one, two] = [worker(&scene, &runs).await, worker(&scene, &runs).await];
    let (client, mut ended) = (scene.client().await, runs.ended.subscribe());
    let jobs = join_all((0..8).map(|job| client.oneway("jobs", "work", (job,)).send()));
    soon(jobs).await.into_iter().for_each(|sent| sent.expect("the broker has it"));
    was_told(&version, &one).await;
    soon(ended.wait_for(|ended| *ended == 8)).await.expect("it goes on");
    let work = format!("{}.jobs.v1.work", scene.namespace);
    node.queues_when(|queues| queues.iter().any(|queue| queue.name == work && queue.messages == 0)).await;
    assert_eq!(runs.begun(), once(8));
    soon(one.drain()).await;
    soon(two.drain()).await;
    let dead = format!("{}.jobs.v1.dead", scene.namespace);
    node.queues_when(|queues| queues.iter().any(|queue| queue.name == dead && queue.messages == 0)).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn calls_that_take_longer_than_the_limit_are_answered_by_the_instance_that_runs_them() {
    let version = version();
    let node = impatient(&version).await;
    let (scene, runs) = (Scene::at(node.url()), Runs::held());
    let [one, two] = [worker(&scene, &runs).await, worker(&scene, &runs).await];
    let client = scene.client().await;
    let calls = (0..4).map(|job| client.call::<u64>("jobs", "work", (job,)).timeout(LONG).into_future());
    let calls = tokio::spawn(join_all(calls));
    // Each instance has some of the jobs.
    was_told(&version, &one).await;
    was_told(&version, &two).await;
    runs.let_end();
    for (job, outcome) in (0..).zip(soon(calls).await.expect("no panic")) {
        assert_eq!(outcome.expect("its instance lives"), job);
    }
    was_told(&version, &one).await;
    was_told(&version, &two).await;
    assert_eq!(runs.begun(), once(4));
    soon(one.drain()).await;
    soon(two.drain()).await;
}

#[tokio::test]
#[ignore = "starts a RabbitMQ of its own: HOPLINE_TEST_NODE"]
async fn calls_to_one_instance_that_wait_for_longer_than_the_limit_are_not_lost() {
    let version = version();
    let node = impatient(&version).await;
    let (scene, runs) = (Scene::at(node.url()), Runs::held());
    let worker = worker(&scene, &runs).await;
    let client = scene.client().await;
    let call = |job| client.call::<u64>("jobs", "work", (job,)).to(worker.instance()).timeout(LONG);
    // It runs two at a time, in the order of arrival.
    let mut running = Vec::new();
    for job in 0..4 {
        running.push(call(job).start().await.expect("on its way"));
    }
    let mut waiting = running.split_off(2);
    was_told(&version, &worker).await;
    if takes_back(&version) {
        // A redelivered message does not tell which of its calls had begun. So none of them runs, not even for the
        // first time.
        for outcome in soon(join_all(waiting.drain(..))).await {
            assert!(matches!(outcome, Err(Error::Fault(Fault { code: Code::Aborted, .. }))), "{outcome:?}");
        }
    }
    runs.let_end();
    let answered = soon(join_all(running.into_iter().chain(waiting))).await;
    let answered: Vec<_> = answered.into_iter().map(|outcome| outcome.expect("it ran")).collect();
    let ran = if takes_back(&version) { 2 } else { 4 };
    assert_eq!(answered, (0..ran).collect::<Vec<_>>());
    assert_eq!(runs.begun(), once(ran), "what was taken back before it ran does not run");
    soon(worker.drain()).await;
}
