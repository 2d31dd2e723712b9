//! RPC with amqprs as its documentation does it: a consumer type that answers, one message a call.

use std::collections::{BTreeMap, HashMap};
use std::mem;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use amqprs::callbacks::ChannelCallback;
use amqprs::channel::{
    BasicAckArguments, BasicConsumeArguments, BasicPublishArguments, BasicQosArguments, Channel,
    ConfirmSelectArguments, QueueDeclareArguments, QueueDeleteArguments,
};
use amqprs::connection::{Connection, OpenConnectionArguments};
use amqprs::consumer::AsyncConsumer;
use amqprs::{Ack, BasicProperties, Cancel, CloseChannel, Deliver, FieldTable, FieldValue, Nack, Return};
use anyhow::{Context, ensure};
use async_trait::async_trait;
use clap::Parser;
use hopline_compare::{Load, Role, Style};
use tokio::sync::oneshot;

/// RPC with plain amqprs.
#[derive(Parser)]
struct Command {
    #[command(subcommand)]
    role: Role,
}

const REQUESTS: &str = "compare.amqprs.requests";
const WORK: &str = "compare.amqprs.work";
const PREFETCH: u16 = 64;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Command::parse().role {
        Role::Serve { url } => serve(&url).await,
        Role::Call { url, style: Style::Call, load } => call(&url, load).await,
        Role::Call { url, style: Style::Oneway, load } => oneway(&url, load).await,
    }
}

async fn connect(url: &str) -> anyhow::Result<Connection> {
    Ok(Connection::open(&OpenConnectionArguments::try_from(url)?).await?)
}

async fn serve(url: &str) -> anyhow::Result<()> {
    let connection = connect(url).await?;
    let _requests = consume(&connection, REQUESTS, "classic", Answer).await?;
    let _work = consume(&connection, WORK, "quorum", Acknowledge).await?;
    hopline_compare::announce()?;
    hopline_compare::told_to_stop().await
}

/// Consumes a new, empty queue on a channel of its own.
async fn consume<C>(connection: &Connection, queue: &str, kind: &str, consumer: C) -> anyhow::Result<Channel>
where
    C: AsyncConsumer + Send + 'static,
{
    let channel = connection.open_channel(None).await?;
    // A run that was killed may have left its backlog.
    channel.queue_delete(QueueDeleteArguments::new(queue)).await?;
    let mut arguments = FieldTable::new();
    arguments.insert("x-queue-type".try_into()?, FieldValue::S(kind.try_into()?));
    channel.queue_declare(QueueDeclareArguments::durable_client_named(queue).arguments(arguments).finish()).await?;
    channel.basic_qos(BasicQosArguments::new(0, PREFETCH, false)).await?;
    channel.basic_consume(consumer, BasicConsumeArguments::new(queue, queue)).await?;
    Ok(channel)
}

/// Sends each request back. Publishing only hands the message to the connection's writer: a task for each gains nothing.
struct Answer;

#[async_trait]
impl AsyncConsumer for Answer {
    async fn consume(&mut self, channel: &Channel, deliver: Deliver, request: BasicProperties, content: Vec<u8>) {
        let (Some(reply_to), Some(id)) = (request.reply_to(), request.correlation_id()) else {
            return eprintln!("plain-amqprs: a request has no reply_to or no correlation_id");
        };
        let properties = BasicProperties::default().with_correlation_id(id).finish();
        if let Err(error) = channel.basic_publish(properties, content, BasicPublishArguments::new("", reply_to)).await {
            eprintln!("plain-amqprs: a request was not answered: {error}");
        }
        acknowledge(channel, &deliver).await;
    }
}

/// Takes oneway messages.
struct Acknowledge;

#[async_trait]
impl AsyncConsumer for Acknowledge {
    async fn consume(&mut self, channel: &Channel, deliver: Deliver, _: BasicProperties, _: Vec<u8>) {
        acknowledge(channel, &deliver).await;
    }
}

async fn acknowledge(channel: &Channel, deliver: &Deliver) {
    if let Err(error) = channel.basic_ack(BasicAckArguments::new(deliver.delivery_tag(), false)).await {
        eprintln!("plain-amqprs: a message was not acknowledged: {error}");
    }
}

/// Who waits for the reply with which correlation id.
type Waiting = Arc<Mutex<HashMap<String, oneshot::Sender<Vec<u8>>>>>;

/// Hands each reply to who waits for it.
struct Replies(Waiting);

#[async_trait]
impl AsyncConsumer for Replies {
    async fn consume(&mut self, _: &Channel, _: Deliver, reply: BasicProperties, content: Vec<u8>) {
        let Some(id) = reply.correlation_id() else { return };
        let caller = self.0.lock().expect("no panic while holding the map").remove(id);
        if let Some(caller) = caller {
            let _ = caller.send(content);
        }
    }
}

async fn call(url: &str, load: Load) -> anyhow::Result<()> {
    let connection = connect(url).await?;
    let channel = connection.open_channel(None).await?;
    let declared = channel.queue_declare(QueueDeclareArguments::exclusive_server_named()).await?;
    let (replies, ..) = declared.context("the broker did not name the reply queue")?;
    let waiting = Waiting::default();
    // A reply that is lost with this client would find nobody waiting: nothing to acknowledge.
    let arguments = BasicConsumeArguments::new(&replies, "replies").manual_ack(false).finish();
    channel.basic_consume(Replies(waiting.clone()), arguments).await?;

    let (replies, next_id) = (Arc::<str>::from(replies), Arc::new(AtomicU64::new(0)));
    hopline_compare::run(load, move |payload| {
        let (channel, replies, waiting, next_id) = (channel.clone(), replies.clone(), waiting.clone(), next_id.clone());
        async move {
            let id = next_id.fetch_add(1, Ordering::Relaxed).to_string();
            let (caller, reply) = oneshot::channel();
            let properties = BasicProperties::default().with_correlation_id(&id).with_reply_to(&replies).finish();
            waiting.lock().expect("no panic while holding the map").insert(id, caller);
            channel.basic_publish(properties, payload.to_vec(), BasicPublishArguments::new("", REQUESTS)).await?;
            reply.await.context("the connection ended before the reply came")
        }
    })
    .await
}

/// What was published and waits for its confirm, by delivery tag.
#[derive(Default)]
struct Unconfirmed {
    last_tag: u64,
    waiting: BTreeMap<u64, oneshot::Sender<bool>>,
}

async fn oneway(url: &str, load: Load) -> anyhow::Result<()> {
    let connection = connect(url).await?;
    let channel = connection.open_channel(None).await?;
    let unconfirmed = Arc::new(Mutex::new(Unconfirmed::default()));
    channel.register_callback(Confirms(unconfirmed.clone())).await?;
    channel.confirm_select(ConfirmSelectArguments::default()).await?;

    // The broker counts what it receives: one at a time has the channel, so that tags are given in that order.
    let publisher = Arc::new(tokio::sync::Mutex::new(channel));
    hopline_compare::run(load, move |payload| {
        let (publisher, unconfirmed) = (publisher.clone(), unconfirmed.clone());
        async move {
            let (confirmed, confirm) = oneshot::channel();
            let properties = BasicProperties::default().with_persistence(true).finish();
            let channel = publisher.lock().await;
            {
                let mut unconfirmed = unconfirmed.lock().expect("no panic while holding the map");
                unconfirmed.last_tag += 1;
                let tag = unconfirmed.last_tag;
                unconfirmed.waiting.insert(tag, confirmed);
            }
            channel.basic_publish(properties, payload.to_vec(), BasicPublishArguments::new("", WORK)).await?;
            drop(channel);
            ensure!(
                confirm.await.context("the connection ended before the confirm came")?,
                "the broker did not take it"
            );
            Ok(payload)
        }
    })
    .await
}

/// Hands each confirm to who waits for it.
struct Confirms(Arc<Mutex<Unconfirmed>>);

impl Confirms {
    fn settle(&self, tag: u64, multiple: bool, taken: bool) {
        let mut unconfirmed = self.0.lock().expect("no panic while holding the map");
        let settled = if multiple {
            let later = unconfirmed.waiting.split_off(&(tag + 1));
            mem::replace(&mut unconfirmed.waiting, later)
        } else {
            unconfirmed.waiting.remove_entry(&tag).into_iter().collect()
        };
        drop(unconfirmed);
        for caller in settled.into_values() {
            let _ = caller.send(taken);
        }
    }
}

#[async_trait]
impl ChannelCallback for Confirms {
    async fn publish_ack(&mut self, _: &Channel, ack: Ack) {
        self.settle(ack.delivery_tag(), ack.mutiple(), true);
    }

    async fn publish_nack(&mut self, _: &Channel, nack: Nack) {
        self.settle(nack.delivery_tag(), nack.multiple(), false);
    }

    async fn close(&mut self, _: &Channel, _: CloseChannel) -> Result<(), amqprs::error::Error> {
        Ok(())
    }

    async fn cancel(&mut self, _: &Channel, _: Cancel) -> Result<(), amqprs::error::Error> {
        Ok(())
    }

    async fn flow(&mut self, _: &Channel, active: bool) -> Result<bool, amqprs::error::Error> {
        Ok(active)
    }

    async fn publish_return(&mut self, _: &Channel, _: Return, _: BasicProperties, _: Vec<u8>) {}
}
