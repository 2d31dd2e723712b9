//! Bytes that the socket has not taken yet.

use std::collections::VecDeque;
use std::io::{self, IoSlice};

use bytes::{Buf as _, Bytes, BytesMut};

/// A part of a body of this size, in bytes, is not copied.
const LARGE: usize = 8 * 1024;
/// How many parts are written at once.
const PARTS: usize = 32;
/// How many bytes are written at once. Whoever writes also writes what others push meanwhile, but no more than this.
pub(super) const AT_ONCE: u64 = 256 * 1024;
/// A buffer of more bytes than this is not kept when it is empty.
const KEPT: usize = 64 * 1024;

/// Bytes that the socket has not taken yet, in the order in which they are sent.
#[derive(Debug, Default)]
pub(super) struct Unsent {
    /// What is sent first.
    parts: VecDeque<Bytes>,
    /// What is sent after that.
    last: BytesMut,
    /// The buffer for what is pushed while this is written.
    spare: BytesMut,
    /// How many bytes were pushed in all, and how many of these the socket has taken.
    pushed: u64,
    written: u64,
    /// While somebody writes: where that ends among all bytes.
    writing: Option<u64>,
}

/// Bytes that are being written. Others may push more meanwhile.
#[derive(Debug)]
pub(super) struct BeingWritten {
    parts: VecDeque<Bytes>,
    last: BytesMut,
    /// The size of the buffer of `last`.
    capacity: usize,
    /// How many of them the socket has taken.
    taken: usize,
}

impl Unsent {
    /// Pushes what `write` writes.
    pub(super) fn push(&mut self, write: impl FnOnce(&mut BytesMut)) {
        let before = self.last.len();
        write(&mut self.last);
        self.pushed += (self.last.len() - before) as u64;
    }

    /// The same, unless `write` fails.
    pub(super) fn try_push<E>(&mut self, write: impl FnOnce(&mut BytesMut) -> Result<(), E>) -> Result<(), E> {
        let before = self.last.len();
        let written = write(&mut self.last);
        match written {
            Ok(()) => self.pushed += (self.last.len() - before) as u64,
            Err(_) => self.last.truncate(before),
        }
        written
    }

    /// Pushes bytes. Many of them are not copied.
    pub(super) fn push_bytes(&mut self, bytes: Bytes) {
        self.pushed += bytes.len() as u64;
        if bytes.len() < LARGE {
            self.last.extend_from_slice(&bytes);
            return;
        }
        if !self.last.is_empty() {
            self.parts.push_back(self.last.split().freeze());
        }
        self.parts.push_back(bytes);
    }

    /// How many bytes were pushed in all.
    pub(super) fn pushed(&self) -> u64 {
        self.pushed
    }

    /// How many of the pushed bytes the socket has taken, or perhaps has, since they are being written.
    pub(super) fn left(&self) -> u64 {
        self.writing.unwrap_or(self.written)
    }

    /// Whether somebody writes what was taken out.
    pub(super) fn is_being_written(&self) -> bool {
        self.writing.is_some()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty() && self.last.is_empty()
    }

    /// Takes everything out, to be written. It has to be put back before more is taken out.
    pub(super) fn take(&mut self) -> BeingWritten {
        self.writing = Some(self.pushed);
        let last = std::mem::replace(&mut self.last, std::mem::take(&mut self.spare));
        BeingWritten { parts: std::mem::take(&mut self.parts), capacity: last.capacity(), last, taken: 0 }
    }

    /// Puts back what the socket has not taken, in front of what was pushed meanwhile.
    pub(super) fn put_back(&mut self, rest: BeingWritten) {
        let BeingWritten { mut parts, mut last, capacity, taken } = rest;
        self.written += taken as u64;
        self.writing = None;
        if last.is_empty() {
            // A buffer of many bytes is not kept.
            if capacity <= KEPT {
                last.clear();
                self.spare = last;
            }
        } else {
            parts.push_back(last.freeze());
        }
        if self.parts.is_empty() || !parts.is_empty() {
            parts.append(&mut self.parts);
            self.parts = parts;
        }
    }
}

impl BeingWritten {
    fn is_empty(&self) -> bool {
        self.parts.is_empty() && self.last.is_empty()
    }

    /// Gives `socket` the next bytes until it takes no more, or until it has taken many. It returns how many it has
    /// taken.
    ///
    /// # Errors
    /// Those of the socket, which are `WouldBlock` if it takes nothing now.
    pub(super) fn write_to(&mut self, mut socket: impl FnMut(&[IoSlice<'_>]) -> io::Result<usize>) -> io::Result<()> {
        let mut left = AT_ONCE;
        while left > 0 && !self.is_empty() {
            let mut slices = [IoSlice::new(&[]); PARTS];
            let parts = self.parts.iter().map(|part| &part[..]).chain([&self.last[..]]);
            let mut count = 0;
            for (slice, part) in slices.iter_mut().zip(parts) {
                *slice = IoSlice::new(part);
                count += 1;
            }
            let taken = match socket(&slices[..count])? {
                0 => return Err(io::ErrorKind::WouldBlock.into()),
                taken => taken,
            };
            self.take(taken);
            left = left.saturating_sub(taken as u64);
        }
        Ok(())
    }

    fn take(&mut self, mut bytes: usize) {
        self.taken += bytes;
        while let Some(first) = self.parts.front_mut() {
            if bytes < first.len() {
                return first.advance(bytes);
            }
            bytes -= first.len();
            self.parts.pop_front();
        }
        self.last.advance(bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn push(unsent: &mut Unsent, bytes: &[u8]) {
        unsent.push(|out| out.extend_from_slice(bytes));
    }

    #[test]
    fn everything_is_written_in_order_however_little_the_socket_takes() {
        let large = Bytes::from((0..20_000).map(|n| n as u8).collect::<Vec<_>>());
        for most in [1, 7, 8_192, 1_000_000] {
            let mut unsent = Unsent::default();
            push(&mut unsent, b"before");
            unsent.push_bytes(large.clone());
            push(&mut unsent, b"between");
            unsent.push_bytes(Bytes::from_static(b"small"));
            unsent.push_bytes(large.clone());
            let mut got = Vec::new();
            while !unsent.is_empty() {
                let mut room = most;
                let mut writing = unsent.take();
                let written = writing.write_to(|parts| {
                    let before = got.len();
                    for part in parts {
                        let some = &part[..part.len().min(room)];
                        got.extend_from_slice(some);
                        room -= some.len();
                    }
                    if got.len() == before { Err(io::ErrorKind::WouldBlock.into()) } else { Ok(got.len() - before) }
                });
                unsent.put_back(writing);
                assert!(written.is_ok_and(|()| true) || room == 0);
                assert_eq!(unsent.left(), got.len() as u64);
            }
            let expected = [&b"before"[..], &large, b"betweensmall", &large].concat();
            assert!(got == expected, "at most {most} at once");
            assert_eq!((unsent.pushed(), unsent.left()), (got.len() as u64, got.len() as u64));
        }
    }

    #[test]
    fn what_fails_is_not_sent() {
        let mut unsent = Unsent::default();
        push(&mut unsent, b"first");
        let failed = unsent.try_push(|out| {
            out.extend_from_slice(b"half");
            Err("too long")
        });
        assert_eq!((failed, unsent.pushed()), (Err("too long"), 5));
    }

    #[test]
    fn a_large_buffer_is_not_kept() {
        let mut unsent = Unsent::default();
        push(&mut unsent, &vec![0; 4 * KEPT]);
        while !unsent.is_empty() {
            let mut writing = unsent.take();
            writing.write_to(|parts| Ok(parts.iter().map(|part| part.len()).sum())).expect("it takes everything");
            unsent.put_back(writing);
        }
        // A buffer of which everything was written does not tell its size.
        unsent.last.reserve(1);
        unsent.spare.reserve(1);
        assert!(unsent.last.capacity() <= KEPT && unsent.spare.capacity() <= KEPT);
    }

    #[test]
    fn what_is_pushed_while_others_write_comes_after_their_rest() {
        let mut unsent = Unsent::default();
        push(&mut unsent, b"first");
        let mut writing = unsent.take();
        assert!(unsent.is_empty() && unsent.is_being_written());
        push(&mut unsent, b"second");
        assert_eq!(unsent.left(), 5, "it may have left by now");
        let mut once = [2].into_iter();
        let written = writing.write_to(|_| once.next().ok_or(io::ErrorKind::WouldBlock.into()));
        assert_eq!(written.map_err(|error| error.kind()), Err(io::ErrorKind::WouldBlock));
        unsent.put_back(writing);
        assert_eq!((unsent.pushed(), unsent.left()), (11, 2));
        let mut got = Vec::new();
        let mut writing = unsent.take();
        writing
            .write_to(|parts| {
                parts.iter().for_each(|part| got.extend_from_slice(part));
                Ok(parts.iter().map(|part| part.len()).sum())
            })
            .expect("it takes everything");
        unsent.put_back(writing);
        assert_eq!((&got[..], unsent.left(), unsent.is_empty()), (&b"rstsecond"[..], 11, true));
    }
}
