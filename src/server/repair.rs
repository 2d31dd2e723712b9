//! Repair: checks every few seconds whether the exchanges and bindings of a server still exist. If an operator deletes
//! them, the broker tells nobody.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tracing::{debug, warn};

use super::Site;
use super::health::Trouble;
use super::reading::{Reading, Topology};
use crate::error::Error;
use crate::topology::Declaration;
use crate::transport::Transport;

/// How often the server checks.
const EVERY: Duration = Duration::from_secs(5);
/// How often it checks while the broker refuses to declare something.
const LONGEST: Duration = Duration::from_secs(60);
/// Each check declares this part of the bindings again: a third. AMQP cannot tell whether a binding exists, and
/// declaring one is expensive for the broker.
const LOOKS: usize = 3;
/// How many refusals one check may cause. Each of them costs the connection one of about two thousand channel numbers.
const REFUSALS: usize = 4;

/// Checks until the server drains or the connection ends.
pub(super) async fn keep_repaired(site: Arc<Site>, reading: Arc<Reading>) {
    let (mut turn, mut pause) = (0, EVERY);
    loop {
        tokio::select! {
            () = site.draining.cancelled() => return,
            () = tokio::time::sleep(pause) => {}
        }
        site.health.look();
        let declaring = site.declaring.read().await;
        if site.draining.is_cancelled() {
            return;
        }
        let looking = look(&site, &reading.transport, &reading.topology, &mut turn);
        let looked = site.health.sees_through(&Trouble::Exchanges, "what leads to its queues", looking).await;
        drop(declaring);
        match looked {
            Ok(()) => {
                pause = EVERY;
                site.health.cured(&Trouble::Exchanges);
            }
            Err(Error::Disconnected { .. }) => return,
            Err(error) => {
                pause = (pause * 2).min(LONGEST);
                let why = format!(
                    "what leads to its queues cannot be declared again: give its user the permission, or import it ({error})"
                );
                site.health.suffers(Trouble::Exchanges, why);
            }
        }
    }
}

/// Checks once: whether all exchanges exist, and a part of the bindings. `turn` is the position among the bindings.
async fn look(site: &Site, transport: &Transport, topology: &Topology, turn: &mut usize) -> Result<(), Error> {
    let parts = parts(site, topology);
    let exchanges: BTreeSet<String> = parts.iter().filter_map(exchange).collect();
    let missing = transport.missing(&exchanges.into_iter().collect::<Vec<_>>()).await?;
    if !missing.is_empty() {
        warn!(name = &*site.name, exchanges = ?missing, "exchanges were deleted: they are declared again, with the bindings to this server's queues");
        return declare(site, transport, &parts).await.1;
    }
    let bindings: Vec<Declaration> = parts.into_iter().filter(is_binding).collect();
    let some: Vec<Declaration> =
        bindings.iter().cycle().skip(*turn).take(bindings.len().div_ceil(LOOKS)).cloned().collect();
    let (seen, declared) = declare(site, transport, &some).await;
    *turn = (*turn + seen) % bindings.len().max(1);
    declared
}

/// Declares these parts. If one fails, the others are still declared, unless the server drains. Returns how many parts
/// it has seen.
async fn declare(site: &Site, transport: &Transport, parts: &[Declaration]) -> (usize, Result<(), Error>) {
    let Err(_) = transport.declare_however_long(parts).await else { return (parts.len(), Ok(())) };
    let (mut missing, mut refusals, mut failed) = (BTreeSet::new(), 0, None);
    for (seen, part) in parts.iter().enumerate() {
        if site.draining.is_cancelled() || refusals >= REFUSALS {
            return (seen, failed.map_or(Ok(()), Err));
        }
        if matches!(part, Declaration::Binding(binding) if missing.contains(&binding.exchange)) {
            continue;
        }
        match transport.declare_however_long(std::slice::from_ref(part)).await {
            Ok(()) => {}
            Err(error @ Error::Disconnected { .. }) => return (seen, Err(error)),
            // Its queue was deleted or replaced in the meantime. The queue's keeper looks after that.
            Err(Error::Broker { reason, .. }) if is_binding(part) && reason.starts_with("NOT_FOUND") => {
                debug!(name = &*site.name, reason, "a binding that is to be there has lost an end");
                refusals += 1;
            }
            Err(error) => {
                missing.extend(exchange(part));
                refusals += 1;
                failed.get_or_insert(error);
            }
        }
    }
    (parts.len(), failed.map_or(Ok(()), Err))
}

/// The exchanges and bindings that have to exist for the server's queues, the exchanges first.
fn parts(site: &Site, topology: &Topology) -> Vec<Declaration> {
    let mut parts = site.namespace.exchanges();
    let topology = topology.lock();
    for kind in [is_exchange as fn(&Declaration) -> bool, is_binding] {
        let read = topology.values().filter(|declared| declared.is_read).flat_map(|declared| &declared.parts);
        parts.extend(read.filter(|part| kind(part)).cloned());
    }
    parts
}

fn is_exchange(part: &Declaration) -> bool {
    matches!(part, Declaration::Exchange(_))
}

fn is_binding(part: &Declaration) -> bool {
    matches!(part, Declaration::Binding(_))
}

fn exchange(part: &Declaration) -> Option<String> {
    match part {
        Declaration::Exchange(exchange) => Some(exchange.name.clone()),
        Declaration::Binding(_) | Declaration::Queue(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tokio_util::sync::CancellationToken;
    use uuid::Uuid;

    use super::*;
    use crate::server::reading::Declared;
    use crate::server::served_queue::{Purpose, ServedQueue};
    use crate::server::{Running, Server};
    use crate::service::Service;
    use crate::topology::{Binding, Queue, QueueKind, presence_key};
    use crate::transport::{Confirm, Properties, Publication};

    /// A server of one service without methods.
    async fn served() -> Running {
        let server = Server::connect(&format!("memory://{}", Uuid::new_v4())).await.expect("in memory");
        server.serve(Service::new("work", 1)).start().await.expect("it can be served")
    }

    /// The number of a queue that the server does not have.
    const OTHER: usize = 99;

    fn declared(parts: Vec<Declaration>, is_read: bool) -> Declared {
        let purpose = Purpose::Subscription { pattern: "any".to_owned() };
        Declared { queue: Arc::new(ServedQueue::new(OTHER, purpose, CancellationToken::new())), parts, is_read }
    }

    async fn publish(site: &Site, key: &str) -> Confirm {
        let (exchange, key) = (site.namespace.rpc(), key.to_owned());
        let (properties, body) = (Properties::default(), Bytes::new());
        let publication = Publication { exchange, key, mandatory: true, properties, body };
        site.transport().publish(publication).await.expect("it is connected")
    }

    #[tokio::test(start_paused = true)]
    async fn a_binding_that_has_lost_its_queue_keeps_no_other_from_being_repaired() {
        let running = served().await;
        let (site, transport) = (&running.site, running.site.transport());
        let queue = |name: &str| Declaration::Queue(Queue::new(name, QueueKind::Classic));
        transport.declare(&[queue("there")]).await.expect("it is new");
        let key = |number: usize| format!("repaired.{number}");
        let binding = |number, queue: &str| {
            Declaration::Binding(Binding { exchange: site.namespace.rpc(), key: key(number), queue: queue.to_owned() })
        };
        let parts = ["gone", "there", "there", "gone", "there", "there", "gone", "there"];
        let parts: Vec<_> = (0..).zip(parts).map(|(number, queue)| binding(number, queue)).collect();
        site.topology().lock().insert(OTHER, declared(parts, true));
        let mut turn = 0;
        for _ in 0..LOOKS {
            look(site, &transport, &site.topology(), &mut turn).await.expect("whoever keeps the queue sees to that");
        }
        for number in [1, 2, 4, 5, 7] {
            assert_eq!(publish(site, &key(number)).await, Confirm::Accepted, "{number}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_takes_few_refusals_and_the_next_one_goes_on_where_it_ended() {
        let running = served().await;
        let (site, transport) = (&running.site, running.site.transport());
        transport.declare(&[Declaration::Queue(Queue::new("there", QueueKind::Classic))]).await.expect("it is new");
        let binding = |number| {
            let (exchange, queue) = (site.namespace.rpc(), if number < 20 { "gone" } else { "there" });
            Declaration::Binding(Binding { exchange, key: format!("repaired.{number}"), queue: queue.to_owned() })
        };
        let bindings: Vec<_> = (0..=20).map(binding).collect();
        assert_eq!(declare(site, &transport, &bindings).await.0, REFUSALS);
        site.topology().lock().insert(OTHER, declared(bindings.clone(), false));
        assert!(!parts(site, &site.topology()).contains(&bindings[20]), "what is not read is seen to by its keeper");
        site.topology().lock().insert(OTHER, declared(bindings, true));
        let mut turn = 0;
        for _ in 0..10 {
            look(site, &transport, &site.topology(), &mut turn).await.expect("whoever keeps the queue sees to that");
        }
        assert_eq!(publish(site, "repaired.20").await, Confirm::Accepted);
    }

    #[tokio::test(start_paused = true)]
    async fn a_repair_that_runs_as_the_server_drains_does_not_bind_again_what_the_drain_unbinds() {
        let running = served().await;
        let (site, key) = (running.site.clone(), presence_key("work.v1"));
        assert_eq!(publish(&site, &key).await, Confirm::Accepted);
        let call = site.shared.token();
        let repair = site.declaring.read().await;
        let drained = tokio::spawn(running.drain());
        // The repair goes on until it is cut off.
        tokio::time::sleep(Duration::from_secs(2)).await;
        site.transport().declare(&parts(&site, &site.topology())).await.expect("it is connected");
        drop(repair);
        // This is long enough for many more checks.
        tokio::time::sleep(100 * EVERY).await;
        assert_eq!(publish(&site, &key).await, Confirm::Returned, "it takes no calls");
        assert!(!drained.is_finished(), "a call still runs");
        drop(call);
        drained.await.expect("no panic");
    }
}
