//! Memory for small frames: they share blocks, so that a frame takes no allocation of its own.

use std::cell::{Cell, RefCell};

use bytes::{Bytes, BytesMut};

/// A frame of more bytes than this has its memory for itself.
const SMALL: usize = 1024;
/// The size of a block, in bytes. It is kept for as long as one of its frames.
const BLOCK: usize = 4 * 1024;

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
