//! What each contender promises for the call that is measured here. Calls/s alone would compare unlike things.

use crate::scenario::Contender;

/// The heads of the columns.
pub(crate) const TITLES: [&str; 7] = [
    "contender",
    "a request is confirmed",
    "no queue or server takes a request",
    "a reply is confirmed",
    "a request is acknowledged",
    "the server dies with it",
    "a call without a reply ends",
];

/// What is said below them.
pub(crate) const NOTE: &str = "\
This is what the code that is measured does, with each library's defaults. \"Confirmed\" is by the broker (publisher \
confirms), and \"at once\" is by the flag `mandatory`, or by \"no responders\" of NATS. No request is on a disk: over \
RabbitMQ all queues of requests are durable, and the messages in them are not. In the table of oneway calls all \
contenders are alike: persistent messages to a quorum queue, each confirmed before the call ends, acknowledged by the \
server, at least once. Servers over RabbitMQ take 64 requests ahead, and Hopline's take 256 calls. Without a broker at \
most 1 000 calls are with the server, and further ones wait in the client. aio-pika is used by its `patterns.RPC`, and \
amqplib as in RabbitMQ's tutorial on RPC. Where a library leaves TCP_NODELAY to its users (amqplib, tarpc), it is set.";

/// A row of them.
pub(crate) fn of(contender: Contender) -> [&'static str; 6] {
    const AGAIN: &str = "it runs again (at least once)";
    const BY_HAND: [&str; 6] = ["no", "nobody is told", "no", "after its reply is written", AGAIN, "never"];
    match contender {
        Contender::Hopline | Contender::HoplineOff => [
            "yes",
            "the caller is told at once",
            "yes",
            "after its reply is confirmed",
            "it does not run again unless it is `idempotent` (at most once), and the caller is told",
            "after 30 s",
        ],
        Contender::Lapin | Contender::Amqprs | Contender::Kanin | Contender::Amqplib => BY_HAND,
        Contender::AioPika => {
            ["yes", "the caller is told at once", "yes", "after its reply is confirmed", AGAIN, "never"]
        }
        Contender::Nats => ["no", "the caller is told at once", "no", "no", "it is lost (at most once)", "after 10 s"],
        Contender::Tonic => [
            "no broker",
            "the caller is told at once",
            "no broker",
            "no",
            "it is lost, and the caller is told",
            "never",
        ],
        Contender::Tarpc => [
            "no broker",
            "the caller is told at once",
            "no broker",
            "no",
            "it is lost, and the caller is told",
            "after 10 s",
        ],
    }
}
