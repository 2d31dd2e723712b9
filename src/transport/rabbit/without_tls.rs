//! Stands in for `tls.rs` in a build without the cargo feature `tls`. None of this runs: addresses with `amqps://` are
//! refused before.

use std::io::{self, IoSlice};

use bytes::BytesMut;
use tokio::net::TcpStream;

use crate::transport::address::Host;

/// A type without values, since nothing can connect with TLS in this build.
#[derive(Debug, Clone)]
pub(in crate::transport) enum Connector {}

impl Connector {
    pub(in crate::transport) fn has_identity(&self) -> bool {
        match *self {}
    }

    pub(super) async fn encrypt(&self, _: &TcpStream, _: &Host) -> io::Result<Encryption> {
        match *self {}
    }
}

/// A type without values, as well.
#[derive(Debug, Clone)]
pub(super) enum Encryption {}

impl Encryption {
    pub(super) fn decrypt(&self, _: &mut BytesMut, _: &mut BytesMut, _: &TcpStream) -> io::Result<()> {
        match *self {}
    }

    pub(super) fn write(&self, _: &[IoSlice<'_>], _: &TcpStream) -> io::Result<usize> {
        match *self {}
    }

    pub(super) fn is_behind(&self) -> bool {
        match *self {}
    }
}

pub(super) fn refusal(_: &io::Error) -> Option<String> {
    None
}
