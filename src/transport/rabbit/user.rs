//! The user as whom the broker knows this connection. Its name stands in the property `user_id` of each message.
//!
//! RabbitMQ refuses a message with another name there. The name in the address is not always the right one: with a
//! certificate or a token, only the broker knows it. So the broker is asked.

use std::sync::OnceLock;

use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::uri::{AMQPUri, SASLMechanism};
use lapin::{BasicProperties, Channel};
use tracing::{debug, warn};
use uuid::Uuid;

use super::connection::{ACCESS_REFUSED, Link, Refusal};

/// The user of one transport. All connections of the transport have the same.
#[derive(Debug)]
pub(super) struct User {
    /// The name in the address; empty where the address does not tell it.
    guess: ShortString,
    /// The name that the broker has confirmed or told. `None` inside if it does not tell it; messages then carry no
    /// name.
    name: OnceLock<Option<ShortString>>,
    /// The broker's words, if it has said that this user may not write to the default exchange.
    refusal: OnceLock<String>,
}

impl User {
    /// The user who logs in with this address. The broker has not been asked yet.
    pub(super) fn of(uri: &AMQPUri) -> Self {
        let guess = match uri.query.auth_mechanism {
            None | Some(SASLMechanism::Plain | SASLMechanism::AMQPlain | SASLMechanism::RabbitCrDemo) => {
                uri.authority.userinfo.username.as_str()
            }
            // The broker takes the name from the certificate or from its own settings. The empty name is nobody's, so
            // the broker corrects it.
            Some(SASLMechanism::External | SASLMechanism::Anonymous) => "",
        };
        Self { guess: ShortString::try_new(guess).unwrap_or_default(), name: OnceLock::new(), refusal: OnceLock::new() }
    }

    /// The name, if the broker has been asked and has told it.
    pub(super) fn name(&self) -> Option<&str> {
        self.name.get().and_then(Option::as_ref).map(ShortString::as_str)
    }

    /// Why this user may not send replies, if the broker has said so: replies go to the default exchange.
    pub(super) fn refusal(&self) -> Option<&str> {
        self.refusal.get().map(String::as_str)
    }

    /// Whether the broker has been asked.
    pub(super) fn is_known(&self) -> bool {
        self.name.get().is_some()
    }

    /// Asks the broker for the name: sends a message to nobody on `channel`, which has to be in confirm mode. The
    /// broker confirms it if the name in it is right. Otherwise it closes the channel, and its words tell the right
    /// name. Returns whether the channel is still open.
    ///
    /// During an alarm of the broker, this waits until the alarm ends, as any publication does.
    ///
    /// # Errors
    /// The connection has ended, or the broker refused the channel for another reason.
    pub(super) async fn ask(&self, link: &Link, channel: &Channel) -> Result<bool, Refusal> {
        let nobody: ShortString = Uuid::new_v4().to_string().into();
        let properties = BasicProperties::default().with_user_id(self.guess.clone());
        let options = BasicPublishOptions::default();
        let said = async { channel.basic_publish("".into(), nobody, options, &[], properties).await?.await };
        let (name, open) = match link.hear(said).await {
            Ok(_) => (Some(self.guess.clone()).filter(|guess| !guess.as_str().is_empty()), true),
            Err(Refusal::Refused { code, text }) => {
                if code == ACCESS_REFUSED {
                    // Whoever asked at the same time was told the same.
                    let _ = self.refusal.set(text.clone());
                }
                let name = named(&text).and_then(|name| ShortString::try_new(name).ok());
                if name.is_none() {
                    warn!(
                        name = link.name(),
                        said = text,
                        "the broker does not tell who this user is: messages will not carry its name"
                    );
                }
                (name, false)
            }
            Err(refusal) => return Err(refusal),
        };
        debug!(name = link.name(), user = name.as_ref().map(ShortString::as_str), "known to the broker");
        // Whoever asked at the same time was told the same.
        let _ = self.name.set(name);
        Ok(open)
    }
}

/// The name of the user in the broker's words: "PRECONDITION_FAILED - user_id property set to 'x' but authenticated
/// user was 'y'", or "ACCESS_REFUSED - write access to exchange 'amq.default' in vhost '/' refused for user 'y'".
/// `None` if the name is not complete: the broker cuts its words after 255 bytes.
fn named(words: &str) -> Option<&str> {
    let (_, name) =
        ["authenticated user was '", "refused for user '"].iter().find_map(|before| words.split_once(before))?;
    name.strip_suffix('\'')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_user_is_read_from_the_brokers_words() {
        let words = "PRECONDITION_FAILED - user_id property set to 'bob' but authenticated user was 'o'hara'";
        assert_eq!(named(words), Some("o'hara"));
        let words = "ACCESS_REFUSED - access to exchange 'amq.default' in vhost '/' refused for user 'bob'";
        assert_eq!(named(words), Some("bob"));
        assert_eq!(named("PRECONDITION_FAILED - user_id property set to '' but authenticated user was 'a-long"), None);
        assert_eq!(named("NOT_FOUND - no exchange 'a' in vhost '/'"), None);
    }

    #[test]
    fn the_addresss_user_is_guessed_only_where_it_logs_in() {
        let guess = |uri: &str| User::of(&uri.parse().expect("a good one")).guess.to_string();
        assert_eq!(guess("amqp://host"), "guest");
        assert_eq!(guess("amqp://b%40b:secret@host/v"), "b@b");
        assert_eq!(guess("amqps://bob@host?auth_mechanism=external"), "");
    }
}
