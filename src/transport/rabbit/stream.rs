//! Streams: where a consumer begins, and where the stream ends.

use std::time::{Duration, UNIX_EPOCH};

use lapin::types::AMQPValue;
use tokio::time::timeout;

use super::RabbitConnection;
use crate::error::Error;
use crate::limits::ANSWER_TIMEOUT;
use crate::transport::{Mode, StreamStart};

/// How long a message is waited for of a stream in which the broker counts none. It counts with a delay.
const EMPTY_AFTER: Duration = Duration::from_secs(1);

/// The value of `x-stream-offset`. AMQP's times are whole seconds.
pub(super) fn offset(from: StreamStart) -> AMQPValue {
    match from {
        StreamStart::First => AMQPValue::LongString("first".into()),
        StreamStart::Last => AMQPValue::LongString("last".into()),
        StreamStart::Offset(offset) => AMQPValue::LongLongInt(i64::try_from(offset).unwrap_or(i64::MAX)),
        StreamStart::Time(time) => {
            AMQPValue::Timestamp(time.duration_since(UNIX_EPOCH).map(|since| since.as_secs()).unwrap_or_default())
        }
    }
}

impl RabbitConnection {
    /// The offset of a stream's last message. `None` if it has none.
    ///
    /// The broker tells it nowhere. So a consumer begins with the last messages that were written together. The broker
    /// sends everything up to the end of the stream at once, since the prefetch is larger than what is written
    /// together. So when the first message has come, the consumer is cancelled: the end is what comes before the
    /// broker confirms that.
    pub(in crate::transport) async fn last_offset(&self, stream: &str) -> Result<Option<u64>, Error> {
        let mode = Mode::Stream { from: StreamStart::Last, prefetch: u16::MAX };
        let mut consumer = self.consume(stream, mode).await?;
        let is_empty = self.count(stream).await?.is_none_or(|count| count.waiting == 0);
        let patience = if is_empty { EMPTY_AFTER } else { ANSWER_TIMEOUT };
        let first = timeout(patience, consumer.next()).await;
        if !is_empty && !matches!(first, Ok(Some(_))) {
            return Err(Error::silent(format!("deliver the last message of the stream `{stream}`"), ANSWER_TIMEOUT));
        }
        let mut last = first.ok().flatten().and_then(|delivery| delivery.offset);
        consumer.cancel();
        while let Some(delivery) = consumer.next().await {
            last = last.max(delivery.offset);
        }
        Ok(last)
    }
}
