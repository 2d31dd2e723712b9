//! lapin's end of a wire: it reads and writes there as if it were the socket.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Buf as _;
use futures::io::{AsyncRead, AsyncWrite};

use super::Wire;

/// lapin's end of a wire. When it is dropped, the wire ends.
#[derive(Debug)]
pub(in super::super) struct Pipe {
    wire: Arc<Wire>,
    /// Whether lapin was told that nothing is there, to make it handle what it has read.
    has_paused: bool,
}

impl Pipe {
    pub(super) fn new(wire: Arc<Wire>) -> Self {
        Self { wire, has_paused: false }
    }
}

impl Drop for Pipe {
    fn drop(&mut self) {
        self.wire.lock().lapin_is_gone = true;
        self.wire.wake.notify_one();
    }
}

impl AsyncRead for Pipe {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut [u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let mut state = this.wire.lock();
        if !state.for_lapin.is_empty() {
            let count = state.for_lapin.len().min(buffer.len());
            buffer[..count].copy_from_slice(&state.for_lapin[..count]);
            state.for_lapin.advance(count);
            (state.lapin_is_busy, this.has_paused) = (true, false);
            return Poll::Ready(Ok(count));
        }
        // lapin reads until nothing is there. Only then does it handle what it has read, and after that it reads again.
        // After an error it would throw away what it has not handled.
        if state.lapin_is_busy && !this.has_paused {
            this.has_paused = true;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        state.lapin_is_busy = false;
        state.tell_closed();
        this.wire.handled.notify_waiters();
        match &mut state.ended {
            None => {
                state.lapin = Some(context.waker().clone());
                Poll::Pending
            }
            Some(error) => Poll::Ready(error.take().map_or(Ok(0), Err)),
        }
    }
}

impl AsyncWrite for Pipe {
    /// Takes everything. lapin has little to say, and reading tells of errors, after everything that has arrived: lapin
    /// reads nothing more once it knows of an error.
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, buffer: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.wire.lock();
        state.push_from_lapin(buffer);
        self.wire.flush(state);
        Poll::Ready(Ok(buffer.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_close(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}
