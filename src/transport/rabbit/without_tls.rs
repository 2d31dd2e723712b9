//! Stands in for `tls.rs` in a build without the cargo feature `tls`. None of this runs: addresses with `amqps://` are
//! refused before.

use std::io;

use futures::io::{AsyncRead, AsyncWrite};
use lapin::tcp::AsyncTcpStream;

use crate::transport::address::Host;

/// A type without values, since nothing can connect with TLS in this build.
#[derive(Debug, Clone)]
pub(in crate::transport) enum Connector {}

impl Connector {
    pub(in crate::transport) fn has_identity(&self) -> bool {
        match *self {}
    }

    pub(super) async fn encrypt<S>(&self, _: AsyncTcpStream<S>, _: &Host) -> io::Result<AsyncTcpStream<S>>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        match *self {}
    }
}

pub(super) fn refusal(_: &io::Error) -> Option<String> {
    None
}
