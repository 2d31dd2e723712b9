//! Compression of payloads: lz4 always, zstd if the cargo feature is enabled.
//!
//! The client compresses arguments, the server results. Frames carry a payload as it came; it is decompressed just
//! before its handler runs, or when the caller reads the result.

use std::fmt;

use crate::error::Code;

/// The smallest payload that is compressed, in bytes. A smaller one would save less than the work costs.
pub(crate) const MIN_SIZE: usize = 1024;

/// How payloads are compressed. Set it with [`ClientBuilder::compression`](crate::ClientBuilder::compression) for
/// arguments and with [`ServerBuilder::compression`](crate::ServerBuilder::compression) for results. Default: not at
/// all.
///
/// Whatever is set here, every peer can read lz4; with the cargo feature `zstd` it can read zstd as well. Peers tell
/// each other what they can read. A payload is compressed only if the receiver can read it, if it has at least 1024
/// bytes, and if it gets smaller.
///
/// ```
/// use hopline::{Client, Compression};
///
/// # async fn example() -> Result<(), hopline::Error> {
/// let client = Client::builder().compression(Compression::Lz4).connect("amqp://localhost").await?;
/// # Ok(()) }
/// ```
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
#[repr(u8)]
pub enum Compression {
    /// [zstd](https://facebook.github.io/zstd/) at its default level. Text shrinks to between a third and a tenth. It
    /// needs the cargo feature `zstd`; without that, connecting with this setting fails.
    Zstd = 1,
    /// [lz4](https://lz4.org/): several times as fast as zstd, and about half as effective.
    Lz4 = 2,
}

/// Why a payload could not be decompressed. The text goes into the fault that answers the call.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum CompressionRefusal {
    /// This program was built without the compression.
    #[error(
        "compression {number} ({0}) is not built in here: send it uncompressed, or enable the cargo feature `{0}`",
        number = *.0 as u8
    )]
    #[cfg_attr(feature = "zstd", expect(dead_code, reason = "with it, everything is built in"))]
    NotBuiltIn(Compression),
    /// The payload is damaged, or somebody made it wrong on purpose.
    #[error("the payload is not what {0} makes: {1}")]
    Corrupt(Compression, String),
    /// The payload would take more memory than is allowed. Both are in bytes.
    #[error("the payload decompresses to {size} bytes or more, over the cap of {cap}")]
    TooLarge { size: usize, cap: usize },
}

impl CompressionRefusal {
    /// The code of the fault that answers the call.
    pub(crate) fn code(&self) -> Code {
        match self {
            Self::NotBuiltIn(_) => Code::Unimplemented,
            Self::Corrupt(..) => Code::InvalidArgument,
            Self::TooLarge { .. } => Code::ResourceExhausted,
        }
    }
}

/// The set of compressions that a peer can read. Each compression has a bit: 1 is zstd, 2 is lz4. 0 means that the peer
/// has not said anything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Readable(pub(crate) u64);

impl Readable {
    /// What this program can read.
    pub(crate) const HERE: Self = Self(if cfg!(feature = "zstd") { 0b11 } else { 0b10 });

    /// Whether the peer can read this compression.
    pub(crate) fn includes(self, compression: Compression) -> bool {
        self.0 & (1 << (compression as u8 - 1)) != 0
    }
}

impl Compression {
    /// The compression with this number in a frame; `None` for 0, which means uncompressed.
    ///
    /// # Errors
    /// A sentence, if version 1 of the wire does not define the number.
    pub(crate) fn from_number(number: u8) -> Result<Option<Self>, String> {
        match number {
            0 => Ok(None),
            1 => Ok(Some(Self::Zstd)),
            2 => Ok(Some(Self::Lz4)),
            _ => Err(format!("compression {number} is none of 1 zstd, 2 lz4")),
        }
    }

    /// The name in the description of the wire: `zstd` or `lz4`.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Zstd => "zstd",
            Self::Lz4 => "lz4",
        }
    }

    /// Checks that a setting can be used in this build. Builders call it when they connect.
    ///
    /// # Errors
    /// A sentence that says what to enable.
    pub(crate) fn check(setting: Option<Self>) -> Result<(), String> {
        match setting {
            Some(compression) if !Readable::HERE.includes(compression) => {
                Err(format!("compression {compression} is not built in: enable the cargo feature `{compression}`"))
            }
            _ => Ok(()),
        }
    }

    /// Appends the compressed `payload` to `body`. Returns `false` if that was not possible; the payload is then sent
    /// as it is.
    pub(crate) fn compress(self, payload: &[u8], body: &mut Vec<u8>) -> bool {
        match self {
            Self::Zstd => zstd::compress(payload, body),
            Self::Lz4 => lz4::compress(payload, body),
        }
    }

    /// The payload as it was before it was compressed. It may have at most `cap` bytes; no memory is allocated for
    /// more.
    pub(crate) fn decompress(self, payload: &[u8], cap: usize) -> Result<Vec<u8>, CompressionRefusal> {
        match self {
            Self::Zstd => zstd::decompress(payload, cap),
            Self::Lz4 => lz4::decompress(payload, cap),
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// The format: the size of the payload in 4 bytes, little-endian, then one block of lz4.
mod lz4 {
    use lz4_flex::block;

    use super::{Compression, CompressionRefusal};

    /// The most bytes that one byte of a block can stand for. A block that claims more is refused before memory is
    /// allocated.
    const MAX_RATIO: usize = 255;

    pub(super) fn compress(payload: &[u8], body: &mut Vec<u8>) -> bool {
        let Ok(size) = u32::try_from(payload.len()) else { return false };
        body.extend_from_slice(&size.to_le_bytes());
        let at = body.len();
        body.resize(at + block::get_maximum_output_size(payload.len()), 0);
        let written = block::compress_into(payload, &mut body[at..]);
        body.truncate(at + written.as_ref().copied().unwrap_or_default());
        written.is_ok()
    }

    pub(super) fn decompress(payload: &[u8], cap: usize) -> Result<Vec<u8>, CompressionRefusal> {
        let corrupt = |why| CompressionRefusal::Corrupt(Compression::Lz4, why);
        let Some((size, block)) = payload.split_first_chunk::<4>() else {
            return Err(corrupt(format!("{} bytes, where its size takes 4", payload.len())));
        };
        let size = u32::from_le_bytes(*size) as usize;
        if size > cap {
            return Err(CompressionRefusal::TooLarge { size, cap });
        }
        if size > block.len().saturating_mul(MAX_RATIO) {
            return Err(corrupt(format!("{} bytes cannot stand for {size}", block.len())));
        }
        let plain = block::decompress(block, size).map_err(|error| corrupt(error.to_string()))?;
        match plain.len() {
            length if length == size => Ok(plain),
            length => Err(corrupt(format!("{length} bytes, and not the {size} that it names"))),
        }
    }
}

/// One frame of zstd.
#[cfg(feature = "zstd")]
mod zstd {
    use std::io::Read;

    use zstd::stream::read::Decoder;

    use super::{Compression, CompressionRefusal};

    /// The window sizes that are read, as powers of two. A window of 2 MiB, which the default level uses, is read
    /// whatever the cap is. A window over 128 MiB is never read.
    const WINDOWS: (u32, u32) = (21, 27);

    pub(super) fn compress(payload: &[u8], body: &mut Vec<u8>) -> bool {
        let compressed = zstd::bulk::compress(payload, zstd::DEFAULT_COMPRESSION_LEVEL);
        body.extend_from_slice(compressed.as_deref().unwrap_or_default());
        compressed.is_ok()
    }

    pub(super) fn decompress(payload: &[u8], cap: usize) -> Result<Vec<u8>, CompressionRefusal> {
        let corrupt = |why| CompressionRefusal::Corrupt(Compression::Zstd, why);
        let broken = |error: std::io::Error| corrupt(error.to_string());
        // The frame may tell its size. It is not trusted, but if it is over the cap, nothing needs to be decompressed.
        let named = zstd::zstd_safe::get_frame_content_size(payload).map_err(|error| corrupt(error.to_string()))?;
        let named = named.map(|size| usize::try_from(size).unwrap_or(usize::MAX));
        if let Some(size) = named.filter(|size| *size > cap) {
            return Err(CompressionRefusal::TooLarge { size, cap });
        }
        let window = usize::BITS - cap.leading_zeros();
        let mut decoder = Decoder::with_buffer(payload).map_err(broken)?.single_frame();
        decoder.window_log_max(window.clamp(WINDOWS.0, WINDOWS.1)).map_err(broken)?;
        let mut plain = Vec::new();
        decoder.by_ref().take((cap as u64).saturating_add(1)).read_to_end(&mut plain).map_err(broken)?;
        if plain.len() > cap {
            return Err(CompressionRefusal::TooLarge { size: plain.len(), cap });
        }
        match decoder.finish().len() {
            0 => Ok(plain),
            rest => Err(corrupt(format!("{rest} bytes after its frame"))),
        }
    }
}

#[cfg(not(feature = "zstd"))]
mod zstd {
    use super::{Compression, CompressionRefusal};

    pub(super) fn compress(_: &[u8], _: &mut Vec<u8>) -> bool {
        false
    }

    pub(super) fn decompress(_: &[u8], _: usize) -> Result<Vec<u8>, CompressionRefusal> {
        Err(CompressionRefusal::NotBuiltIn(Compression::Zstd))
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const MIB: usize = 1024 * 1024;

    fn built_in() -> impl Iterator<Item = Compression> {
        [Compression::Zstd, Compression::Lz4].into_iter().filter(|compression| Readable::HERE.includes(*compression))
    }

    fn compressed(compression: Compression, payload: &[u8]) -> Vec<u8> {
        let mut body = Vec::new();
        assert!(compression.compress(payload, &mut body));
        body
    }

    #[test]
    fn a_payload_comes_back_as_it_was() {
        let noise: Vec<u8> = (0..5000_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_be_bytes()).collect();
        for compression in built_in() {
            for payload in [b"".as_slice(), b"x", &b"hopline ".repeat(1000), &noise, &vec![0; 3 * MIB]] {
                let body = compressed(compression, payload);
                assert_eq!(compression.decompress(&body, payload.len()).as_deref(), Ok(payload), "{compression}");
            }
        }
    }

    #[test]
    fn more_than_the_cap_is_refused_with_the_size_and_the_cap() {
        for compression in built_in() {
            let bomb = compressed(compression, &vec![0; 8 * MIB]);
            assert!(bomb.len() < 8 * MIB / 200, "{compression}: {} bytes", bomb.len());
            let refusal = compression.decompress(&bomb, MIB).expect_err("over the cap");
            assert_eq!(refusal, CompressionRefusal::TooLarge { size: 8 * MIB, cap: MIB });
            assert_eq!(refusal.code(), Code::ResourceExhausted);
            assert!(
                compression.decompress(&bomb, 8 * MIB - 1).is_err() && compression.decompress(&bomb, 8 * MIB).is_ok()
            );
        }
    }

    #[test]
    fn a_size_that_lz4_cannot_reach_is_refused_before_anything_is_allocated_for_it() {
        // The block claims 4 GiB minus one byte, and the cap would allow that.
        for block in [&[][..], &[0], &[0x1f, 0, 1, 0, 0xff, 0xff]] {
            let claim = [&[0xff; 4], block].concat();
            let refusal = Compression::Lz4.decompress(&claim, usize::MAX).expect_err("it is not there");
            assert!(refusal.to_string().contains("cannot stand for 4294967295"), "{refusal}");
            assert_eq!(refusal.code(), Code::InvalidArgument);
        }
    }

    #[test]
    fn a_size_that_is_not_that_of_the_block_is_refused() {
        let body = compressed(Compression::Lz4, &[7; 1000]);
        for size in [0_u32, 999, 1001] {
            let wrong = [&size.to_le_bytes(), &body[4..]].concat();
            assert!(matches!(Compression::Lz4.decompress(&wrong, MIB), Err(CompressionRefusal::Corrupt(..))), "{size}");
        }
    }

    #[cfg(feature = "zstd")]
    #[test]
    fn a_bomb_that_does_not_name_its_size_is_not_read_past_the_cap() {
        use std::io::Write;
        let mut encoder = ::zstd::stream::write::Encoder::new(Vec::new(), 3).expect("a level");
        encoder.write_all(&vec![0; 8 * MIB]).expect("memory");
        let bomb = encoder.finish().expect("memory");
        assert!(matches!(::zstd::zstd_safe::get_frame_content_size(&bomb), Ok(None)));
        let refusal = Compression::Zstd.decompress(&bomb, MIB);
        assert_eq!(refusal, Err(CompressionRefusal::TooLarge { size: MIB + 1, cap: MIB }));
        assert_eq!(Compression::Zstd.decompress(&bomb, 8 * MIB).map(|plain| plain.len()), Ok(8 * MIB));
    }

    #[cfg(feature = "zstd")]
    #[test]
    fn a_window_far_over_the_cap_is_refused() {
        use std::io::Write;
        let mut encoder = ::zstd::stream::write::Encoder::new(Vec::new(), 3).expect("a level");
        encoder.window_log(26).expect("64 MiB");
        encoder.write_all(b"little").expect("memory");
        let refusal = Compression::Zstd.decompress(&encoder.finish().expect("memory"), MIB).expect_err("64 MiB");
        assert_eq!(refusal.code(), Code::InvalidArgument, "{refusal}");
    }

    #[cfg(not(feature = "zstd"))]
    #[test]
    fn what_is_not_built_in_is_refused_by_its_number_and_name() {
        let refusal = Compression::Zstd.decompress(&[0; 100], MIB).expect_err("not built in");
        assert!(refusal.to_string().starts_with("compression 1 (zstd) is not built in here: "), "{refusal}");
        assert_eq!(refusal.code(), Code::Unimplemented);
        assert!(Compression::check(Some(Compression::Zstd)).is_err_and(|why| why.contains("cargo feature `zstd`")));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_a_payload_within_the_cap_or_an_error(mut body in vec(any::<u8>(), 0..300), cap in 0..2000_usize) {
            for compression in built_in() {
                if let Ok(plain) = compression.decompress(&body, cap) {
                    prop_assert!(plain.len() <= cap);
                }
            }
            // With a plausible beginning, the decompressors read as far as the block and the frame itself.
            if body.len() > 6 {
                body[..4].copy_from_slice(&400_u32.to_le_bytes());
                let _ = Compression::Lz4.decompress(&body, cap);
                body[..4].copy_from_slice(&0xfd2f_b528_u32.to_le_bytes());
                let _ = Compression::Zstd.decompress(&body, cap);
            }
        }

        #[test]
        fn a_broken_payload_is_one_within_the_cap_or_an_error(
            payload in vec(0..4_u8, 0..3000),
            changes in vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
            cut in any::<prop::sample::Index>(),
        ) {
            for compression in built_in() {
                let mut body = compressed(compression, &payload);
                let cut = cut.index(body.len());
                prop_assert!(compression.decompress(&body[..cut], 3000).is_err());
                for (at, byte) in &changes {
                    let at = at.index(body.len());
                    body[at] = *byte;
                }
                if let Ok(plain) = compression.decompress(&body, 3000) {
                    prop_assert!(plain.len() <= 3000);
                }
            }
        }
    }
}
