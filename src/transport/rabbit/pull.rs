//! Messages that are asked for one by one, on a channel for each queue, and how many there are.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::FutureExt as _;
use lapin::options::{BasicAckOptions, BasicGetOptions, BasicNackOptions, BasicRejectOptions, QueueDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::connection::{Link, NOT_FOUND, Refusal};
use super::{declare, delivered};
use crate::error::Error;
use crate::transport::rabbit::properties::short;
use crate::transport::{Delivery, Life, Settle, Settler};

/// How long a channel stays open for the next question when nothing is out on it.
const IDLE: Duration = Duration::from_secs(1);

type Pulled = Result<Handed, Refusal>;
type Answer = oneshot::Sender<Pulled>;

/// A message on its way to whoever asked for it: it goes back when nobody waits for it any more.
#[derive(Debug)]
struct Handed(Option<Delivery>);

impl Drop for Handed {
    fn drop(&mut self) {
        if let Some(delivery) = self.0.take() {
            delivery.settle(Settle::GiveBack);
        }
    }
}

/// Where messages are asked for. Each queue has a task and a channel of its own: with a refusal the broker closes the
/// channel, and takes back what is out on it.
#[derive(Debug)]
pub(super) struct Puller {
    link: Arc<Link>,
    closing: CancellationToken,
    tasks: TaskTracker,
    /// What is asked and not answered.
    questions: TaskTracker,
    runtime: Handle,
    /// Where the tasks are asked, which end with the connection.
    queues: Mutex<HashMap<String, mpsc::UnboundedSender<Answer>>>,
}

impl Puller {
    pub(super) fn new(link: Arc<Link>, closing: CancellationToken, tasks: TaskTracker, questions: TaskTracker) -> Self {
        Self { link, closing, tasks, questions, runtime: Handle::current(), queues: Mutex::default() }
    }

    pub(super) async fn get(&self, queue: &str) -> Result<Option<Delivery>, Error> {
        let (answer, told) = oneshot::channel();
        self.ask(queue, short(queue).map_err(Error::Invalid)?, answer);
        told.await
            .unwrap_or_else(|_| Err(ended()))
            .map(|mut handed| handed.0.take())
            .map_err(|refusal| refusal.during(format!("get a message of the queue `{queue}`")))
    }

    fn ask(&self, queue: &str, name: ShortString, answer: Answer) {
        let mut queues = self.queues.lock().expect("no panic while holding the queues");
        let questions = queues.entry(queue.to_owned()).or_insert_with(|| {
            let (ask, questions) = mpsc::unbounded_channel();
            let pulling = pull(self.link.clone(), name, questions, self.closing.clone(), self.questions.clone());
            self.tasks.spawn_on(pulling, &self.runtime);
            ask
        });
        // Without a task the connection has ended, and the answer's channel with it.
        let _ = questions.send(answer);
    }

    pub(super) async fn count(&self, queue: &str) -> Result<Option<u64>, Error> {
        let counting = count(self.link.clone(), short(queue).map_err(Error::Invalid)?);
        // Whoever stops waiting leaves its channel to be closed here.
        let counted = self.questions.spawn_on(counting, &self.runtime).await;
        counted
            .unwrap_or_else(|_| Err(ended()))
            .map_err(|refusal| refusal.during(format!("count the messages of the queue `{queue}`")))
    }
}

fn ended() -> Refusal {
    Refusal::Ended("the connection was closed".into())
}

/// Counts on a channel that nothing is out on.
async fn count(link: Arc<Link>, queue: ShortString) -> Result<Option<u64>, Refusal> {
    let channel = link.channel().await?;
    let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::durable() };
    match link.hear(channel.queue_declare(queue, options, FieldTable::default())).await {
        Ok(queue) => {
            declare::close(&link, &channel).await;
            Ok(Some(queue.message_count().into()))
        }
        Err(Refusal::Refused { code: NOT_FOUND, text }) if is_missing(&text) => Ok(None),
        Err(refusal) => Err(refusal),
    }
}

/// Whether there is no such queue, by the broker's words: it does not find one whose node is away either.
fn is_missing(text: &str) -> bool {
    text.contains("no queue")
}

/// Answers until the connection ends or closes, or nobody can ask any more.
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
                    pulling.settle(tag, settle);
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
                Ok(pulling) => pulling.next(&link, queue.clone()).await,
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
        // Unheard, the answer gives back what it holds.
        let _ = answer.send(pulled);
        // A queue without a message is seldom asked again at once, and others may need the channel.
        if is_empty && let Some(pulling) = open.take_if(|pulling| pulling.out == 0) {
            declare::close(&link, &pulling.channel).await;
        }
    }
    if let Some(mut pulling) = open {
        while let Ok((tag, settle)) = pulling.settled.try_recv() {
            pulling.settle(tag, settle);
        }
        if is_asked {
            // A channel that is dropped before its connection has ended is the end of that.
            unanswered.spawn(async move { (link.end().await, pulling.channel) });
        } else {
            declare::close(&link, &pulling.channel).await;
        }
    }
}

/// What is said of the next delivery; never resolves while there is no channel.
async fn settled(open: &mut Option<Pulling>) -> Option<(u64, Settle)> {
    match open {
        Some(pulling) => pulling.settled.recv().await,
        None => std::future::pending().await,
    }
}

async fn opened<'a>(open: &'a mut Option<Pulling>, link: &Link) -> Result<&'a mut Pulling, Refusal> {
    let pulling = match open.take() {
        Some(pulling) => pulling,
        None => {
            let (settler, settled) = mpsc::unbounded_channel();
            Pulling { channel: link.channel().await?, out: 0, life: Arc::default(), settler, settled }
        }
    };
    Ok(open.insert(pulling))
}

/// A channel, and what is said of its deliveries: tags mean nothing on another channel.
struct Pulling {
    channel: lapin::Channel,
    /// How many of its deliveries are not settled.
    out: usize,
    life: Arc<Life>,
    settler: mpsc::UnboundedSender<(u64, Settle)>,
    settled: mpsc::UnboundedReceiver<(u64, Settle)>,
}

impl Pulling {
    async fn next(&mut self, link: &Link, queue: ShortString) -> Pulled {
        let message = link.hear(self.channel.basic_get(queue, BasicGetOptions { no_ack: false })).await?;
        self.out += usize::from(message.is_some());
        Ok(Handed(message.map(|message| {
            let tag = message.delivery.delivery_tag;
            delivered(
                message.delivery,
                Some(Settler::Channel { tag, channel: self.settler.clone(), life: self.life.clone() }),
            )
        })))
    }

    /// Polled once, each of these sends its frame.
    fn settle(&mut self, tag: u64, settle: Settle) {
        self.out -= 1;
        let _ = match settle {
            Settle::Ack => self.channel.basic_ack(tag, BasicAckOptions { multiple: false }).now_or_never(),
            Settle::GiveBack => {
                self.channel.basic_nack(tag, BasicNackOptions { multiple: false, requeue: true }).now_or_never()
            }
            Settle::Failed => self.channel.basic_reject(tag, BasicRejectOptions { requeue: true }).now_or_never(),
            Settle::Discard => self.channel.basic_reject(tag, BasicRejectOptions { requeue: false }).now_or_never(),
        };
    }
}
