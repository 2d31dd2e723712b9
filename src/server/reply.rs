//! The bodies of replies, and of the messages that tell a caller that its call is still running.

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

/// What a reply belongs to, and how it is encoded.
pub(super) struct OutgoingReply<'a> {
    /// The request's id.
    pub(super) id: Uuid,
    pub(super) codec: Codec,
    /// The instance that replies.
    pub(super) instance: &'a Arc<str>,
    /// How its payload is compressed, if that makes it smaller.
    pub(super) compression: Option<Compression>,
    /// How long the handler ran. `None` if there was none.
    pub(super) handler_time: Option<Duration>,
    /// How many calls of the service run here, for a caller that has chosen this instance.
    pub(super) running: Option<u64>,
}

impl OutgoingReply<'_> {
    /// The body of the reply. If it has more than `max_size` bytes, a fault takes its place that says so.
    pub(super) fn body(&self, answer: Answer, max_size: usize) -> Bytes {
        let mut reply = blank(Kind::Reply, self.id, self.codec, self.instance);
        reply.metadata.handler_time = self.handler_time;
        if self.running.is_some() {
            reply.metadata.more_mut().running = self.running;
        }
        let body = match answer {
            Answer::Result(body) => around(body, reply),
            Answer::ServiceError(body) => {
                (reply.status, reply.service_error) = (Code::Unknown, true);
                around(body, reply)
            }
            Answer::Fault(fault) => {
                reply.status = fault.code;
                reply.metadata.more_mut().error = Some(shortened(&fault.message).to_owned());
                reply.metadata.more_mut().retry_after = fault.retry_after;
                reply.metadata.more_mut().is_permanent = fault.is_permanent;
                reply.to_body()
            }
        };
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

/// The body that takes the place of a reply over a size limit, the server's or the broker's. `size` and `limit` are
/// bytes.
pub(super) fn too_large(id: Uuid, codec: Codec, instance: &Arc<str>, size: usize, limit: usize) -> Bytes {
    let mut reply = blank(Kind::Reply, id, codec, instance);
    reply.status = Code::ResourceExhausted;
    reply.metadata.more_mut().error = Some(format!("the reply takes {size} bytes, over the cap of {limit}"));
    reply.metadata.more_mut().too_large = Some((size as u64, limit as u64));
    reply.to_body()
}

/// The body of a message that tells that the call `id` is still running.
pub(super) fn keep_alive(id: Uuid, instance: &Arc<str>) -> Bytes {
    blank(Kind::KeepAlive, id, Codec::Raw, instance).to_body()
}

/// The reply with this payload, and with what middleware has attached to that.
fn around(body: Body, mut reply: Frame) -> Bytes {
    if !body.metadata.is_empty() {
        reply.metadata.more_mut().user = body.metadata.clone().into_vec();
    }
    body.in_frame(&reply)
}

/// A frame without status and payload.
fn blank(kind: Kind, id: Uuid, codec: Codec, instance: &Arc<str>) -> Frame {
    let metadata = Metadata { instance: Some(instance.clone()), accepts: Readable::HERE, ..Metadata::default() };
    Frame::new(kind, id, codec, metadata, Bytes::new())
}
