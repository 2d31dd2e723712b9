//! Parcels that leave later than they were made: copies that may be sent again, and what has waited.

use tokio::time::Instant;

use crate::client::line::Token;
use crate::frame::{self, Kind};
use crate::outgoing::Parcel;

/// A copy of a parcel, to be sent again if its connection or instance is lost.
pub(super) fn copy(parcel: &Parcel<Token>) -> Parcel<Token> {
    let Token { deadline, repeatable, attempts, before, .. } = parcel.token;
    Parcel {
        id: parcel.id,
        frame: frame::to_keep(&parcel.frame),
        share: parcel.share,
        kind: parcel.kind.clone(),
        expiration: parcel.expiration,
        // A call that was sent may be anywhere, so it is sent again even if the service has no instance.
        token: Token { repeatable, attempts, before, ..Token::until(deadline) },
    }
}

/// Writes into the frame of a parcel that has waited how much time it has left and which attempt it is.
pub(super) fn renew(parcel: &mut Parcel<Token>) {
    let left = parcel.token.deadline.saturating_duration_since(Instant::now());
    if parcel.token.attempts == 0
        && parcel.expiration.is_some()
        && let Some(frame) = frame::with_remaining(&parcel.frame, left)
    {
        (parcel.frame, parcel.expiration) = (frame, Some(left));
        return;
    }
    let Some(Ok(mut frame)) = frame::decode(parcel.frame.clone()).next() else { return };
    if parcel.expiration.is_some() {
        parcel.expiration = Some(left);
        frame.metadata.remaining = Some(left);
    }
    // For oneway calls the server counts the attempts: those of the handler.
    if parcel.token.attempts > 0 && frame.kind == Kind::Request {
        let Token { attempts, before, .. } = parcel.token;
        frame.metadata.more_mut().attempt = Some(u64::from(before) + u64::from(attempts) + 1);
    }
    parcel.frame = frame.to_body();
}
