//! Moving back: a client that is connected to another than its first address returns there when it can, while calls are
//! in flight.
//!
//! First everything that was sent over the old connection has to be confirmed, so that no message overtakes another.
//! Then messages are sent over the new connection. Replies to earlier calls still arrive over the old one, which is
//! closed when none is awaited any more.

use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use tokio::time::Instant;
use tracing::{debug, info};

use super::LineTask;
use crate::client::session::Session;
use crate::error::Error;
use crate::outgoing::Window;
use crate::state::State;
use crate::transport::next_look_back;

/// How long messages are held back at most. If the broker has not confirmed everything by then, the client stays where
/// it is.
const HOLD: Duration = Duration::from_millis(200);

/// How far a move has come.
#[derive(Default)]
pub(super) enum Move {
    /// There is no move.
    #[default]
    None,
    /// The session at the first address is being opened.
    Connecting(BoxFuture<'static, Result<Session, Error>>),
    /// It is open. Messages are held back until everything is confirmed, until this time at most.
    Holding(Session, Instant),
}

/// The session before the move.
pub(super) struct Former {
    pub(super) session: Session,
    /// The number of the first message that was sent over it.
    first: u64,
    /// The number of the last message that was sent over it.
    last: u64,
}

impl Former {
    /// Whether the reply to a call in this message arrives over this session.
    pub(super) fn answers(&self, message: u64) -> bool {
        (self.first..=self.last).contains(&message)
    }
}

impl Move {
    /// The result of connecting to the first address. Never resolves while that is not being done.
    pub(super) async fn connected(&mut self) -> Result<Session, Error> {
        match self {
            Self::Connecting(connecting) => connecting.await,
            Self::None | Self::Holding(..) => std::future::pending().await,
        }
    }
}

impl LineTask {
    /// When `look_back` has something to do.
    pub(super) fn moves_at(&self) -> Option<Instant> {
        match &self.moving {
            Move::None => self.back_at,
            Move::Connecting(_) => None,
            Move::Holding(_, until) => Some(*until),
        }
    }

    /// Tries the first address when it is time for that. Gives up a move that takes too long.
    pub(super) fn look_back(&mut self, now: Instant) {
        if self.moves_at().is_none_or(|at| at > now) {
            return;
        }
        self.back_at = Some(next_look_back());
        if self.is_held() {
            debug!(name = self.name(), "not all was confirmed in time: the first address is not used yet");
            self.stay();
        } else if self.is_well() && self.former.is_none() {
            self.moving = Move::Connecting(self.sessions.clone().open_first().boxed());
        }
    }

    /// Whether everything is as it should be. Otherwise this is not the time to move.
    fn is_well(&self) -> bool {
        *self.shared.state.borrow() == State::Ready && self.takes() && self.leaving.is_none() && self.unsent.is_empty()
    }

    /// Whether messages are held back for a move.
    pub(super) fn is_held(&self) -> bool {
        matches!(self.moving, Move::Holding(..))
    }

    /// Gives up a move.
    pub(super) fn stay(&mut self) {
        if let Move::Holding(session, _) = std::mem::take(&mut self.moving) {
            close(session);
        }
    }

    /// Gives up a move if holding back messages would make one of them miss its deadline.
    pub(super) fn stay_for(&mut self, deadline: Instant) {
        if let Move::Holding(_, until) = &self.moving
            && deadline <= *until
        {
            self.stay();
        }
    }

    /// Connecting to the first address has succeeded or failed.
    pub(super) fn connected(&mut self, opened: Result<Session, Error>) {
        self.moving = match opened {
            Ok(session) if session.transport.blocked().is_none() && self.is_well() => {
                Move::Holding(session, Instant::now() + HOLD)
            }
            Ok(session) => {
                close(session);
                Move::None
            }
            Err(error) => {
                debug!(name = self.name(), %error, "the first address is not used yet");
                Move::None
            }
        };
    }

    /// Uses the new session, if nothing is in flight over the old one except replies.
    pub(super) fn switch(&mut self) {
        if !self.is_held() || !self.unconfirmed.is_empty() || !self.receipts.is_empty() {
            return;
        }
        let Move::Holding(new, _) = std::mem::take(&mut self.moving) else { return };
        info!(name = self.name(), broker = new.transport.broker(), "moved back to the first address");
        let old = self.session.replace(new);
        self.listen_anew();
        self.former = old.map(|session| Former { session, first: self.first, last: self.number });
        self.first = self.number + 1;
        (self.window, self.back_at) = (Window::default(), None);
        self.kept.clear();
    }

    /// Closes the session before the move, if no reply is awaited there.
    pub(super) fn leave_former(&mut self) {
        let is_idle = |former: &mut Former| !self.in_flight.awaits(|message| former.answers(message));
        if let Some(former) = self.former.take_if(is_idle) {
            close(former.session);
        }
    }

    /// The session before the move is lost, and with it the replies that are awaited there.
    pub(super) fn lose_former(&mut self) {
        let Some(former) = self.former.take() else { return };
        let (_, rest) = former.session.end();
        // Replies that arrived before the end are read before the calls fail.
        self.leaving.get_or_insert_default().rests.push_back(rest);
    }
}

/// Closes a session on a task, since nobody has to wait for it.
fn close(session: Session) {
    tokio::spawn(async move { session.transport.close().await });
}

#[cfg(test)]
pub(super) mod tests {
    use std::sync::Arc;

    use bytes::Bytes;
    use tokio::sync::{mpsc, oneshot};
    use uuid::Uuid;

    use super::*;
    use crate::client::in_flight::{CallEnd, Waiter};
    use crate::client::line::{Line, LineSettings, Shared, Token};
    use crate::client::session::Sessions;
    use crate::client::target::Target;
    use crate::codec::Codec;
    use crate::exchanges::Address;
    use crate::frame::{Frame, Kind, Metadata};
    use crate::outgoing::{Bundle, Parcel, Share};
    use crate::topology::{Declaration, Namespace, Queue, QueueKind, ServiceId};
    use crate::transport::{Confirm, Consumer, Dial, Mode, Properties, Publication, Role, Transport};

    type Answer = oneshot::Receiver<Result<Frame, CallEnd>>;

    /// A client that moves when it is told to, and who answers its calls.
    struct Moved {
        line: Line,
        /// The connection that the client has first; what has it move, and then gives out the next one.
        old: Transport,
        moving: Option<(oneshot::Sender<()>, oneshot::Receiver<Transport>)>,
        server: Transport,
        calls: Consumer,
    }

    /// The task of a client, and what sends it orders.
    pub(in super::super) async fn task(url: &str) -> (LineTask, Line) {
        let dial = Dial::parse(url).expect("a good address");
        let sessions = Sessions { dial, namespace: Namespace::default(), instance: "caller".into() };
        let session = sessions.open().await.expect("in memory");
        let rules = LineSettings { max_message_size: 1024, blocked_wait: Duration::ZERO, max_in_flight: None };
        let (orders, waiting) = mpsc::unbounded_channel();
        let shared = Arc::new(Shared::new());
        (LineTask::new(sessions, Some(session), rules, waiting, shared.clone()), Line { orders, shared })
    }

    /// A message of which nothing is said.
    fn keep_unconfirmed(task: &mut LineTask) {
        let address = Address::queue("away", Kind::Oneway);
        task.unconfirmed.insert(0, Bundle { address, parcels: Vec::new() }, Instant::now());
    }

    /// The same task, which would use another connection but for what is not confirmed.
    async fn held() -> LineTask {
        let (mut task, _) = task("memory://").await;
        keep_unconfirmed(&mut task);
        task.connected(task.sessions.clone().open_first().await);
        task.switch();
        assert!(task.is_held());
        task
    }

    impl Moved {
        async fn new(prepare: impl FnOnce(&mut LineTask)) -> Self {
            let url = format!("memory://{}", Uuid::new_v4());
            let server = Transport::connect(&url, Role::Server).await.expect("in memory");
            let there = Declaration::Queue(Queue::new("there", QueueKind::Exclusive));
            server.declare(&[there]).await.expect("a new queue");
            let calls = server.consume("there", Mode::NoAck).await.expect("it is there");

            let (mut task, line) = task(&url).await;
            let old = task.session.as_ref().expect("it is connected").transport.clone();
            let ((go, gone), (tell, new)) = (oneshot::channel(), oneshot::channel());
            let opening = task.sessions.clone().open_first();
            let connecting = async move {
                gone.await.expect("the test tells when");
                let session = opening.await?;
                // A test may not care.
                let _ = tell.send(session.transport.clone());
                Ok(session)
            };
            task.moving = Move::Connecting(connecting.boxed());
            prepare(&mut task);
            tokio::spawn(task.run());
            Self { line, old, moving: Some((go, new)), server, calls }
        }

        /// Has the client begin to move, and gives out the connection that it moves to.
        async fn go(&mut self) -> Transport {
            let (go, new) = self.moving.take().expect("it moves once");
            go.send(()).expect("it listens");
            new.await.expect("it connects")
        }

        /// Makes a call; tells its id, where its reply is to go, and who waits for that.
        async fn call(&mut self) -> (Uuid, String, Answer) {
            self.call_within(Duration::from_secs(60)).await
        }

        async fn call_within(&mut self, time: Duration) -> (Uuid, String, Answer) {
            let (id, answer) = self.post(time);
            let delivery = self.calls.next().await.expect("it comes");
            (id, delivery.properties.reply_to.expect("it is to be answered"), answer)
        }

        fn post(&self, time: Duration) -> (Uuid, Answer) {
            let target = Arc::new(Target::new(ServiceId::new("demo", 1).expect("a good name"), "add"));
            let (reply, answer) = oneshot::channel();
            let token = Token { reply: Some((Waiter::One(reply), target)), ..Token::until(Instant::now() + time) };
            let address = Address::queue("there", Kind::Request);
            let id = Uuid::new_v4();
            let frame = Frame::new(Kind::Request, id, Codec::Raw, Metadata::default(), Bytes::new()).to_body();
            self.line.post(address, Parcel { id, frame, share: Share::ALL, kind: None, expiration: None, token });
            (id, answer)
        }

        /// Answers a call; tells whether there was a queue for that.
        async fn answer(&self, id: Uuid, reply_to: &str) -> bool {
            let body = Frame::new(Kind::Reply, id, Codec::Raw, Metadata::default(), Bytes::new()).to_body();
            let (exchange, key, properties) = (String::new(), reply_to.to_owned(), Properties::default());
            let reply = Publication { exchange, key, mandatory: true, properties, body };
            self.server.publish(reply).await.expect("in memory") == Confirm::Accepted
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_of_before_is_answered_over_its_connection_which_is_closed_after_that() {
        let mut moved = Moved::new(|_| {}).await;
        let (first, first_queue, first_answer) = moved.call().await;
        moved.go().await;
        let (second, second_queue, second_answer) = moved.call().await;
        assert_ne!(first_queue, second_queue);
        assert!(moved.answer(second, &second_queue).await);
        assert_eq!(second_answer.await.expect("it is told").expect("a reply").id, second);
        tokio::time::sleep(Duration::from_secs(30)).await;
        assert!(moved.answer(first, &first_queue).await, "it is waited for");
        assert_eq!(first_answer.await.expect("it is told").expect("a reply").id, first);
        tokio::time::sleep(Duration::from_secs(3)).await;
        assert!(!moved.answer(first, &first_queue).await, "nothing is waited for there");
        assert!(moved.old.count(&first_queue).await.is_err(), "it is closed");
        assert_eq!(*moved.line.state().borrow(), State::Ready);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_of_before_is_lost_with_its_connection_and_no_other_is() {
        let mut moved = Moved::new(|_| {}).await;
        let (first, first_queue, first_answer) = moved.call().await;
        let (answered, answered_queue, answer) = moved.call().await;
        moved.go().await;
        let (second, second_queue, second_answer) = moved.call().await;
        assert!(moved.answer(answered, &answered_queue).await);
        moved.old.close().await;
        assert_eq!(answer.await.expect("it is told").expect("what had arrived is read").id, answered);
        assert!(matches!(first_answer.await, Ok(Err(CallEnd::Lost(lost))) if lost.may_have_arrived()));
        assert!(!moved.answer(first, &first_queue).await);
        assert!(moved.answer(second, &second_queue).await);
        assert_eq!(second_answer.await.expect("it is told").expect("a reply").id, second);
        assert_eq!(*moved.line.state().borrow(), State::Ready);
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_of_before_outlives_the_connection_that_the_client_moved_to() {
        let mut moved = Moved::new(|_| {}).await;
        let (first, first_queue, first_answer) = moved.call().await;
        let new = moved.go().await;
        let (_, _, second_answer) = moved.call().await;
        new.close().await;
        assert!(matches!(second_answer.await, Ok(Err(CallEnd::Lost(_)))));
        assert!(moved.answer(first, &first_queue).await);
        assert_eq!(first_answer.await.expect("it is told").expect("a reply").id, first);
        let (third, third_queue, third_answer) = moved.call().await;
        assert!(moved.answer(third, &third_queue).await);
        assert_eq!(third_answer.await.expect("it is told").expect("a reply").id, third);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_stays_where_it_is_while_something_is_not_confirmed() {
        let mut moved = Moved::new(keep_unconfirmed).await;
        let (_, first_queue, _answer) = moved.call().await;
        let new = moved.go().await;
        let since = Instant::now();
        let (_, second_queue, _answer) = moved.call().await;
        assert_eq!((second_queue, since.elapsed()), (first_queue, HOLD), "it is held for a moment");
        tokio::time::sleep(HOLD).await;
        assert!(new.declare(&[]).await.is_err(), "it is closed");
    }

    #[tokio::test(start_paused = true)]
    async fn a_call_with_little_time_is_not_held() {
        let mut moved = Moved::new(keep_unconfirmed).await;
        let (_, first_queue, _answer) = moved.call().await;
        moved.go().await;
        let since = Instant::now();
        let (_, second_queue, _answer) = moved.call_within(HOLD / 2).await;
        assert_eq!((second_queue, since.elapsed()), (first_queue, Duration::ZERO));
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_held_leaves_as_the_client_closes() {
        let mut moved = Moved::new(keep_unconfirmed).await;
        moved.go().await;
        let (_, _answer) = moved.post(Duration::from_secs(60));
        moved.line.close().await;
        moved.calls.next().await.expect("it has left");
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_does_not_move_while_something_is_wrong() {
        let mut task = held().await;
        task.block("low on memory".into());
        assert!(!task.is_held(), "it would not hear of the end");
        task.connected(task.sessions.clone().open_first().await);
        assert!(!task.is_held());
        task.unblock();
        task.connected(task.sessions.clone().open_first().await);
        assert!(task.is_held());
        task.stay();
        let since = Instant::now();
        task.enter(State::Degraded { reason: "nothing is confirmed".into(), since });
        task.connected(task.sessions.clone().open_first().await);
        assert!(!task.is_held(), "its state would stay like that");
    }

    #[tokio::test(start_paused = true)]
    async fn what_has_arrived_over_two_connections_is_read_though_both_are_lost() {
        for former_first in [false, true] {
            let mut task = held().await;
            task.unconfirmed.remove(0);
            task.switch();
            assert!(task.former.is_some());
            if former_first {
                task.lose_former();
            }
            task.lose(&"it was cut".into());
            task.lose_former();
            assert_eq!(task.leaving.as_ref().map(|leaving| leaving.rests.len()), Some(2));
        }
    }
}
