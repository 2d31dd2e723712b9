//! RPC with lapin as its documentation and the tutorials do it: one message a call, one acknowledgement a message.

use std::task::Poll;

use anyhow::{Context, bail, ensure};
use bytes::Bytes;
use clap::Parser;
use futures::stream::FuturesUnordered;
use futures::{StreamExt, poll};
use hopline_compare::plain_client::PlainClient;
use hopline_compare::{Load, Role, Style};
use lapin::message::Delivery;
use lapin::options::{
    BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions,
    QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection, ConnectionProperties, Consumer};
use tokio::sync::{mpsc, oneshot};

/// RPC with plain lapin.
#[derive(Parser)]
struct Command {
    #[command(subcommand)]
    role: Role,
}

const REQUESTS: &str = "compare.lapin.requests";
const WORK: &str = "compare.lapin.work";
const PREFETCH: u16 = 64;
/// The delivery mode of a message that survives the broker.
const PERSISTENT: u8 = 2;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    match Command::parse().role {
        Role::Serve { url } => serve(&url).await,
        Role::Call { url, style: Style::Call, load } => call(&url, load).await,
        Role::Call { url, style: Style::Oneway, load } => oneway(&url, load).await,
    }
}

async fn serve(url: &str) -> anyhow::Result<()> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let (channel, mut requests) = consume(&connection, REQUESTS, "classic").await?;
    let (_, mut work) = consume(&connection, WORK, "quorum").await?;
    tokio::spawn(async move {
        while let Some(Ok(request)) = requests.next().await {
            // A task for each: with one after the other the server waits for the socket at every reply.
            let channel = channel.clone();
            tokio::spawn(async move {
                if let Err(error) = answer(&channel, request).await {
                    eprintln!("plain-lapin: a request was not answered: {error:#}");
                }
            });
        }
    });
    tokio::spawn(async move {
        while let Some(Ok(message)) = work.next().await {
            tokio::spawn(async move { message.ack(BasicAckOptions::default()).await });
        }
    });
    hopline_compare::announce()?;
    hopline_compare::told_to_stop().await
}

/// Consumes a new, empty queue on a channel of its own.
async fn consume(connection: &Connection, queue: &str, kind: &str) -> anyhow::Result<(Channel, Consumer)> {
    let channel = connection.create_channel().await?;
    // A run that was killed may have left its backlog.
    channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await?;
    let mut arguments = FieldTable::default();
    arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
    channel.queue_declare(queue.into(), QueueDeclareOptions::durable(), arguments).await?;
    channel.basic_qos(PREFETCH, BasicQosOptions::default()).await?;
    let consumer =
        channel.basic_consume(queue.into(), queue.into(), BasicConsumeOptions::default(), FieldTable::default());
    Ok((channel.clone(), consumer.await?))
}

async fn answer(channel: &Channel, request: Delivery) -> anyhow::Result<()> {
    let properties = &request.properties;
    let (Some(reply_to), Some(id)) = (properties.reply_to(), properties.correlation_id()) else {
        bail!("it has no reply_to or no correlation_id");
    };
    let properties = BasicProperties::default().with_correlation_id(id.clone());
    channel
        .basic_publish("".into(), reply_to.clone(), BasicPublishOptions::default(), &request.data, properties)
        .await?;
    request.ack(BasicAckOptions::default()).await?;
    Ok(())
}

async fn call(url: &str, load: Load) -> anyhow::Result<()> {
    let client = PlainClient::connect(url, REQUESTS).await?;
    hopline_compare::run(load, move |payload| {
        let client = client.clone();
        async move { client.call(&payload).await }
    })
    .await
}

async fn oneway(url: &str, load: Load) -> anyhow::Result<()> {
    let connection = Connection::connect(url, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let (publish, publishes) = mpsc::unbounded_channel();
    tokio::spawn(write(channel, publishes));
    hopline_compare::run(load, move |payload| {
        let (publish, (confirmed, confirm)) = (publish.clone(), oneshot::channel());
        async move {
            publish.send(Publish { payload: payload.clone(), confirmed }).context("the writer has ended")?;
            ensure!(confirm.await.context("the writer has ended")?, "the broker did not take it");
            Ok(payload)
        }
    })
    .await
}

/// A message for the work queue, and who waits for its confirm.
struct Publish {
    payload: Bytes,
    confirmed: oneshot::Sender<bool>,
}

/// Publishes in order and hands on each confirm.
///
/// lapin gives a confirm to the wrong publish when several tasks publish on a channel. One writer is right, and it is
/// also a third faster than a channel for each task.
async fn write(channel: Channel, mut publishes: mpsc::UnboundedReceiver<Publish>) {
    let mut confirms = FuturesUnordered::new();
    loop {
        tokio::select! {
            biased;
            Some(Publish { payload, confirmed }) = publishes.recv() => {
                let channel = channel.clone();
                let mut publish = Box::pin(async move {
                    let properties = BasicProperties::default().with_delivery_mode(PERSISTENT);
                    let options = BasicPublishOptions::default();
                    channel.basic_publish("".into(), WORK.into(), options, &payload, properties).await
                });
                // The first poll queues the frames, which settles the order; nobody waits here for the socket.
                let polled = poll!(&mut publish);
                confirms.push(async move {
                    let confirm = match polled {
                        Poll::Ready(confirm) => confirm,
                        Poll::Pending => publish.await,
                    };
                    let confirmation = match confirm {
                        Ok(confirm) => confirm.await,
                        Err(error) => Err(error),
                    };
                    let _ = confirmed.send(matches!(confirmation, Ok(Confirmation::Ack(_))));
                });
            }
            Some(()) = confirms.next() => {}
            else => return,
        }
    }
}
