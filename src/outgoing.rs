//! What leaves, on both sides: a client's line sends calls with it, and a server's task of replies sends replies.
//!
//! A frame that is to be sent becomes a [`Parcel`] with an address. If it cannot leave at once, it is kept in
//! [`Waiting`], which decides what leaves next. [`Window`] says how many bytes may be on their way to the broker, and
//! [`Lanes`] says which queues confirm nothing and get nothing more. What may leave goes into the [`Outbox`], which puts
//! frames with the same address into one message, a [`Bundle`]. [`Receipts`] keeps what was published until its
//! outcome is known. None of the five does any I/O.

mod lanes;
mod outbox;
mod receipts;
mod waiting;
mod window;

pub(crate) use self::lanes::{Lane, Lanes};
pub(crate) use self::outbox::{BATCH, Bundle, MAX_BYTES, Outbox, Parcel, Share, UnderWay, take_all};
pub(crate) use self::receipts::Receipts;
pub(crate) use self::waiting::{Waiting, Weight};
pub(crate) use self::window::{AROUND, Window};
