//! The bodies of replies and signs of life.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use uuid::Uuid;

use super::reason::shortened;
use crate::codec::Codec;
use crate::compression::{Compression, Readable};
use crate::error::Code;
use crate::frame::{self, Frame, Kind, Metadata};
use crate::service::{Answer, Body};

/// What a reply answers, and how it is written.
pub(super) struct Reply<'a> {
    /// The request's id.
    pub(super) id: Uuid,
    pub(super) codec: Codec,
    /// The instance that answers.
    pub(super) instance: &'a Arc<str>,
    /// Its payload is compressed like this, if that makes it smaller.
    pub(super) compression: Option<Compression>,
    /// How long the handler took, if one ran.
    pub(super) handler_time: Option<Duration>,
}

impl Reply<'_> {
    /// The body of the reply, of at most `max_size` bytes: a larger one is replaced by a fault that says so.
    pub(super) fn body(&self, answer: Answer, max_size: usize) -> Bytes {
        let mut reply = blank(Kind::Reply, self.id, self.codec, self.instance);
        reply.metadata.handler_time = self.handler_time;
        match answer {
            Answer::Result(body) => give(&mut reply, body),
            Answer::ServiceError(body) => {
                (reply.status, reply.service_error) = (Code::Unknown, true);
                give(&mut reply, body);
            }
            Answer::Fault(fault) => {
                reply.status = fault.code;
                reply.metadata.more_mut().error = Some(shortened(&fault.message).to_owned());
                reply.metadata.more_mut().retry_after = fault.retry_after;
            }
        }
        let body = reply.to_body();
        let body = match self.compression {
            Some(compression) => frame::compressed(body, compression),
            None => body,
        };
        match body.len() {
            size if size > max_size => too_large(self.id, self.codec, self.instance, size, max_size),
            _ => body,
        }
    }
}

/// The body that takes the place of a reply over a cap, ours or the broker's.
pub(super) fn too_large(id: Uuid, codec: Codec, instance: &Arc<str>, size: usize, limit: usize) -> Bytes {
    let mut reply = blank(Kind::Reply, id, codec, instance);
    reply.status = Code::ResourceExhausted;
    reply.metadata.more_mut().error = Some(format!("the reply takes {size} bytes, over the cap of {limit}"));
    reply.metadata.more_mut().too_large = Some((size as u64, limit as u64));
    reply.to_body()
}

/// The body of a sign of life: the call of this id still runs.
pub(super) fn keep_alive(id: Uuid, instance: &Arc<str>) -> Bytes {
    blank(Kind::KeepAlive, id, Codec::Raw, instance).to_body()
}

/// Gives a reply its payload, and what middleware has attached to that.
fn give(reply: &mut Frame, body: Body) {
    reply.payload = body.bytes.into();
    if !body.metadata.is_empty() {
        reply.metadata.more_mut().user = body.metadata.into_vec();
    }
}

fn blank(kind: Kind, id: Uuid, codec: Codec, instance: &Arc<str>) -> Frame {
    let metadata = Metadata { instance: Some(instance.clone()), accepts: Readable::HERE, ..Metadata::default() };
    Frame::new(kind, id, codec, metadata, Bytes::new())
}
