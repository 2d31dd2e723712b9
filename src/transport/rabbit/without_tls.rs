//! What stands in the place of `tls.rs` in a build without the feature `tls`: nobody gets so far, since addresses that ask
//! for TLS are refused.

use std::io;

use futures::io::{AsyncRead, AsyncWrite};
use lapin::tcp::AsyncTcpStream;

use crate::transport::address::Host;

/// There is none.
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
