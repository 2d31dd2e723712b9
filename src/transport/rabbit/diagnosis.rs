//! Why a connection could not be opened: sentences for people that say what is wrong, and what to look at.
//!
//! `connection.rs` and `pool.rs` ask for them when an attempt fails. They know what RabbitMQ, TLS and some other
//! servers do when something is wrong.

use std::fmt;
use std::io;
use std::time::Duration;

use lapin::ErrorKind;
use lapin::uri::{AMQPUri, SASLMechanism};

use super::connection::{Refusal, code, ended_by};
use super::tls;
use super::words;
use crate::transport::address::{Host, RabbitAddress, Scheme};

/// How far an attempt to connect has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ConnectStage {
    /// The host's name is being looked up.
    Resolving,
    /// A socket is being opened to one of the host's addresses.
    Connecting,
    /// The other side has accepted the socket; TLS is being negotiated.
    Encrypting,
    /// AMQP has begun; user and virtual host are being checked.
    LoggingIn,
    /// The login has succeeded; channels are being opened.
    Opening,
}

/// The attempt did not get beyond `stage` in the time `within`, and was given up.
pub(super) fn silence(stage: ConnectStage, address: &RabbitAddress, within: Duration) -> String {
    let what = match stage {
        ConnectStage::Resolving => "the name server does not say where this host is",
        ConnectStage::Connecting => {
            "nothing comes back, not even a refusal: check host and port, and the firewalls before them"
        }
        ConnectStage::Encrypting => "something accepts connections there and does not answer to TLS",
        ConnectStage::LoggingIn => {
            "something accepts connections there and has not greeted as RabbitMQ does: check the port, and the proxy if \
             it is one, or allow more time"
        }
        ConnectStage::Opening => "the broker accepts the login and opens no channel: its log may say why",
    };
    match address.options.connect_timeout {
        None => format!("no answer within {within:?}: {what}"),
        Some(_) => format!("no answer within the `connection_timeout` of {within:?}: {what}"),
    }
}

/// The host's name has no address.
pub(super) fn unresolved(address: &RabbitAddress, error: &io::Error) -> String {
    let host = match &address.host {
        Host::Name(name) => name.as_str(),
        Host::Ip(_) => "the address",
    };
    format!("the host `{host}` is not known: check its name, and the name server ({error})")
}

/// None of the host's addresses accepts a connection.
pub(super) fn unreachable(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => {
            format!("nobody listens there: check that RabbitMQ runs, and the port ({error})")
        }
        io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable => {
            format!("no way leads there from this machine: check host and network ({error})")
        }
        _ => error.to_string(),
    }
}

/// The TLS handshake has failed.
pub(super) fn unencrypted(error: &io::Error) -> String {
    tls::refusal(error).unwrap_or_else(|| broken_off(error))
}

/// The other side has ended the TLS handshake without a reason.
fn broken_off(error: impl fmt::Display) -> String {
    format!(
        "the broker broke TLS off: it may ask for a client certificate, given with `Tls::identity`, or not accept the one \
         that it got; or that is no port for TLS, which usually is 5671 ({error})"
    )
}

/// The other side has accepted the socket, but the login has failed. `first_words` is the first that it sent: it tells
/// whether it is RabbitMQ at all.
pub(super) fn refused(error: &lapin::Error, uri: &AMQPUri, address: &RabbitAddress, first_words: &[u8]) -> String {
    if let ErrorKind::IOError(error) = error.kind()
        && let Some(why) = tls::refusal(error)
    {
        return why;
    }
    let words = words::of(error);
    let is_closed = ended_by(error, &[io::ErrorKind::ConnectionAborted, io::ErrorKind::UnexpectedEof]);
    let is_reset = ended_by(error, &[io::ErrorKind::ConnectionReset, io::ErrorKind::BrokenPipe]);
    let by_certificate = uri.query.auth_mechanism == Some(SASLMechanism::External);
    match first_words {
        // RabbitMQ begins with a frame of a method on channel 0.
        [1, 0, 0, ..] => {}
        [] if address.scheme == Scheme::Amqps && is_reset => return broken_off(words),
        [] if is_closed || is_reset => {
            return format!(
                "the other side ended the connection without a word: check that this is RabbitMQ's port, usually 5672, or 5671 \
             with amqps:// ({words})"
            );
        }
        [] => return words,
        said => return foreign(said),
    }
    let is_over = is_closed || is_reset;
    match code(error) {
        // RabbitMQ closes the connection without a word if it does not offer EXTERNAL.
        0 if by_certificate && is_over => format!(
            "the broker ended the connection at the login, which means that it does not offer EXTERNAL: enable its plugin \
             rabbitmq_auth_mechanism_ssl, and EXTERNAL in its auth_mechanisms ({words})"
        ),
        0 if is_over => format!(
            "the broker ended the connection at the login without a word, as when it does not offer the `auth_mechanism`, \
             or not the `frame_max`, of the address: its log says why ({words})"
        ),
        403 if by_certificate => {
            format!("access refused: the name in the client certificate has to be a user's ({words})")
        }
        403 => format!("access refused: check user and password ({words})"),
        530 => not_allowed(&words, address),
        _ => words,
    }
}

/// The login has succeeded, but the broker does not open the channels.
pub(super) fn unopened(refusal: Refusal, address: &RabbitAddress) -> String {
    match refusal {
        Refusal::Ended(reason) if reason.starts_with("NOT_ALLOWED") => not_allowed(&reason, address),
        Refusal::Ended(reason) => format!("the broker ended the connection again ({reason})"),
        refusal => refusal.during("open a channel").to_string(),
    }
}

/// The broker has said NOT_ALLOWED. There are several reasons for that; `words` are the broker's.
fn not_allowed(words: &str, address: &RabbitAddress) -> String {
    let vhost = &address.vhost;
    let is = |part: &str| words.contains(part);
    let what = if is("number of channels opened for user") {
        "the user has as many channels open as it may: close some, or raise the limit with `rabbitmqctl set_user_limits`"
            .to_owned()
    } else if is("user connection limit") {
        "the user has as many connections as it may: close some, or raise the limit with `rabbitmqctl set_user_limits`"
            .to_owned()
    } else if is("connection limit") && is("vhost") {
        format!(
            "the virtual host has as many connections as it may: close some, or raise the limit with `rabbitmqctl \
             set_vhost_limits -p {vhost}`"
        )
    } else if is("limit") {
        "the broker has as many of these as it may: close some, or raise its limit".to_owned()
    } else if is("not found") && vhost.is_empty() {
        "there is no virtual host of the empty name: leave out the `/` at the end of the address for the usual one"
            .to_owned()
    } else if is("not found") {
        format!(
            "there is no virtual host `{vhost}`: check its name, make it with `rabbitmqctl add_vhost`, or leave it out for \
             the usual one"
        )
    } else if is("refused for user") {
        format!(
            "the virtual host `{vhost}` is closed to this user: give it permissions with `rabbitmqctl set_permissions -p \
             {vhost}`"
        )
    } else {
        return format!("the broker does not allow it ({words})");
    };
    format!("{what} ({words})")
}

/// The other side does not speak AMQP 0-9-1. `said` is the first that it sent.
fn foreign(said: &[u8]) -> String {
    let what = match said {
        // The first bytes of a TLS alert.
        [0x15, 3, ..] => return "it speaks TLS at this port, which the address does not: use amqps://".to_owned(),
        [b'A', b'M', b'Q', b'P', ..] => "AMQP of another version than RabbitMQ's 0-9-1",
        [b'H', b'T', b'T', b'P', ..] => "HTTP",
        [b'I', b'N', b'F', b'O', b' ', ..] => "NATS",
        said => {
            let said = said.escape_ascii();
            return format!(
                "it does not speak AMQP at this port, which for RabbitMQ usually is 5672 (it says `{said}`)"
            );
        }
    };
    format!("it speaks {what} at this port: RabbitMQ's is usually 5672, or 5671 with amqps://")
}
