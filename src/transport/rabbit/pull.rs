//! Takes single messages out of queues (`basic.get`), counts the messages in a queue, and deletes a queue. The dead
//! letters are read in this way.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{FieldTable, ShortString};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connection::{Link, NOT_FOUND, Refusal};
use super::declare;
use super::feed::delivered;
use crate::error::Error;
use crate::transport::rabbit::properties::short;
use crate::transport::{Delivery, Life, QueueCount, Settle, Settler};

/// How long a channel stays open for the next question when all its deliveries are settled.
const IDLE: Duration = Duration::from_secs(1);

/// The answer to a question: a message, or none if the queue is empty.
type Pulled = Result<Handed, Refusal>;
/// Where the answer goes.
type Answer = oneshot::Sender<Pulled>;

/// A message on its way to whoever asked for it. If nobody waits for it any more, it is dropped, and the message is
/// requeued.
#[derive(Debug)]
struct Handed(Option<Delivery>);

impl Drop for Handed {
    fn drop(&mut self) {
        if let Some(delivery) = self.0.take() {
            delivery.settle(Settle::GiveBack);
        }
    }
}

/// Asks for messages. Each queue has a task and a channel of its own: the broker closes the channel when it refuses a
/// question, and requeues what was delivered on it.
#[derive(Debug)]
pub(super) struct Puller {
    link: Arc<Link>,
    /// Cancelled when the transport closes.
    closing: CancellationToken,
    /// The tasks of the queues. Closing waits for them.
    tasks: TaskTracker,
    /// What the broker has not answered. Closing does not wait for it.
    questions: TaskTracker,
    /// The runtime in which the transport was opened.
    runtime: Handle,
    /// The task of each queue. It ends with the connection.
    queues: Mutex<HashMap<String, mpsc::UnboundedSender<Answer>>>,
}

impl Puller {
    pub(super) fn new(link: Arc<Link>, closing: CancellationToken, tasks: TaskTracker, questions: TaskTracker) -> Self {
        Self { link, closing, tasks, questions, runtime: Handle::current(), queues: Mutex::default() }
    }

    /// Takes a message out of a queue; `None` if it is empty. If the future is dropped, the message is requeued.
    ///
    /// # Errors
    /// `Broker` for a refusal, `Disconnected`, `Invalid` for a name that is too long.
    pub(super) async fn get(&self, queue: &str) -> Result<Option<Delivery>, Error> {
        let (answer, told) = oneshot::channel();
        self.ask(queue, short(queue).map_err(Error::Invalid)?, answer);
        told.await
            .unwrap_or_else(|_| Err(ended()))
            .map(|mut handed| handed.0.take())
            .map_err(|refusal| refusal.during(format!("get a message of the queue `{queue}`")))
    }

    /// Passes a question to the task of the queue, which it starts if there is none.
    fn ask(&self, queue: &str, name: ShortString, answer: Answer) {
        let mut queues = self.queues.lock().expect("no panic while holding the queues");
        let questions = queues.entry(queue.to_owned()).or_insert_with(|| {
            let (ask, questions) = mpsc::unbounded_channel();
            let pulling = pull(self.link.clone(), name, questions, self.closing.clone(), self.questions.clone());
            self.tasks.spawn_on(pulling, &self.runtime);
            ask
        });
        // If the task has ended, the connection has. `answer` is dropped then, which the caller sees.
        let _ = questions.send(answer);
    }

    /// Counts the messages in a queue that are ready to be delivered, and its consumers. `None` if there is no such queue.
    ///
    /// # Errors
    /// As [`Puller::get`].
    pub(super) async fn count(&self, queue: &str) -> Result<Option<QueueCount>, Error> {
        let counting = count(self.link.clone(), short(queue).map_err(Error::Invalid)?);
        // It runs on a task, so that the channel is closed even if the caller stops waiting.
        let counted = self.questions.spawn_on(counting, &self.runtime).await;
        counted
            .unwrap_or_else(|_| Err(ended()))
            .map_err(|refusal| refusal.during(format!("count the messages of the queue `{queue}`")))
    }

    /// Deletes a queue. Tells how many of its messages were ready; `None` if there is no such queue.
    ///
    /// # Errors
    /// As [`Puller::get`].
    pub(super) async fn delete(&self, queue: &str) -> Result<Option<u64>, Error> {
        let deleting = delete(self.link.clone(), short(queue).map_err(Error::Invalid)?);
        let deleted = self.questions.spawn_on(deleting, &self.runtime).await;
        let deleted = deleted
            .unwrap_or_else(|_| Err(ended()))
            .map_err(|refusal| refusal.during(format!("delete the queue `{queue}`")))?;
        Ok(deleted.map(|count| count.waiting))
    }
}

/// What callers are told after the connection has ended.
fn ended() -> Refusal {
    Refusal::Ended("the connection was closed".into())
}

/// Counts on a channel of its own, since the broker closes the channel if there is no such queue.
async fn count(link: Arc<Link>, queue: ShortString) -> Result<Option<QueueCount>, Refusal> {
    let channel = link.channel().await?;
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::durable() };
    match link.hear(channel.queue_declare(queue, options, FieldTable::default())).await {
        Ok(queue) => {
            declare::close(&link, &channel).await;
            Ok(Some(QueueCount { waiting: queue.message_count().into(), consumers: queue.consumer_count() }))
        }
        Err(Refusal::Refused { code: NOT_FOUND, text }) if is_missing(&text) => Ok(None),
        Err(refusal) => Err(refusal),
    }
}

/// Counts before it deletes: for the broker, deleting a queue that is not there is no error, and of a quorum queue it
/// tells a number that may be some seconds old.
async fn delete(link: Arc<Link>, queue: ShortString) -> Result<Option<QueueCount>, Refusal> {
    let counted = count(link.clone(), queue.clone()).await?;
    if counted.is_some() {
        let channel = link.channel().await?;
        link.hear(channel.queue_delete(queue, QueueDeleteOptions::default())).await?;
        declare::close(&link, &channel).await;
    }
    Ok(counted)
}

/// Whether the queue does not exist. The broker also says NOT_FOUND of a queue whose node is down, but in other words.
fn is_missing(text: &str) -> bool {
    text.contains("no queue")
}

/// The task of one queue. It answers questions until the connection ends or closes, or until nobody can ask any more.
async fn pull(
    link: Arc<Link>,
    queue: ShortString,
    mut questions: mpsc::UnboundedReceiver<Answer>,
    closing: CancellationToken,
    unanswered: TaskTracker,
) {
    let mut open: Option<Pulling> = None;
    let mut is_asked = false;
    loop {
        let is_idle = open.as_ref().is_some_and(|pulling| pulling.out == 0);
        let answer = tokio::select! {
            biased;
            Some((tag, settle)) = settled(&mut open) => {
                if let Some(pulling) = &mut open {
                    pulling.settle(&link, tag, settle);
                }
                continue;
            }
            _ = link.end() => return,
            () = closing.cancelled() => break,
            answer = questions.recv() => answer,
            () = tokio::time::sleep(IDLE), if is_idle => {
                if let Some(pulling) = open.take() {
                    declare::close(&link, &pulling.channel).await;
                }
                continue;
            }
        };
        let Some(answer) = answer else { break };
        if answer.is_closed() {
            // Whoever asked has stopped waiting while another question had no answer.
            continue;
        }
        let asking = async {
            match opened(&mut open, &link).await {
                Ok(pulling) => pulling.next(&link, queue.as_str()).await,
                Err(refusal) => Err(refusal),
            }
        };
        let pulled = tokio::select! {
            pulled = asking => pulled,
            () = closing.cancelled() => {
                is_asked = true;
                break;
            }
        };
        open = open.filter(|_| pulled.is_ok());
        let is_empty = matches!(&pulled, Ok(Handed(None)));
        // If nobody waits for the answer any more, it is dropped, and its message is requeued.
        let _ = answer.send(pulled);
        // An empty queue is seldom asked again at once, and there may be few channels left.
        if is_empty && let Some(pulling) = open.take_if(|pulling| pulling.out == 0) {
            declare::close(&link, &pulling.channel).await;
        }
    }
    if let Some(mut pulling) = open {
        while let Ok((tag, settle)) = pulling.settled.try_recv() {
            pulling.settle(&link, tag, settle);
        }
        if is_asked {
            // The broker has not answered on this channel. Dropping the channel now would end the connection in lapin,
            // so a task keeps it until the connection has ended.
            unanswered.spawn(async move { (link.end().await, pulling.channel) });
        } else {
            declare::close(&link, &pulling.channel).await;
        }
    }
}

/// How the next delivery was settled. Never resolves while there is no channel.
async fn settled(open: &mut Option<Pulling>) -> Option<(u64, Settle)> {
    match open {
        Some(pulling) => pulling.settled.recv().await,
        None => std::future::pending().await,
    }
}

/// The open channel, or a new one.
async fn opened<'a>(open: &'a mut Option<Pulling>, link: &Link) -> Result<&'a mut Pulling, Refusal> {
    let pulling = match open.take() {
        Some(pulling) => pulling,
        None => {
            let (settler, settled) = mpsc::unbounded_channel();
            let channel = link.channel().await?;
            link.wire().get_on(channel.id());
            Pulling { channel, out: 0, life: Arc::default(), settler, settled }
        }
    };
    Ok(open.insert(pulling))
}

/// An open channel and its deliveries. Their tags mean nothing on another channel.
struct Pulling {
    channel: lapin::Channel,
    /// How many deliveries are not settled.
    out: usize,
    life: Arc<Life>,
    /// Deliveries send their tag here when they are settled.
    settler: mpsc::UnboundedSender<(u64, Settle)>,
    settled: mpsc::UnboundedReceiver<(u64, Settle)>,
}

impl Pulling {
    /// Asks the broker for the next message.
    async fn next(&mut self, link: &Link, queue: &str) -> Pulled {
        let message = link.hear_of(link.wire().get(self.channel.id(), queue)).await?;
        self.out += usize::from(message.is_some());
        Ok(Handed(message.map(|message| {
            let (tag, channel, life) = (message.envelope.tag, self.settler.clone(), self.life.clone());
            delivered(message, Some(Settler::Channel { tag, channel, life }))
        })))
    }

    /// Settles a delivery.
    fn settle(&mut self, link: &Link, tag: u64, settle: Settle) {
        self.out -= 1;
        link.wire().settle(self.channel.id(), tag, settle);
    }
}
