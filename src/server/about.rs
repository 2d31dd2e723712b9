//! A server's replies to the questions of discovery: ping, info, statistics, the first to a tap, and to drain.

use std::sync::Arc;

use serde::Serialize;
use tracing::info;

use super::allow::Caller;
use super::message::{Message, Source};
use super::process;
use super::worker::Worker;
use crate::clock::unix_millis;
use crate::codec::Codec;
use crate::compression::{Compression, Readable};
#[cfg(feature = "schema")]
use crate::document::SCHEMA;
use crate::document::{DRAIN, INFO, Instance, InstanceStats, PING, STATS, TAP};
use crate::error::{Code, Fault};
use crate::frame::{Frame, Kind, micros};
use crate::service::Answer;
use crate::topology::instance_key;

impl Worker {
    /// The reply to a question of discovery, or `None` if `request` is not one. It runs no handler, so it does not
    /// wait for a place among the running calls.
    pub(super) fn about_itself(self: &Arc<Self>, request: &Frame, message: &Message) -> Option<Answer> {
        let codec = request.codec;
        match request.metadata.method.as_deref()? {
            PING => Some(written(codec, &())),
            INFO => Some(written(codec, &self.info())),
            STATS => Some(written(codec, &self.stats())),
            #[cfg(feature = "schema")]
            SCHEMA => Some(written(codec, self.schema())),
            TAP if request.kind == Kind::Request => Some(self.begin_tap(request, message)),
            _ => None,
        }
    }

    /// Begins to drain, if the caller may have that done, and has asked this instance alone.
    ///
    /// # Errors
    /// A fault that says what is missing.
    pub(super) fn asked_to_drain(&self, frame: &Frame, message: &Message) -> Result<Answer, Fault> {
        let (site, own) = (&self.site, instance_key(&*self.name, &self.site.instance));
        if message.exchange != site.namespace.rpc() || message.key != own {
            let why = format!("`{DRAIN}` is asked of one instance, by its key `{own}`, and not of several");
            return Err(Fault::new(Code::InvalidArgument, why));
        }
        if !site.allow_drain.is_set() {
            let why = "nobody may drain this server from afar: have it allowed by `Server::allow_drain`, or send its process \
                       SIGTERM";
            return Err(Fault::new(Code::PermissionDenied, why));
        }
        let caller = Caller { user: message.user.as_deref(), instance: frame.metadata.instance.as_deref() };
        site.allow_drain.check(&caller, &format!("{}.{DRAIN}", self.name))?;
        info!(name = &*site.name, user = caller.user, caller = caller.instance, "it drains, as it is asked from afar");
        let site = site.clone();
        drop(tokio::spawn(async move { site.drain().await }));
        Ok(written(frame.codec, &()))
    }

    /// What this instance serves.
    fn info(&self) -> Instance {
        let compressions = [Compression::Lz4, Compression::Zstd];
        let readable = compressions.into_iter().filter(|compression| Readable::HERE.includes(*compression));
        Instance {
            service: self.name.to_string(),
            instance: self.site.instance.to_string(),
            hopline: env!("CARGO_PKG_VERSION").to_owned(),
            host: self.site.process.host.clone(),
            pid: std::process::id(),
            started_at_ms: self.site.process.started_at_ms,
            codecs: Codec::ALL.map(|codec| codec.name().to_owned()).into(),
            compressions: readable.map(|compression| compression.name().to_owned()).collect(),
            draining: self.site.draining.is_cancelled(),
            quarantined: self.is_away(Source::Calls),
            attributes: self.site.attributes.clone(),
            rules: self.site.rules.as_ref().map(|rules| rules.in_force(&self.name)),
            methods: self.all_methods().map(|served| served.method.info()).collect(),
        }
    }

    /// What its methods take and return. Made when it is asked for the first time.
    #[cfg(feature = "schema")]
    fn schema(&self) -> &crate::document::ServiceSchema {
        self.schema.get_or_init(|| {
            let methods = self.methods.values().map(|served| &served.method);
            crate::service::schema_of(&self.name, &self.site.instance, methods)
        })
    }

    /// How busy this instance is. The methods and the running calls count separately; this puts both into one document.
    fn stats(&self) -> InstanceStats {
        InstanceStats {
            service: self.name.to_string(),
            instance: self.site.instance.to_string(),
            now_ms: unix_millis(),
            repeated: self.all_methods().map(|served| served.counts.repeated()).sum(),
            cpu_micros: process::cpu_time().map(micros),
            memory_bytes: process::memory(),
            methods: self.all_methods().map(|served| served.stats()).collect(),
            ..self.calls().stats()
        }
    }
}

/// The document as a result in the caller's codec. A document that cannot be encoded becomes a fault.
pub(super) fn written(codec: Codec, document: &impl Serialize) -> Answer {
    match codec.encode(document) {
        Ok(payload) => Answer::Result(payload.into()),
        Err(error) => Answer::Fault(Fault::new(Code::Internal, error.to_string())),
    }
}
