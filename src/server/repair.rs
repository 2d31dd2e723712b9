//! Looks whether what leads to a server's queues is still there: the broker tells nobody when an operator deletes it.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::MissedTickBehavior;
use tracing::{debug, warn};

use super::Site;
use super::health::Trouble;
use crate::error::Error;
use crate::topology::Declaration;
use crate::transport::Transport;

/// How often the server looks.
const EVERY: Duration = Duration::from_secs(5);
/// In how many looks all bindings are declared again, a part of them each time: the broker tells of none whether it is there,
/// and declaring one costs it more than anything else here.
const LOOKS: usize = 3;

/// Looks until the server drains or the connection ends.
pub(super) async fn keep_repaired(site: Arc<Site>, transport: Transport) {
    let mut ticks = tokio::time::interval(EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.tick().await;
    let mut turn = 0;
    loop {
        tokio::select! {
            () = site.draining.cancelled() => return,
            _ = ticks.tick() => {}
        }
        site.health.look();
        match look(&site, &transport, &mut turn).await {
            Ok(()) => site.health.cured(&Trouble::Exchanges),
            Err(Error::Disconnected { .. }) => return,
            Err(error) => site.health.suffers(Trouble::Exchanges, error.to_string()),
        }
    }
}

/// Looks once: for every exchange, and at some of the bindings.
async fn look(site: &Site, transport: &Transport, turn: &mut usize) -> Result<(), Error> {
    let parts = parts(site);
    let exchanges: BTreeSet<String> = parts.iter().filter_map(exchange).collect();
    let missing = transport.missing(&exchanges.into_iter().collect::<Vec<_>>()).await?;
    if !missing.is_empty() {
        warn!(name = &*site.name, exchanges = ?missing, "exchanges were deleted: they are declared again, with the bindings to this server's queues");
        transport.declare(&parts).await?;
        return Ok(());
    }
    let bindings: Vec<Declaration> = parts.into_iter().filter(|part| matches!(part, Declaration::Binding(_))).collect();
    let some: Vec<Declaration> =
        bindings.iter().cycle().skip(*turn).take(bindings.len().div_ceil(LOOKS)).cloned().collect();
    *turn = (*turn + some.len()) % bindings.len().max(1);
    match transport.declare(&some).await {
        // Its queue was replaced or deleted meanwhile: whoever keeps the queue sees to it.
        Err(Error::Broker { reason, .. }) if reason.starts_with("NOT_FOUND") => {
            debug!(name = &*site.name, reason, "a binding that is to be there has lost an end");
            Ok(())
        }
        declared => declared,
    }
}

/// What leads to the server's queues: exchanges first.
fn parts(site: &Site) -> Vec<Declaration> {
    let mut parts = site.namespace.exchanges();
    let topology = site.topology();
    for kind in [is_exchange as fn(&Declaration) -> bool, is_binding] {
        parts.extend(topology.values().flatten().filter(|part| kind(part)).cloned());
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
