//! Defaults and caps that hold for more than one part of the library. Each other one stands where it is used.

use std::time::Duration;

/// The largest message that is sent or accepted unless it is set otherwise, in bytes: what RabbitMQ 4 accepts by default.
pub(crate) const MAX_MESSAGE_SIZE: usize = 16 * 1024 * 1024;
/// The longest time-out of a call. The broker counts a message's time in 32 bits of milliseconds, which is a little more.
pub(crate) const MAX_TIMEOUT: Duration = Duration::from_secs(40 * 24 * 3600);
/// How long a call may take, unless it is set otherwise.
pub(crate) const TIMEOUT: Duration = Duration::from_secs(30);
/// How long a client waits for a broker that accepts nothing, unless it is set otherwise.
pub(crate) const BLOCKED_WAIT: Duration = Duration::from_secs(5);
/// How long connecting to one address may take, unless it is set otherwise. A broker to which some hundreds connect at once
/// may well take 5 s.
pub(crate) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the broker may take to answer one question.
pub(crate) const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a queue of dead letters may take to answer, unless it is set otherwise.
pub(crate) const QUEUE_TIMEOUT: Duration = Duration::from_secs(8);
/// When a call should be tried again that a server has refused since it has too much to do.
pub(crate) const RETRY_AFTER: Duration = Duration::from_millis(100);
/// How many events of a subscription an instance holds.
pub(crate) const EVENTS_PREFETCH: u16 = 64;
/// How many frames a message may hold.
pub(crate) const MAX_FRAMES: usize = 1024;
/// The largest metadata of a frame, in bytes.
pub(crate) const MAX_METADATA: usize = 64 * 1024;
