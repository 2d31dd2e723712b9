//! Watching the instances: a stream of what changes among them. `registry/instance_watch.rs` finds it out.

use futures::{Stream, StreamExt as _, stream};

use super::Registry;
use super::instance_watch::{InstanceWatch, Watched};
use crate::document::Instance;

/// What has changed among the instances.
///
/// ```
/// use futures::StreamExt;
/// use hopline::Change;
///
/// # async fn example(client: hopline::Client) {
/// let mut changes = client.registry().watch();
/// while let Some(change) = changes.next().await {
///     match change {
///         Change::Up(instance) => println!("{} serves {}", instance.instance, instance.service),
///         Change::Down { service, instance } => println!("{instance} serves {service} no more"),
///         _ => {}
///     }
/// }
/// # }
/// ```
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Change {
    /// An instance is there. At first, each that is there already is told.
    Up(Instance),
    /// What an instance says of itself has changed: above all, it drains.
    Changed(Instance),
    /// An instance is not there any more. One that has lost its connection for more than some seconds is told as down, and
    /// as up again when it is back.
    Down {
        /// The service, as `name.vMAJOR`.
        service: String,
        /// The instance's id.
        instance: String,
    },
}

impl Registry {
    /// What changes among the instances of all services, for as long as the stream lives. It begins with all that are
    /// there. The stream ends when the client is closed. The times and the count of the registry do not matter here.
    ///
    /// An instance that ends cleanly is told at once. One that was killed is told within 10 s, when its connection is
    /// gone at the broker; at once, if RabbitMQ's plugin `rabbitmq_event_exchange` is on in this virtual host and the
    /// client may read from `amq.rabbitmq.event`. One that hangs, or whose machine is gone, is told when the broker has given it up (by its
    /// heartbeat), and in any case when it has left questions unanswered for 95 s. While the client has no connection,
    /// nothing is told; what has changed meanwhile is told when it has one again.
    ///
    /// The client needs the permission to read from the exchange of discovery and to write to its own reply queue. If it
    /// lacks it, all instances are asked every 10 s.
    pub fn watch(&self) -> impl Stream<Item = Change> + Send + Unpin + use<> {
        let watch = (InstanceWatch::new(&self.client), self.client.clone());
        let changes =
            stream::unfold(watch, |(mut watch, client)| async { Some((watch.next().await?, (watch, client))) });
        let changes = changes.filter_map(|watched| {
            std::future::ready(match watched {
                Watched::Changed(change) => Some(change),
                Watched::Returned(_) => None,
            })
        });
        changes.boxed().fuse()
    }
}
