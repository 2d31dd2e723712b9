//! What a supervisor does in moments that a user does not see.

use bytes::Bytes;
use uuid::Uuid;

use super::*;
use crate::client::Client;
use crate::context::Context;
use crate::error::Fault;
use crate::server::Server;
use crate::state::State;
use crate::testing;
use crate::transport::{Properties, Publication};

#[tokio::test]
async fn what_looks_after_a_connection_ends_before_there_is_another() {
    let url = format!("memory://{}", Uuid::new_v4());
    let running = Server::connect(&url).await.expect("in memory").start().await.expect("it serves nothing");
    let mut supervisor = Supervisor::new(running.site.clone(), Dial::parse(&url).expect("a good address"));
    let looking = || {
        let (looks, ended) = oneshot::channel::<()>();
        (async move { drop((std::future::pending::<()>().await, looks)) }, ended)
    };
    let (first, first_ended) = looking();
    supervisor.while_connected(first);
    supervisor.reconnect("the test has it lost".into()).await;
    let (second, mut second_ended) = looking();
    supervisor.while_connected(second);
    let first_ended = tokio::time::timeout(PATIENCE, first_ended).await.expect("it has ended");
    assert!(first_ended.is_err(), "it has not come to its end");
    assert!(second_ended.try_recv().is_err_and(|error| error == oneshot::error::TryRecvError::Empty));
}

#[tokio::test(start_paused = true)]
async fn a_drain_that_takes_long_still_hears_of_an_alarm() {
    let broker = testing::broker();
    let service =
        Service::new("work", 1).method("wait", |_: Context, (): ()| std::future::pending::<Result<(), Fault>>());
    let running = Server::connect(&broker).await.expect("in memory").serve(service).start().await.expect("all is new");
    let client = Client::connect(&broker).await.expect("in memory");
    let day = Duration::from_secs(24 * 3600);
    let pending = client.call::<()>("work", "wait", ()).timeout(day).start().await.expect("on its way");
    let site = running.site.clone();
    let mut state = running.state();
    while site.tally().0 == 0 {
        tokio::task::yield_now().await;
    }
    let drained = tokio::spawn(running.drain());
    // This is enough time to try the first address several times.
    tokio::time::sleep(day / 24).await;
    assert!(!drained.is_finished(), "a call runs");
    let transport = site.transport();
    broker.alarm("low on memory");
    let (exchange, key) = (String::new(), "any".to_owned());
    let (properties, body) = (Properties::default(), Bytes::new());
    let receipt = transport.publish(Publication { exchange, key, mandatory: false, properties, body });
    let blocked = state.wait_for(|state| matches!(state, State::Blocked { .. }));
    tokio::time::timeout(PATIENCE, blocked).await.expect("it is heard").expect("it is told");
    tokio::time::timeout(PATIENCE + START_PATIENCE, drained).await.expect("it ends early").expect("no panic");
    drop((receipt, pending));
}

#[tokio::test]
async fn an_alarm_is_told_while_the_first_address_is_tried() {
    let health = Arc::new(Health::new("books server 1".into()));
    health.connected();
    let (happens, events) = broadcast::channel(8);
    let waiting = health.clone();
    let waiting = tokio::spawn(async move { ended(events, &waiting).await });
    let mut state = health.state.subscribe();
    happens.send(ConnectionEvent::Blocked("low on memory".into())).expect("it is heard");
    state.wait_for(|state| matches!(state, State::Blocked { .. })).await.expect("it is told");
    happens.send(ConnectionEvent::Unblocked).expect("it is heard");
    state.wait_for(|state| *state == State::Ready).await.expect("it is told");
    happens.send(ConnectionEvent::Lost("the test has it lost".into())).expect("it is heard");
    waiting.await.expect("no panic");
}
