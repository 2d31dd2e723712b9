//! What a stream of the broker in memory keeps: its messages, and where and when each was written.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::SystemTime;

use tokio::time::Instant;

use super::queue::StoredMessage;
use crate::topology;
use crate::transport::StreamStart;

/// The messages of a stream, the oldest first. It is empty for every other queue.
#[derive(Default)]
pub(super) struct StreamLog {
    /// The offset of the oldest message that is there.
    first: u64,
    kept: VecDeque<(Arc<StoredMessage>, Instant)>,
    /// The bodies of all of them, in bytes.
    bytes: u64,
}

impl StreamLog {
    pub(super) fn len(&self) -> usize {
        self.kept.len()
    }

    pub(super) fn push(&mut self, message: Arc<StoredMessage>) {
        self.bytes += message.body.len() as u64;
        self.kept.push_back((message, Instant::now()));
    }

    /// Deletes what the stream need not keep. The last message always stays, as on RabbitMQ the last file does.
    pub(super) fn trim(&mut self, stream: &topology::Queue) {
        let now = Instant::now();
        while self.kept.len() > 1
            && let Some((message, written)) = self.kept.front()
            && (stream.max_bytes.is_some_and(|most| self.bytes > most)
                || stream.max_age.is_some_and(|most| now.duration_since(*written) > most))
        {
            self.bytes -= message.body.len() as u64;
            self.first += 1;
            self.kept.pop_front();
        }
    }

    /// The offset of the last message.
    pub(super) fn last(&self) -> Option<u64> {
        self.end().checked_sub(1)
    }

    /// The offset of the next message that is written.
    fn end(&self) -> u64 {
        self.first + self.kept.len() as u64
    }

    /// The offset at which a consumer begins.
    pub(super) fn start(&self, from: StreamStart) -> u64 {
        match from {
            StreamStart::First => self.first,
            StreamStart::Last => self.last().unwrap_or_default(),
            StreamStart::Offset(offset) => offset,
            StreamStart::Time(time) => match SystemTime::now().duration_since(time) {
                Ok(ago) => {
                    // The messages have the time of tokio's clock, which a test may have moved.
                    let since = Instant::now().checked_sub(ago);
                    let earlier = |written: Instant| since.is_some_and(|since| written < since);
                    self.first + self.kept.partition_point(|(_, written)| earlier(*written)) as u64
                }
                Err(_) => self.end(),
            },
        }
    }

    /// The message at this offset, or the oldest after it, with its offset.
    pub(super) fn at_or_after(&self, offset: u64) -> Option<(u64, Arc<StoredMessage>)> {
        let offset = offset.max(self.first);
        let place = usize::try_from(offset - self.first).ok()?;
        self.kept.get(place).map(|(message, _)| (offset, message.clone()))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use bytes::Bytes;

    use super::*;
    use crate::topology::{Queue, QueueKind};
    use crate::transport::Properties;

    const HOUR: Duration = Duration::from_secs(3600);

    fn stream() -> Queue {
        Queue::new("stream", QueueKind::Stream)
    }

    fn message(bytes: usize) -> Arc<StoredMessage> {
        let (exchange, key, properties) = (String::new(), String::new(), Properties::default());
        Arc::new(StoredMessage { exchange, key, properties, body: Bytes::from(vec![0; bytes]), death: None })
    }

    /// A log to which a message is written every hour, the last one now.
    async fn hourly(messages: usize) -> StreamLog {
        let mut log = StreamLog::default();
        for number in 0..messages {
            if number > 0 {
                tokio::time::advance(HOUR).await;
            }
            log.push(message(10));
        }
        log
    }

    fn oldest(log: &StreamLog) -> Option<u64> {
        log.at_or_after(0).map(|(offset, _)| offset)
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_too_old_goes_but_never_the_last_message() {
        let mut log = hourly(5).await;
        let bounded = Queue { max_age: Some(2 * HOUR), ..stream() };
        log.trim(&stream());
        assert_eq!((oldest(&log), log.len()), (Some(0), 5));
        log.trim(&bounded);
        assert_eq!((oldest(&log), log.len()), (Some(2), 3));
        tokio::time::advance(10 * HOUR).await;
        log.trim(&bounded);
        assert_eq!((oldest(&log), log.last(), log.len()), (Some(4), Some(4), 1));
        log.push(message(10));
        log.trim(&bounded);
        assert_eq!((oldest(&log), log.last()), (Some(5), Some(5)));
    }

    #[tokio::test]
    async fn the_oldest_make_room_for_bytes_but_never_the_last_message() {
        let mut log = StreamLog::default();
        let bounded = Queue { max_bytes: Some(25), ..stream() };
        for (bytes, first) in [(10, 0), (10, 0), (10, 1), (5, 1), (100, 4), (10, 5), (15, 5)] {
            log.push(message(bytes));
            log.trim(&bounded);
            assert_eq!(oldest(&log), Some(first));
        }
        assert_eq!((log.bytes, log.last()), (25, Some(6)));
    }

    #[tokio::test(start_paused = true)]
    async fn a_reader_begins_exactly_where_it_says() {
        let mut log = hourly(5).await;
        let ago = |hours: f64| StreamStart::Time(SystemTime::now() - HOUR.mul_f64(hours));
        let starts = [
            (StreamStart::First, 0),
            (StreamStart::Last, 4),
            (StreamStart::Offset(3), 3),
            (StreamStart::Offset(9), 9),
            (ago(10.0), 0),
            (ago(2.5), 2),
            (ago(0.5), 4),
            (StreamStart::Time(SystemTime::UNIX_EPOCH), 0),
            (StreamStart::Time(SystemTime::now() + HOUR), 5),
        ];
        for (from, expected) in starts {
            assert_eq!(log.start(from), expected, "{from:?}");
        }
        log.trim(&Queue { max_bytes: Some(20), ..stream() });
        assert_eq!((log.start(StreamStart::First), log.start(ago(10.0))), (3, 3));
        assert_eq!(log.at_or_after(1).map(|(offset, _)| offset), Some(3));
        assert!(log.at_or_after(5).is_none());
        assert_eq!((StreamLog::default().last(), StreamLog::default().start(StreamStart::Last)), (None, 0));
    }
}
