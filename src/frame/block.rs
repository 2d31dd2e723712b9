//! Memory for frames. Small ones share blocks, so that a frame takes no allocation of its own. A large one may be
//! written around a payload that is there.

use std::cell::{Cell, RefCell};

use bytes::{Bytes, BytesMut};

use super::{Frame, set_length};

/// A frame of more bytes than this has its memory for itself.
const SMALL: usize = 1024;
/// The size of a block, in bytes. It is kept for as long as one of its frames.
const BLOCK: usize = 4 * 1024;
/// How many bytes the header and the usual metadata of a reply take at most.
pub(crate) const HEAD_ROOM: usize = 128;

thread_local! {
    /// Where a frame is written, kept for the next one.
    static DRAFT: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    /// What is left of the block.
    static REST: RefCell<BytesMut> = RefCell::new(BytesMut::new());
}

/// What `write` writes into an empty vector.
///
/// # Errors
/// Those of `write`.
pub(super) fn written<E>(write: impl FnOnce(&mut Vec<u8>) -> Result<(), E>) -> Result<Bytes, E> {
    // `write` runs code of others, which may panic, or write a frame itself. That one finds an empty vector.
    let mut draft = DRAFT.take();
    draft.clear();
    write(&mut draft)?;
    if draft.len() > SMALL {
        return Ok(draft.into());
    }
    let frame = REST.with_borrow_mut(|rest| {
        if rest.capacity() < draft.len() {
            *rest = BytesMut::with_capacity(BLOCK);
        }
        rest.extend_from_slice(&draft);
        rest.split().freeze()
    });
    DRAFT.set(draft);
    Ok(frame)
}

impl Frame {
    /// The body of a message with this frame only, where the payload begins at `start` in `bytes`. A large payload is not
    /// copied if the head of the frame has room in front of it.
    pub(crate) fn to_body_around(&self, mut bytes: Vec<u8>, start: usize) -> Bytes {
        let size = bytes.len() - start;
        if size <= SMALL {
            return self.to_body_of(&bytes[start..]);
        }
        let mut head = Vec::with_capacity(HEAD_ROOM);
        self.encode_head(&mut head);
        set_length(&mut head, 28, size);
        match start.checked_sub(head.len()) {
            Some(at) => {
                bytes[at..start].copy_from_slice(&head);
                Bytes::from(bytes).slice(at..)
            }
            None => self.to_body_of(&bytes[start..]),
        }
    }
}

/// A frame to be kept for long: it does not keep the frames that share its block.
pub(crate) fn to_keep(frame: &Bytes) -> Bytes {
    if frame.len() > SMALL { frame.clone() } else { Bytes::copy_from_slice(frame) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(of: u8, size: usize) -> Bytes {
        let written: Result<_, ()> = written(|out| {
            assert!(out.is_empty());
            out.resize(size, of);
            Ok(())
        });
        written.expect("it does not fail")
    }

    #[test]
    fn frames_are_as_they_were_written_whatever_comes_after_them() {
        let sizes = [0, 1, 100, 1024, 1025, 100_000, 7];
        let frames: Vec<_> = (0..200).map(|n| (n, frame(n, sizes[usize::from(n) % sizes.len()]))).collect();
        for (n, frame) in frames {
            assert_eq!(frame, vec![n; sizes[usize::from(n) % sizes.len()]]);
        }
    }

    #[test]
    fn what_is_kept_has_its_memory_for_itself() {
        for size in [10, SMALL, SMALL + 1] {
            let (kept, other) = (to_keep(&frame(1, size)), frame(2, size));
            assert!(kept.is_unique() && kept == vec![1; size] && other == vec![2; size]);
        }
    }

    #[test]
    fn what_fails_leaves_nothing_and_a_frame_may_be_written_within_another() {
        let failed = written(|out| {
            out.extend_from_slice(b"half");
            Err("no")
        });
        assert_eq!(failed, Err("no"));
        let outer: Result<_, ()> = written(|out| {
            out.extend_from_slice(b"outer");
            assert_eq!(frame(b'i', 5), "iiiii");
            Ok(())
        });
        assert_eq!(outer, Ok(Bytes::from_static(b"outer")));
    }
}
