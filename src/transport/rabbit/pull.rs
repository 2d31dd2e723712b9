//! Messages that are asked for one by one, on a channel of their own, and how many there are.

use std::sync::Arc;

use futures::FutureExt as _;
use lapin::options::{BasicAckOptions, BasicGetOptions, BasicNackOptions, BasicRejectOptions, QueueDeclareOptions};
use lapin::types::{FieldTable, ShortString};
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

use super::connection::{Link, Refusal};
use super::{declare, delivered};
use crate::error::Error;
use crate::transport::rabbit::properties::short;
use crate::transport::{Delivery, Settle, Settler};

const NOT_FOUND: u16 = 404;

type Pulled = Result<Option<Delivery>, Refusal>;
type Counted = Result<Option<u64>, Refusal>;

/// What is asked of the task.
#[derive(Debug)]
enum Question {
    Next(ShortString, oneshot::Sender<Pulled>),
    Count(ShortString, oneshot::Sender<Counted>),
}

/// Where messages are asked for. The task ends with its connection.
#[derive(Debug)]
pub(super) struct Puller(mpsc::UnboundedSender<Question>);

impl Puller {
    pub(super) fn new(link: Arc<Link>, closing: CancellationToken) -> (Self, impl Future<Output = ()>) {
        let (ask, questions) = mpsc::unbounded_channel();
        (Self(ask), pull(link, questions, closing))
    }

    pub(super) async fn get(&self, queue: &str) -> Result<Option<Delivery>, Error> {
        let (answer, told) = oneshot::channel();
        let name = short(queue).map_err(Error::Invalid)?;
        // Without a task the connection has ended, and the answer's channel with it.
        let _ = self.0.send(Question::Next(name, answer));
        told.await
            .unwrap_or_else(|_| Err(ended()))
            .map_err(|refusal| refusal.during(format!("get a message of the queue `{queue}`")))
    }

    pub(super) async fn count(&self, queue: &str) -> Result<Option<u64>, Error> {
        let (answer, told) = oneshot::channel();
        let name = short(queue).map_err(Error::Invalid)?;
        let _ = self.0.send(Question::Count(name, answer));
        told.await
            .unwrap_or_else(|_| Err(ended()))
            .map_err(|refusal| refusal.during(format!("count the messages of the queue `{queue}`")))
    }
}

fn ended() -> Refusal {
    Refusal::Ended("the connection was closed".into())
}

/// Answers until the connection ends or closes, or nobody can ask any more.
async fn pull(link: Arc<Link>, mut questions: mpsc::UnboundedReceiver<Question>, closing: CancellationToken) {
    let mut open: Option<Pulling> = None;
    loop {
        let question = tokio::select! {
            biased;
            Some((tag, settle)) = settled(&mut open) => {
                if let Some(pulling) = &open {
                    pulling.settle(tag, settle);
                }
                continue;
            }
            _ = link.end() => return,
            () = closing.cancelled() => break,
            question = questions.recv() => question,
        };
        let Some(question) = question else { break };
        match question {
            Question::Next(queue, answer) => {
                let pulled = match opened(&mut open, &link).await {
                    Ok(pulling) => pulling.next(&link, queue).await,
                    Err(refusal) => Err(refusal),
                };
                // The broker closes the channel with its refusal, and takes back what is out on it.
                open = open.filter(|_| pulled.is_ok());
                // Who has stopped waiting for a message does not settle it either.
                if let Err(Ok(Some(delivery))) = answer.send(pulled) {
                    delivery.settle(Settle::GiveBack);
                }
            }
            Question::Count(queue, answer) => {
                let counted = match opened(&mut open, &link).await {
                    Ok(pulling) => pulling.count(&link, queue).await,
                    Err(refusal) => Err(refusal),
                };
                open = open.filter(|_| matches!(counted, Ok(Some(_))));
                let _ = answer.send(counted);
            }
        }
    }
    if let Some(mut pulling) = open {
        while let Ok((tag, settle)) = pulling.settled.try_recv() {
            pulling.settle(tag, settle);
        }
        declare::close(&link, &pulling.channel).await;
    }
}

/// What is said of the next delivery; never resolves while there is no channel.
async fn settled(open: &mut Option<Pulling>) -> Option<(u64, Settle)> {
    match open {
        Some(pulling) => pulling.settled.recv().await,
        None => std::future::pending().await,
    }
}

async fn opened<'a>(open: &'a mut Option<Pulling>, link: &Link) -> Result<&'a Pulling, Refusal> {
    let pulling = match open.take() {
        Some(pulling) => pulling,
        None => {
            let (settler, settled) = mpsc::unbounded_channel();
            Pulling { channel: link.channel().await?, settler, settled }
        }
    };
    Ok(open.insert(pulling))
}

/// A channel, and what is said of its deliveries: tags mean nothing on another channel.
struct Pulling {
    channel: lapin::Channel,
    settler: mpsc::UnboundedSender<(u64, Settle)>,
    settled: mpsc::UnboundedReceiver<(u64, Settle)>,
}

impl Pulling {
    async fn next(&self, link: &Link, queue: ShortString) -> Pulled {
        let message = link.ask(self.channel.basic_get(queue, BasicGetOptions { no_ack: false })).await?;
        Ok(message.map(|message| {
            let tag = message.delivery.delivery_tag;
            delivered(message.delivery, Some(Settler::Channel { tag, channel: self.settler.clone() }))
        }))
    }

    async fn count(&self, link: &Link, queue: ShortString) -> Counted {
        let options = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::durable() };
        match link.ask(self.channel.queue_declare(queue, options, FieldTable::default())).await {
            Ok(queue) => Ok(Some(queue.message_count().into())),
            Err(Refusal::Refused { code: NOT_FOUND, .. }) => Ok(None),
            Err(refusal) => Err(refusal),
        }
    }

    /// Polled once, each of these sends its frame.
    fn settle(&self, tag: u64, settle: Settle) {
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
