//! Unsubscribing: a server that runs takes no more events of a group or a pattern, and goes on with all else.

use std::sync::Arc;
use std::time::Duration;

use tracing::{debug, info};

use super::Running;
use super::health::Trouble;
use super::reading::Declared;
use super::worker::Worker;
use crate::error::Error;

/// How long it waits for declarations that are going on.
const DECLARED: Duration = Duration::from_secs(3);

impl Running {
    /// Takes no more events of the group `name`, or of the subscriptions to the pattern `name` that have no group.
    /// Returns when the handlers of the events that it has received have ended. Everything else is served as before. The
    /// group's queue stays at the broker, where events wait for other instances. To have no more come,
    /// [remove the group](crate::Groups::remove).
    ///
    /// If this future is dropped, no more events are taken all the same, but the queue of a subscription without a group
    /// may stay until the connection ends.
    ///
    /// ```
    /// use hopline::{Context, Server, Subscription};
    ///
    /// # #[tokio::main(flavor = "current_thread")]
    /// # async fn main() -> Result<(), hopline::Error> {
    /// let bill = |_: Context, order: u64| async move { println!("{order}") };
    /// let server = Server::connect("memory://").await?.subscribe(Subscription::to("order.*").shared("billing"), bill);
    /// let running = server.start().await?;
    /// running.unsubscribe("billing").await?;
    /// # running.drain().await;
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// `Invalid` if this server has no such subscription, or has unsubscribed before. `Invalid` for a group that is
    /// [ordered](crate::Subscription::ordered_by) and does not replay: the broker would give its next events to another
    /// instance while earlier ones run here. [Drain](Self::drain) the server instead.
    pub async fn unsubscribe(&self, name: &str) -> Result<(), Error> {
        let site = &self.site;
        let mut workers = site.workers();
        workers.retain(|worker| worker.service.pattern.is_some() && !worker.ending.is_cancelled());
        let is_group = |worker: &Arc<Worker>| worker.id.is_group();
        let (groups, alone): (Vec<_>, Vec<_>) = workers.into_iter().partition(is_group);
        let of_name = |worker: &Arc<Worker>| worker.id.name() == name || &*worker.name == name;
        let mut meant: Vec<_> = groups.into_iter().filter(of_name).collect();
        if let Some(ordered) =
            meant.iter().find(|worker| worker.service.order.is_some() && worker.service.replay.is_none())
        {
            let group = ordered.id.name();
            return Err(Error::Invalid(format!("the group `{group}` is ordered: drain the server to end it here")));
        }
        if meant.is_empty() {
            meant = alone.into_iter().filter(|worker| worker.service.pattern.as_deref() == Some(name)).collect();
        }
        if meant.is_empty() {
            return Err(Error::Invalid(format!("this server has no subscription of the group or pattern `{name}`")));
        }
        meant.iter().for_each(|worker| worker.ending.cancel());
        // A declaration that is going on would make a queue that nobody consumes. About a queue whose node is down it may
        // go on for long.
        drop(tokio::time::timeout(DECLARED, site.declaring.write()).await);
        for worker in &meant {
            worker.read.close();
            worker.read.wait().await;
            worker.ended.cancel();
            site.health.cured(&worker.dead_trouble());
        }
        self.forget_queues().await;
        info!(name = &*site.name, subscription = name, "takes no more events of it");
        Ok(())
    }

    /// Forgets the queues that are not consumed any more, and deletes those that nobody else consumes. The broker would
    /// go on to put events there.
    async fn forget_queues(&self) {
        let (site, transport) = (&self.site, self.site.transport());
        let forgotten: Vec<Declared> = {
            let topology = site.topology();
            let mut declared = topology.lock();
            let ended = declared.iter().filter(|(_, declared)| declared.queue.end.is_cancelled());
            let ended: Vec<_> = ended.map(|(number, _)| *number).collect();
            ended.iter().filter_map(|number| declared.remove(number)).collect()
        };
        for declared in forgotten {
            site.health.cured(&Trouble::Queue(declared.queue.number));
            let Some(queue) = declared.name().filter(|_| declared.queue.is_own()) else { continue };
            if let Err(error) = transport.delete(queue).await {
                debug!(name = &*site.name, queue, %error, "a queue stays until the connection ends");
            }
        }
    }
}
