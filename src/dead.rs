//! Dead letters: what a service could not run, to be looked into, replayed or dropped by an operator.

mod builder;
mod catalogue;
mod letter;
mod publish;

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::future::Future;
use std::time::Duration;

use uuid::Uuid;

use crate::client::MAX_MESSAGE_SIZE;
use crate::error::Error;
use crate::topology::{Namespace, ServiceId};
use crate::transport::{Confirm, Delivery, Publication, Settle, Transport};

pub use builder::DeadLettersBuilder;
pub(crate) use catalogue::enter;
pub use letter::{DeadLetter, EarlierDeath, LetterKind};

/// How long arguments may be that are listed, in bytes.
const SHORT_ARGUMENTS: usize = 4096;

/// What helps with a queue that cannot be reached.
const HELPS: &str = "start the node that the queue is on, or most of its nodes, and try again";

/// The dead letters of one service: oneway calls that failed in every attempt, and messages that no attempt could help.
///
/// They are in the queue `NAMESPACE.SERVICE.dead`, which nobody consumes. Each operation takes messages out of it and
/// puts back what it leaves, where it was; for so long, nobody else sees them. If the program dies meanwhile, the broker
/// puts them back.
///
/// ```
/// use hopline::{Context, DeadLetters, Fault, Method, Server, Service, WhichLetters};
///
/// # #[tokio::main(flavor = "current_thread")]
/// # async fn main() -> Result<(), hopline::Error> {
/// let send = |_: Context, (to,): (String,)| async move { Ok::<_, Fault>(println!("{to}")) };
/// let mail = Service::new("mail", 1).method(Method::new("send").oneway(), send);
/// let server = Server::connect("memory://").await?.serve(mail).start().await?;
/// let dead = DeadLetters::connect("memory://", "mail").await?;
/// for letter in dead.list(100).await?.letters {
///     println!("{} {:?}: {}", letter.id, letter.method, letter.reason);
/// }
/// dead.replay(&WhichLetters::All, |handled| println!("{handled:?}")).await?;
/// # server.drain().await;
/// # Ok(()) }
/// ```
#[derive(Clone)]
pub struct DeadLetters {
    transport: Transport,
    namespace: Namespace,
    service: ServiceId,
    /// How long each queue may take over each answer.
    timeout: Duration,
}

/// Which dead letters are meant.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum WhichLetters {
    /// All that are there, and that come meanwhile.
    All,
    /// Those with these ids, or the beginnings of ids that no other has; of several with one id, any one. A whole id may be
    /// in upper case, and without hyphens.
    Ids(Vec<String>),
}

/// The dead letters of a service, as far as they could be read.
#[derive(Debug)]
#[non_exhaustive]
pub struct Listed {
    /// The oldest first.
    pub letters: Vec<DeadLetter>,
    /// Why there may be more, where the broker has not answered to the end.
    pub broken_off: Option<Error>,
}

/// What became of a dead letter that was meant.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Fate {
    /// It is on its way to be run again.
    Replayed,
    /// It is gone.
    Dropped,
    /// It is where it was, for this reason.
    Kept(String),
    /// There is no such dead letter.
    Absent,
}

/// A dead letter that was meant, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Handled {
    /// Its [`DeadLetter::id`].
    pub id: String,
    /// What became of it.
    pub fate: Fate,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Replay,
    /// Messages that cannot be read too.
    ReplayUnread,
    Drop,
}

impl DeadLetters {
    /// Connects with default settings to the broker that `url` names, for the dead letters of `service`, which is `name` or
    /// `name.vMAJOR`.
    ///
    /// # Errors
    /// As [`DeadLettersBuilder::connect`].
    pub async fn connect(url: impl AsRef<str>, service: &str) -> Result<Self, Error> {
        Self::builder().connect(url, service).await
    }

    /// Connects as the environment says, for the dead letters of `service`: `HOPLINE_URL`, and the other variables of
    /// [`environment`](crate::environment).
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), hopline::Error> {
    /// let dead = hopline::DeadLetters::connect_env("mail").await?;
    /// println!("{} dead letters", dead.count().await?);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// As [`DeadLettersBuilder::connect_env`].
    pub async fn connect_env(service: &str) -> Result<Self, Error> {
        Self::builder().connect_env(service).await
    }

    /// Settings to change before connecting.
    #[must_use]
    pub fn builder() -> DeadLettersBuilder {
        DeadLettersBuilder::default()
    }

    /// Those of another service, by the same connection.
    ///
    /// # Errors
    /// `Invalid` for a name that cannot be used.
    pub fn of(&self, service: &str) -> Result<Self, Error> {
        Ok(Self { service: ServiceId::parse(service).map_err(Error::Invalid)?, ..self.clone() })
    }

    /// How many there are. Of a queue most of whose nodes are away, RabbitMQ tells what it last knew, or 0.
    ///
    /// # Errors
    /// `NoService` when no instance of the service was ever there, `Broker` for a refusal or when the queue does not answer
    /// within [`DeadLettersBuilder::timeout`], as when the nodes that it is on are away; `Disconnected`.
    pub async fn count(&self) -> Result<u64, Error> {
        let queue = self.namespace.dead_queue(&self.service);
        let operation = format!("count the dead letters in `{queue}`");
        let count = answered(self.timeout, &operation, self.transport.count(&queue)).await?;
        count.ok_or_else(|| Error::NoService { service: self.service.to_string(), method: None })
    }

    /// Up to `most` of them, the oldest first, without [arguments](DeadLetter::arguments) over 4 KiB. They stay where they are.
    /// Of more than `most`, they are not always the oldest: what was looked at goes back behind what was looked at before.
    ///
    /// # Errors
    /// As [`DeadLetters::count`]; what ends it later, when there are letters to be told of, is in [`Listed::broken_off`].
    pub async fn list(&self, most: usize) -> Result<Listed, Error> {
        self.count().await?;
        let (mut letters, mut held, mut last, mut broken_off) = (Vec::new(), Held::default(), 0, None);
        while letters.len() < most {
            let delivery = match self.next().await {
                Ok(Some(delivery)) => delivery,
                Ok(None) => break,
                Err(error) if letters.is_empty() => return Err(error),
                Err(error) => {
                    broken_off = Some(error);
                    break;
                }
            };
            let letter = DeadLetter::read(&self.service, &delivery, SHORT_ARGUMENTS);
            // One that says no time stays behind its neighbour.
            last = letter.failed_at.unwrap_or(last);
            letters.push((last, letter));
            held.keep(delivery);
        }
        // What was taken out of a quorum queue and put back, as letters are here, may come in another order.
        letters.sort_by_key(|(failed_at, _)| *failed_at);
        Ok(Listed { letters: letters.into_iter().map(|(_, letter)| letter).collect(), broken_off })
    }

    /// The one with this id, any one if there are several, or the one whose id begins so; none if there is none. All stay
    /// where they are.
    ///
    /// # Errors
    /// As [`DeadLetters::count`], and `Invalid` when several ids begin so.
    pub async fn find(&self, id: &str) -> Result<Option<DeadLetter>, Error> {
        self.count().await?;
        let meant = meant(id)?;
        let (mut begun, mut found, mut held) = (BTreeSet::new(), None, Held::default());
        while let Some(delivery) = self.next().await? {
            let id = DeadLetter::read(&self.service, &delivery, 0).id;
            let is_it = id == meant;
            if is_it || (id.starts_with(&meant) && begun.insert(id) && found.is_none()) {
                found = Some(DeadLetter::read(&self.service, &delivery, MAX_MESSAGE_SIZE));
            }
            held.keep(delivery);
            if is_it {
                return Ok(found);
            }
        }
        if begun.len() > 1 { Err(self.several(begun.len(), &meant)) } else { Ok(found) }
    }

    /// The ids that are meant where they may be beginnings of ids; one that is neither is left as it is.
    async fn whole(&self, meant: &[String]) -> Result<Vec<String>, Error> {
        let meant = meant.iter().map(|id| self::meant(id)).collect::<Result<Vec<_>, _>>()?;
        if meant.iter().all(|id| Uuid::parse_str(id).is_ok()) {
            return Ok(meant);
        }
        let (mut there, mut held) = (BTreeSet::new(), Held::default());
        while let Some(delivery) = self.next().await? {
            there.insert(DeadLetter::read(&self.service, &delivery, 0).id);
            held.keep(delivery);
        }
        let whole = |meant: &String| {
            let begun = there.range(meant.clone()..).take_while(|id| id.starts_with(meant.as_str()));
            let begun: Vec<_> = begun.collect();
            match begun[..] {
                [] => Ok(meant.clone()),
                [only] => Ok(only.clone()),
                [first, ..] if first == meant => Ok(first.clone()),
                _ => Err(self.several(begun.len(), meant)),
            }
        };
        meant.iter().map(whole).collect()
    }

    fn several(&self, begun: usize, meant: &str) -> Error {
        let service = &self.service;
        Error::Invalid(format!("the ids of {begun} dead letters of `{service}` begin with `{meant}`: write more of it"))
    }

    /// Has oneway calls run again, with the ids they had and all their attempts: by any instance, or by the one that they
    /// were sent to. `each` is told what became of one after the other. A letter that fails again meanwhile stays.
    ///
    /// Each is published, and removed from here once the broker has it. If this program or its connection dies between
    /// the two, or this future is dropped, it is in both places, and may be run again once more.
    ///
    /// Requests are kept, since whoever made them has stopped waiting for the reply; so is what cannot be read.
    ///
    /// # Errors
    /// As [`DeadLetters::count`]; `Invalid` when several ids begin as one that is meant, and nothing is done then; `Blocked`
    /// when the broker has taken nothing for 5 s, being short of memory or disk. What `each` was told has happened. Of the one
    /// letter after that, `may_have_run` tells: with `false` it is only where it was, with `true` it may be run as well, once
    /// the broker takes messages again.
    ///
    /// A queue to which letters are sent, and that confirms one not within [`DeadLettersBuilder::timeout`], as when most of its
    /// nodes are away, is no error: that letter is [`Fate::Kept`], and may be run as well. So are those after it for the same
    /// queue, which are not sent.
    pub async fn replay(&self, which: &WhichLetters, each: impl FnMut(&Handled)) -> Result<Vec<Handled>, Error> {
        self.act(Act::Replay, which, each).await
    }

    /// The same, and sends what cannot be read to where it came from: for messages that only an older server could not
    /// read. Others come back.
    ///
    /// # Errors
    /// As [`DeadLetters::replay`].
    pub async fn replay_unread(&self, which: &WhichLetters, each: impl FnMut(&Handled)) -> Result<Vec<Handled>, Error> {
        self.act(Act::ReplayUnread, which, each).await
    }

    /// Removes them for good. `each` is told of one after the other.
    ///
    /// # Errors
    /// As [`DeadLetters::replay`].
    pub async fn discard(&self, which: &WhichLetters, each: impl FnMut(&Handled)) -> Result<Vec<Handled>, Error> {
        self.act(Act::Drop, which, each).await
    }

    /// Closes the connection, for those of other services by the same connection too.
    pub async fn close(&self) {
        self.transport.close().await;
    }

    async fn act(&self, act: Act, which: &WhichLetters, mut each: impl FnMut(&Handled)) -> Result<Vec<Handled>, Error> {
        self.count().await?;
        let mut tell = |id: String, fate: Fate, handled: &mut Vec<Handled>| {
            let one = Handled { id, fate };
            each(&one);
            handled.push(one);
        };
        let (mut handled, mut held, mut done) = (Vec::new(), Held::default(), HashSet::new());
        let mut silent = HashSet::new();
        let mut wanted: HashSet<String> = match which {
            WhichLetters::All => HashSet::new(),
            WhichLetters::Ids(ids) => self.whole(ids).await?.into_iter().collect(),
        };
        while *which == WhichLetters::All || !wanted.is_empty() {
            let Some(delivery) = self.next().await? else { break };
            let letter = DeadLetter::read(&self.service, &delivery, 0);
            // One that was replayed and has failed again would go round without end.
            let again = act != Act::Drop && !done.insert(letter.id.clone());
            if again || (*which != WhichLetters::All && !wanted.remove(&letter.id)) {
                held.keep(delivery);
                continue;
            }
            let replayed = (act != Act::Drop).then(|| self.replayed(&letter, &delivery, act));
            // Whatever ends this from here on, it goes back.
            held.keep(delivery);
            let fate = match replayed {
                None => Fate::Dropped,
                Some(Err(why)) => Fate::Kept(why),
                Some(Ok(publication)) => self.publish(publication, &mut silent).await?,
            };
            if matches!(fate, Fate::Replayed | Fate::Dropped) {
                held.remove_last();
            }
            tell(letter.id, fate, &mut handled);
        }
        let mut absent: Vec<_> = wanted.into_iter().collect();
        absent.sort_unstable();
        absent.into_iter().for_each(|id| tell(id, Fate::Absent, &mut handled));
        Ok(handled)
    }

    /// The letter as it is sent again, or why it cannot be.
    fn replayed(&self, letter: &DeadLetter, delivery: &Delivery, act: Act) -> Result<Publication, String> {
        let unread = act == Act::ReplayUnread;
        letter.replayed(&self.namespace, &self.service, delivery, self.transport.user(), unread)
    }

    /// Sends a letter, unless it is for one of the keys whose queues are `silent`.
    async fn publish(&self, publication: Publication, silent: &mut HashSet<String>) -> Result<Fate, Error> {
        let key = publication.key.clone();
        if silent.contains(&key) {
            return Ok(Fate::Kept("it was not sent, since the queue that it was for does not answer".to_owned()));
        }
        Ok(match publish::publish(&self.transport, publication, self.timeout).await? {
            None => {
                silent.insert(key);
                let waited = self.timeout;
                Fate::Kept(format!("the queue that it was for gave no answer within {waited:?}: it may run as well"))
            }
            Some(Confirm::Accepted) => Fate::Replayed,
            Some(Confirm::Returned) => {
                Fate::Kept("the queue or the instance that it was for is not there any more".to_owned())
            }
            Some(Confirm::Refused) => Fate::Kept(
                "the queue that it was for is full, or its node cannot be reached: try again later".to_owned(),
            ),
            Some(Confirm::TooLarge(limit)) => Fate::Kept(format!("the broker takes no messages over {limit} bytes")),
        })
    }

    async fn next(&self) -> Result<Option<Delivery>, Error> {
        take(&self.transport, &self.namespace.dead_queue(&self.service), self.timeout).await
    }
}

impl fmt::Debug for DeadLetters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadLetters")
            .field("namespace", &self.namespace)
            .field("service", &self.service)
            .finish_non_exhaustive()
    }
}

/// An id that is meant, or the beginning of one, as letters write theirs.
fn meant(id: &str) -> Result<String, Error> {
    if id.is_empty() {
        return Err(Error::Invalid("an empty id means no dead letter: write the id, or its beginning".to_owned()));
    }
    Ok(written(id))
}

/// An id as it is written wherever letters are compared: a UUID in lower case, with hyphens; its beginning in lower case.
fn written(id: &str) -> String {
    match Uuid::parse_str(id) {
        Ok(id) => id.to_string(),
        Err(_) if id.chars().all(|c| c.is_ascii_hexdigit() || c == '-') => id.to_ascii_lowercase(),
        Err(_) => id.to_owned(),
    }
}

/// A letter out of a queue, if it answers within `timeout`.
async fn take(transport: &Transport, queue: &str, timeout: Duration) -> Result<Option<Delivery>, Error> {
    let operation = format!("take a dead letter out of `{queue}`");
    let taken = answered(timeout, &operation, transport.get(queue)).await;
    taken.map_err(|error| match error {
        // RabbitMQ ends the connection over a queue that has lost its leader.
        Error::Disconnected { reason, .. } if reason.contains(&format!("'{queue}'")) => {
            Error::Broker { operation, reason: format!("{reason}: {HELPS}") }
        }
        error => error,
    })
}

/// The broker's answer to an `operation` on a queue, if it comes within `timeout`.
async fn answered<T>(
    timeout: Duration,
    operation: &str,
    answer: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::time::timeout(timeout, answer).await.unwrap_or_else(|_| {
        let reason = format!("it gave no answer within {timeout:?}: {HELPS}");
        Err(Error::Broker { operation: operation.to_owned(), reason })
    })
}

/// What was taken out and stays: it goes back when this is dropped, however that comes.
#[derive(Default)]
struct Held(Vec<Delivery>);

impl Held {
    fn keep(&mut self, mut delivery: Delivery) {
        // The broker has it: only its tag is needed.
        delivery.body.clear();
        self.0.push(delivery);
    }

    /// The last does not stay.
    fn remove_last(&mut self) {
        if let Some(delivery) = self.0.pop() {
            delivery.settle(Settle::Ack);
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.0.drain(..).for_each(|delivery| delivery.settle(Settle::GiveBack));
    }
}
