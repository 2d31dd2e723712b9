//! Where RabbitMQ tells which queues are deleted: its plugin `rabbitmq_event_exchange` has an exchange for all that happens
//! in the broker, in one of the virtual hosts. Nobody else may declare an exchange of that name.

use super::{Binding, header};

/// The exchange of the broker's events.
pub(crate) const EXCHANGE: &str = "amq.rabbitmq.event";
/// The key of the event that a queue was deleted.
const KEY: &str = "queue.deleted";
/// The header with the name of the queue. It is the second one where the plugin is set to write AMQP 1.0.
const NAMES: [&str; 2] = ["name", "x-opt-name"];

/// The binding by which `queue` gets these events.
pub(crate) fn told_to(queue: &str) -> Binding {
    Binding { exchange: EXCHANGE.to_owned(), key: KEY.to_owned(), queue: queue.to_owned() }
}

/// The queue that is gone, by the headers of an event.
pub(crate) fn queue(headers: &[(String, String)]) -> Option<&str> {
    NAMES.iter().find_map(|name| header::value(headers, name))
}
