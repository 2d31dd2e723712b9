//! Dead letters: messages that a service could not run. An operator lists, replays or drops them here.

mod builder;
mod catalogue;
mod handled;
mod held;
mod letter;
mod publish;

use std::collections::{BTreeSet, HashSet};
use std::fmt;
use std::time::Duration;

use uuid::Uuid;

use crate::error::Error;
use crate::limits::MAX_MESSAGE_SIZE;
use crate::topology::{Namespace, ServiceId};
use crate::transport::{Confirm, Delivery, Publication, Transport};

pub use builder::DeadLettersBuilder;
pub(crate) use builder::queue_timeout;
pub(crate) use catalogue::{CatalogueEntry, close, enter, leave, named};
pub use handled::{Fate, Handled, Listed, WhichLetters};
pub(crate) use held::answered;
use held::{HeldLetters, take};
pub use letter::{DeadLetter, EarlierDeath, LetterKind};

/// The longest arguments that a list shows, in bytes.
const SHORT_ARGUMENTS: usize = 4096;

/// The dead letters of one service: oneway calls that have failed in every attempt, and messages that no attempt could
/// help.
///
/// They are in the queue `NAMESPACE.SERVICE.dead`, which no server consumes. Each operation takes messages out of it,
/// and puts back those that stay. In the meantime nobody else sees them. If the program dies, the broker puts them
/// back.
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
    /// How long a queue may take for each answer.
    timeout: Duration,
}

/// What to do with the letters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Act {
    Replay,
    /// Replay, also messages that cannot be read.
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

    /// The dead letters of another service, over the same connection.
    ///
    /// # Errors
    /// `Invalid` for a name that cannot be used.
    pub fn of(&self, service: &str) -> Result<Self, Error> {
        Ok(Self { service: ServiceId::parse(service).map_err(Error::Invalid)?, ..self.clone() })
    }

    /// How many dead letters there are. If most nodes of the queue are down, RabbitMQ tells the number that it last
    /// knew, or 0.
    ///
    /// # Errors
    /// - `NoService` if no instance of the service was ever there.
    /// - `Broker` if the broker refuses, or if the queue does not answer within [`DeadLettersBuilder::timeout`], for
    ///   example since its nodes are down.
    /// - `Disconnected`.
    pub async fn count(&self) -> Result<u64, Error> {
        let queue = self.namespace.dead_queue(&self.service);
        let operation = format!("count the dead letters in `{queue}`");
        let count = answered(self.timeout, &operation, self.transport.count(&queue)).await?;
        count.ok_or_else(|| Error::NoService { service: self.service.to_string(), method: None })
    }

    /// Up to `most` dead letters, the oldest first. They stay where they are. [Arguments](DeadLetter::arguments) of
    /// more than 4 KiB are left out.
    ///
    /// If there are more than `most`, these are not always the oldest: letters that were listed before are put back
    /// behind the others.
    ///
    /// # Errors
    /// As [`DeadLetters::count`]. If an error occurs after some letters were read, it is in [`Listed::broken_off`].
    pub async fn list(&self, most: usize) -> Result<Listed, Error> {
        self.count().await?;
        let (mut letters, mut held, mut last, mut broken_off) = (Vec::new(), HeldLetters::default(), 0, None);
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
            // A letter that does not tell its time stays behind its neighbour.
            last = letter.failed_at.unwrap_or(last);
            letters.push((last, letter));
            held.keep(delivery);
        }
        // A quorum queue may return messages in another order after they were taken out and put back.
        letters.sort_by_key(|(failed_at, _)| *failed_at);
        Ok(Listed { letters: letters.into_iter().map(|(_, letter)| letter).collect(), broken_off })
    }

    /// The dead letter with this id, or with the id that begins so. `None` if there is none. If several have the same
    /// id, any one of them. All letters stay where they are.
    ///
    /// # Errors
    /// As [`DeadLetters::count`], and `Invalid` if several ids begin so.
    pub async fn find(&self, id: &str) -> Result<Option<DeadLetter>, Error> {
        self.count().await?;
        let meant = meant(id)?;
        let (mut begun, mut found, mut held) = (BTreeSet::new(), None, HeldLetters::default());
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

    /// The whole ids for those in `meant`, which may be beginnings of ids. One that matches no letter is left as it is.
    async fn whole(&self, meant: &[String]) -> Result<Vec<String>, Error> {
        let meant = meant.iter().map(|id| self::meant(id)).collect::<Result<Vec<_>, _>>()?;
        if meant.iter().all(|id| Uuid::parse_str(id).is_ok()) {
            return Ok(meant);
        }
        let (mut there, mut held) = (BTreeSet::new(), HeldLetters::default());
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

    /// Runs oneway calls again, with the ids that they had and all their attempts. Any instance runs them, or the one
    /// that they were sent to. `each` is told what was done, one letter after the other. A letter that fails again in
    /// the meantime stays.
    ///
    /// Each call is published, and removed from the dead letters after the broker has confirmed it. If this program or
    /// its connection dies between the two, or this future is dropped, the call is in both places, and may run once
    /// more.
    ///
    /// Requests are kept, since nobody waits for their replies any more. Messages that cannot be read are kept, too.
    ///
    /// If a queue does not confirm a call within [`DeadLettersBuilder::timeout`], for example since most of its nodes
    /// are down, that is no error: the letter is [`Fate::Kept`], but may run as well. The letters after it for the same
    /// queue are kept and not sent.
    ///
    /// # Errors
    /// - As [`DeadLetters::count`].
    /// - `Invalid` if several ids begin as one of those given. Nothing is done then.
    /// - `Blocked` if the broker has accepted nothing for 5 s, being short of memory or disk. What `each` was told has
    ///   happened. For the next letter, `may_have_run` tells: if it is `false`, the letter is only where it was. If it
    ///   is `true`, the letter may also run when the broker accepts messages again.
    pub async fn replay(&self, which: &WhichLetters, each: impl FnMut(&Handled)) -> Result<Vec<Handled>, Error> {
        self.act(Act::Replay, which, each).await
    }

    /// The same, and sends messages that cannot be read to where they came from. This is for messages that only an
    /// older server could not read. Others come back.
    ///
    /// # Errors
    /// As [`DeadLetters::replay`].
    pub async fn replay_unread(&self, which: &WhichLetters, each: impl FnMut(&Handled)) -> Result<Vec<Handled>, Error> {
        self.act(Act::ReplayUnread, which, each).await
    }

    /// Removes dead letters for good. `each` is told what was done, one letter after the other.
    ///
    /// # Errors
    /// As [`DeadLetters::replay`].
    pub async fn discard(&self, which: &WhichLetters, each: impl FnMut(&Handled)) -> Result<Vec<Handled>, Error> {
        self.act(Act::Drop, which, each).await
    }

    /// Closes the connection, also for those of other services over the same connection.
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
        let (mut handled, mut held, mut done) = (Vec::new(), HeldLetters::default(), HashSet::new());
        let mut silent = HashSet::new();
        let mut wanted: HashSet<String> = match which {
            WhichLetters::All => HashSet::new(),
            WhichLetters::Ids(ids) => self.whole(ids).await?.into_iter().collect(),
        };
        while *which == WhichLetters::All || !wanted.is_empty() {
            let Some(delivery) = self.next().await? else { break };
            let letter = DeadLetter::read(&self.service, &delivery, 0);
            // A letter that was replayed and has failed again is not replayed once more: that could go on for ever.
            let again = act != Act::Drop && !done.insert(letter.id.clone());
            if again || (*which != WhichLetters::All && !wanted.remove(&letter.id)) {
                held.keep(delivery);
                continue;
            }
            let replayed = (act != Act::Drop).then(|| self.replayed(&letter, &delivery, act));
            // However this ends, the letter is put back.
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

    /// The message that replays a letter, or why it cannot be replayed.
    fn replayed(&self, letter: &DeadLetter, delivery: &Delivery, act: Act) -> Result<Publication, String> {
        let unread = act == Act::ReplayUnread;
        letter.replayed(&self.namespace, &self.service, delivery, self.transport.user(), unread)
    }

    /// Publishes a letter, unless it is for a key in `silent`, whose queue did not answer.
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

/// The id, or beginning of an id, that the user means, in the form of the letters' ids.
fn meant(id: &str) -> Result<String, Error> {
    if id.is_empty() {
        return Err(Error::Invalid("an empty id means no dead letter: write the id, or its beginning".to_owned()));
    }
    Ok(written(id))
}

/// An id in the form in which ids are compared: a UUID in lower case with hyphens; the beginning of one in lower case.
fn written(id: &str) -> String {
    match Uuid::parse_str(id) {
        Ok(id) => id.to_string(),
        Err(_) if id.chars().all(|c| c.is_ascii_hexdigit() || c == '-') => id.to_ascii_lowercase(),
        Err(_) => id.to_owned(),
    }
}
