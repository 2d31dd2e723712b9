//! Whom the broker takes this connection's user for: the name that its messages carry.

use std::sync::OnceLock;

use lapin::options::BasicPublishOptions;
use lapin::types::ShortString;
use lapin::uri::{AMQPUri, SASLMechanism};
use lapin::{BasicProperties, Channel};
use tracing::{debug, warn};
use uuid::Uuid;

use super::connection::{ACCESS_REFUSED, Link, Refusal};

/// The user of one transport's connections, who is the same on all of them.
#[derive(Debug)]
pub(super) struct User {
    guess: ShortString,
    /// The name in the broker's words, once it has said one; `None` where it does not tell.
    name: OnceLock<Option<ShortString>>,
    /// The broker's words when this user may not write to the default exchange, if it has said so.
    refusal: OnceLock<String>,
}

impl User {
    /// The user who logs in by this.
    pub(super) fn of(uri: &AMQPUri) -> Self {
        let guess = match uri.query.auth_mechanism {
            None | Some(SASLMechanism::Plain | SASLMechanism::AMQPlain | SASLMechanism::RabbitCrDemo) => {
                uri.authority.userinfo.username.as_str()
            }
            // The broker makes the name of a certificate, or of its settings. This one is nobody's.
            Some(SASLMechanism::External | SASLMechanism::Anonymous) => "",
        };
        Self { guess: ShortString::try_new(guess).unwrap_or_default(), name: OnceLock::new(), refusal: OnceLock::new() }
    }

    /// The name, if the broker has said it.
    pub(super) fn name(&self) -> Option<&ShortString> {
        self.name.get().and_then(Option::as_ref)
    }

    /// Why this user cannot reply to anybody, if the broker has said so.
    pub(super) fn refusal(&self) -> Option<&str> {
        self.refusal.get().map(String::as_str)
    }

    /// Whether the broker has been asked.
    pub(super) fn is_known(&self) -> bool {
        self.name.get().is_some()
    }

    /// Asks the broker, with a message to nobody on a channel that confirms: it takes only those that carry the name of
    /// their connection's user, and names that user otherwise. Tells whether the channel is still open after that.
    ///
    /// Under a broker's alarm this waits for the alarm's end, as any publication does.
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

/// The user in the broker's "PRECONDITION_FAILED - user_id property set to 'x' but authenticated user was 'y'", or in its
/// "ACCESS_REFUSED - write access to exchange 'amq.default' in vhost '/' refused for user 'y'". The broker cuts its words
/// at 255 bytes, perhaps within.
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
