//! A transactional outbox in SQLite: an event is written in the same transaction as what it tells of, and a relay
//! publishes it after the commit. The guide's page on the outbox explains it. Copy this file, and change it as you need.

use std::fs::{File, TryLockError};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::future::join_all;
use hopline::{Client, Error, Published};
use rusqlite::{Connection, Transaction, TransactionBehavior};
use serde::Serialize;
use serde_json::{Map, Value};
use tokio::sync::Notify;
use tokio::time::sleep;
use uuid::Uuid;

/// The table. AUTOINCREMENT never gives a number twice, also when the rows before it are gone.
const TABLE: &str = "
    CREATE TABLE IF NOT EXISTS outbox (
        number INTEGER PRIMARY KEY AUTOINCREMENT, -- the order in which the events were written
        id     TEXT NOT NULL UNIQUE,              -- the same in all copies of the event
        key    TEXT NOT NULL,                     -- such as order.created
        event  TEXT NOT NULL,                     -- JSON, with the id in it
        failed TEXT                               -- why it can never be published
    ) STRICT;
    CREATE INDEX IF NOT EXISTS outbox_that_waits ON outbox (number) WHERE failed IS NULL;
";

/// How many events are published at once. With 1 they are published one after the other, and never in another order.
const BATCH: u32 = 64;
/// How often the relay looks for events that nobody has woken it for.
const LOOKS_EVERY: Duration = Duration::from_millis(100);
/// How often a relay looks whether the one before it has ended.
const ASKS_EVERY: Duration = Duration::from_millis(500);
/// The pause after the first failure. Each further one is twice as long.
const FIRST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// What can go wrong with the database, or with the file beside it.
pub(crate) type Failure = Box<dyn std::error::Error + Send + Sync>;

/// The outbox in a database.
#[derive(Debug, Clone)]
pub(crate) struct Outbox {
    path: PathBuf,
    committed: Arc<Notify>,
}

impl Outbox {
    /// Opens the database, and makes the table if it is not there.
    pub(crate) fn open(path: impl Into<PathBuf>) -> rusqlite::Result<Self> {
        let outbox = Self { path: path.into(), committed: Arc::default() };
        outbox.connect()?.execute_batch(TABLE)?;
        Ok(outbox)
    }

    /// A connection to the database, for the program's own tables and for the outbox.
    pub(crate) fn connect(&self) -> rusqlite::Result<Connection> {
        let database = Connection::open(&self.path)?;
        database.busy_timeout(Duration::from_secs(30))?;
        // The relay reads while others write.
        database.pragma_update(None, "journal_mode", "wal")?;
        // A commit is on the disk when it returns. With WAL, NORMAL would lose the last ones with the power.
        database.pragma_update(None, "synchronous", "full")?;
        Ok(database)
    }

    /// Writes an event, as a part of the caller's transaction: it is published if that commits, and only then. The event
    /// is a struct or a map. It gets one more field, `event_id`, which is the same in all its copies.
    pub(crate) fn write(transaction: &Transaction<'_>, key: &str, event: &impl Serialize) -> rusqlite::Result<Uuid> {
        let unfit = |error| rusqlite::Error::ToSqlConversionFailure(error);
        let event = serde_json::to_value(event).map_err(|error| unfit(error.into()))?;
        let Value::Object(mut event) = event else {
            return Err(unfit("an event has named fields: without them there is no place for its id".into()));
        };
        let id = Uuid::new_v4();
        event.insert("event_id".to_owned(), id.to_string().into());
        let row = (id.to_string(), key, Value::Object(event).to_string());
        transaction.execute("INSERT INTO outbox (id, key, event) VALUES (?1, ?2, ?3)", row)?;
        Ok(id)
    }

    /// Tells the relay of this process that a transaction has committed: it need not wait until it looks again.
    pub(crate) fn wake(&self) {
        self.committed.notify_one();
    }

    /// Waits until no other process relays this outbox, and then relays it. The client has to send JSON, since that is
    /// what the table has.
    pub(crate) async fn relay(&self, client: &Client) -> Result<Relay, Failure> {
        let turn = turn(&self.path).await?;
        let database = Arc::new(Mutex::new(self.connect()?));
        Ok(Relay { client: client.clone(), database, committed: self.committed.clone(), failures: 0, _turn: turn })
    }
}

/// Several relays would mix up the order, so one holds the lock, and the others wait to take its place. The system
/// unlocks the file when the process ends, however it ends.
async fn turn(database: &Path) -> Result<File, Failure> {
    let mut path = database.as_os_str().to_owned();
    path.push("-relay");
    let file = File::create(path)?;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(file),
            Err(TryLockError::WouldBlock) => sleep(ASKS_EVERY).await,
            Err(TryLockError::Error(error)) => return Err(error.into()),
        }
    }
}

/// Publishes the events of an outbox. It may be dropped or killed at any time.
#[derive(Debug)]
pub(crate) struct Relay {
    client: Client,
    database: Arc<Mutex<Connection>>,
    committed: Arc<Notify>,
    /// How many batches in a row were not published in full.
    failures: u32,
    _turn: File,
}

/// What has become of some events.
#[derive(Debug, Default)]
pub(crate) struct Batch {
    /// The numbers of those that the broker has.
    pub(crate) published: Vec<i64>,
    /// Those that can never be published, and why. They stay in the table, and nobody tries them again.
    pub(crate) failed: Vec<(i64, String)>,
    /// How many are tried again.
    pub(crate) left: usize,
}

/// An event in the table.
struct Row {
    number: i64,
    key: String,
    event: String,
}

/// What becomes of a row.
enum End {
    Published,
    Failed(String),
    TriedAgain(String),
}

impl Relay {
    /// Waits for events, and publishes the next of them. After a failure it waits before it tries them again: 100 ms, and
    /// twice as long each time, up to 30 s.
    pub(crate) async fn next(&mut self) -> Result<Batch, Failure> {
        if self.failures > 0 {
            sleep(FIRST_PAUSE.saturating_mul(1 << self.failures.min(10) >> 1).min(LONGEST_PAUSE)).await;
        }
        let rows = loop {
            let rows = self.with_database(waiting).await?;
            if !rows.is_empty() {
                break rows;
            }
            tokio::select! {
                () = self.committed.notified() => {}
                () = sleep(LOOKS_EVERY) => {}
            }
        };
        // They leave in this order, and their confirms are awaited together.
        let ends = join_all(rows.iter().map(|row| self.publish(row))).await;
        let mut batch = Batch::default();
        for (Row { number, key, .. }, end) in rows.into_iter().zip(ends) {
            match end {
                End::Published => batch.published.push(number),
                End::Failed(why) => {
                    tracing::error!(number, key, why, "an event cannot be published, and stays in the outbox");
                    batch.failed.push((number, why));
                }
                End::TriedAgain(why) => {
                    if batch.left == 0 {
                        tracing::warn!(number, key, why, "events are not published yet, and are tried again");
                    }
                    batch.left += 1;
                }
            }
        }
        self.failures = if batch.left == 0 { 0 } else { self.failures.saturating_add(1) };
        // Whoever is killed here publishes the batch again. That is why each event has an id.
        self.with_database(move |database| settle(database, batch)).await
    }

    /// Whether no event waits.
    pub(crate) async fn is_done(&self) -> Result<bool, Failure> {
        self.with_database(|database| Ok(waiting(database)?.is_empty())).await
    }

    async fn publish(&self, row: &Row) -> End {
        // What `write` has made is JSON; what somebody has changed by hand may be anything.
        let event = match serde_json::from_str::<Map<String, Value>>(&row.event) {
            Ok(event) => event,
            Err(error) => return End::Failed(error.to_string()),
        };
        match self.client.publish(&row.key, &event).await {
            Ok(Published::ToAll) => End::Published,
            // Those who have it get it again, and know it by its id.
            Ok(_) => End::TriedAgain("a subscriber's queue has not taken it".to_owned()),
            // It would fail in the same way for ever, and hold up the events behind it.
            Err(error @ (Error::Invalid(_) | Error::Codec(_) | Error::TooLarge { .. })) => {
                End::Failed(error.to_string())
            }
            Err(error) => End::TriedAgain(error.to_string()),
        }
    }

    /// SQLite blocks, so it has a thread for that.
    async fn with_database<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> rusqlite::Result<T> + Send + 'static,
    ) -> Result<T, Failure> {
        let database = self.database.clone();
        let done = tokio::task::spawn_blocking(move || work(&mut database.lock().expect("nobody panics with it")));
        Ok(done.await??)
    }
}

/// The next events to be published, in order.
fn waiting(database: &mut Connection) -> rusqlite::Result<Vec<Row>> {
    let next = "SELECT number, key, event FROM outbox WHERE failed IS NULL ORDER BY number LIMIT ?1";
    let mut next = database.prepare(next)?;
    let rows = next.query_map([BATCH], |row| Ok(Row { number: row.get(0)?, key: row.get(1)?, event: row.get(2)? }))?;
    rows.collect()
}

/// Removes what the broker has, and notes what can never be published.
fn settle(database: &mut Connection, batch: Batch) -> rusqlite::Result<Batch> {
    // IMMEDIATE waits for a writer here. A transaction that reads first may fail later, when it is to write.
    let transaction = database.transaction_with_behavior(TransactionBehavior::Immediate)?;
    for number in &batch.published {
        transaction.execute("DELETE FROM outbox WHERE number = ?1", [number])?;
    }
    for (number, why) in &batch.failed {
        transaction.execute("UPDATE outbox SET failed = ?2 WHERE number = ?1", (number, why))?;
    }
    transaction.commit()?;
    Ok(batch)
}

/// For a subscriber: whether it has not handled this event yet. It asks in the transaction of its own work, so that an
/// event is noted exactly if that work is done. Notes that are older than any copy can be may be deleted: after a week,
/// say.
pub(crate) fn is_new(transaction: &Transaction<'_>, event_id: &str) -> rusqlite::Result<bool> {
    transaction.execute_batch(
        "CREATE TABLE IF NOT EXISTS handled (event_id TEXT PRIMARY KEY, at INTEGER NOT NULL DEFAULT (unixepoch())) STRICT",
    )?;
    let noted = transaction.execute("INSERT INTO handled (event_id) VALUES (?1) ON CONFLICT DO NOTHING", [event_id])?;
    Ok(noted == 1)
}
