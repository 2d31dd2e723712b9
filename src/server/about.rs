//! What an instance answers when it is asked about itself.

use serde::Serialize;

use super::worker::Worker;
use crate::codec::Codec;
use crate::document::{INFO, Instance, InstanceStats, PING, STATS};
use crate::error::{Code, Fault};
use crate::service::Answer;

impl Worker {
    /// The answer to a question of discovery, which needs no place among the calls. None for what is no such question.
    pub(super) fn about_itself(&self, question: &str, codec: Codec) -> Option<Answer> {
        match question {
            PING => Some(written(codec, &())),
            INFO => Some(written(codec, &self.info())),
            STATS => Some(written(codec, &self.stats())),
            _ => None,
        }
    }

    fn info(&self) -> Instance {
        Instance {
            service: self.name.to_string(),
            instance: self.site.instance.to_string(),
            hopline: env!("CARGO_PKG_VERSION").to_owned(),
            methods: self.methods.values().map(|served| served.method.info()).collect(),
        }
    }

    fn stats(&self) -> InstanceStats {
        InstanceStats {
            service: self.name.to_string(),
            instance: self.site.instance.to_string(),
            repeated: self.methods.values().map(|served| served.counts.repeated()).sum(),
            methods: self.methods.values().map(|served| served.stats()).collect(),
            ..self.calls().stats()
        }
    }
}

fn written(codec: Codec, document: &impl Serialize) -> Answer {
    match codec.encode(document) {
        Ok(payload) => Answer::Result(payload.into()),
        Err(error) => Answer::Fault(Fault::new(Code::Internal, error.to_string())),
    }
}
