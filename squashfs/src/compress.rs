//! The compressors of SquashFS images, for blocks that are wholly in memory.
//!
//! Output sizes are bounded by the caller's buffer: whatever a block claims, no more is written than
//! the buffer holds. The same input gives the same bytes for one build of this crate (libzstd is linked
//! statically at the version in `Cargo.lock`).

use std::fmt;
use std::io::Read;

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};
use lzma_rust2::XzReader;

/// How a zstd frame begins (RFC 8878, 3.1.1).
const ZSTD_MAGIC: [u8; 4] = 0xFD2F_B528_u32.to_le_bytes();

/// A compressor, by its number in the superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Compression {
    /// zlib streams.
    Gzip = 1,
    /// Recognised, refused: no kernel has ever had it.
    Lzma = 2,
    /// Bare LZO1X blocks; only read.
    Lzo = 3,
    /// xz streams; only read.
    Xz = 4,
    /// Bare lz4 blocks.
    Lz4 = 5,
    /// zstd frames; the default.
    Zstd = 6,
}

impl Compression {
    /// The compressor with this number.
    pub fn from_id(id: u16) -> Option<Self> {
        Some(match id {
            1 => Self::Gzip,
            2 => Self::Lzma,
            3 => Self::Lzo,
            4 => Self::Xz,
            5 => Self::Lz4,
            6 => Self::Zstd,
            _ => return None,
        })
    }

    /// Its name in squashfs-tools and in our configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::Gzip => "gzip",
            Self::Lzma => "lzma",
            Self::Lzo => "lzo",
            Self::Xz => "xz",
            Self::Lz4 => "lz4",
            Self::Zstd => "zstd",
        }
    }
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Why a block was not compressed or decompressed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CompressError {
    /// Known to the format, not to this build.
    #[error("the image uses {0}, which Berth cannot {1} (it can: zstd, gzip, lz4{more})", more = if *.1 == "read" { ", xz, lzo" } else { "" })]
    Unsupported(Compression, &'static str),
    /// A level that the compressor does not have.
    #[error("{compression} has no level {level}")]
    Level {
        /// The compressor.
        compression: Compression,
        /// What was asked for.
        level: i32,
    },
    /// The bytes are not one whole compressed block, or it is larger than the buffer.
    #[error("a {compression} block is corrupt or larger than {limit} bytes")]
    Corrupt {
        /// The compressor.
        compression: Compression,
        /// Bytes of the caller's buffer.
        limit: usize,
    },
    /// The library refused to work.
    #[error("{compression} failed: {message}")]
    Library {
        /// The compressor.
        compression: Compression,
        /// Its words.
        message: String,
    },
}

/// Compresses blocks, one after another, in memory it keeps. One per thread.
pub struct Compressor(Engine);

enum Engine {
    Zstd(zstd::bulk::Compressor<'static>),
    Gzip(Compress),
    Lz4,
}

impl fmt::Debug for Compressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Compressor")
            .field(&self.compression().name())
            .finish()
    }
}

impl Compressor {
    /// Levels: zstd 1 to 22, gzip 1 to 9, lz4 only 1.
    pub fn new(compression: Compression, level: i32) -> Result<Self, CompressError> {
        let levels = match compression {
            Compression::Zstd => 1..=22,
            Compression::Gzip => 1..=9,
            Compression::Lz4 => 1..=1,
            other => return Err(CompressError::Unsupported(other, "write")),
        };
        if !levels.contains(&level) {
            return Err(CompressError::Level { compression, level });
        }
        Ok(Self(match compression {
            Compression::Zstd => Engine::Zstd(zstd::bulk::Compressor::new(level).map_err(|e| {
                CompressError::Library {
                    compression,
                    message: e.to_string(),
                }
            })?),
            Compression::Gzip => {
                Engine::Gzip(Compress::new(flate2::Compression::new(level as u32), true))
            }
            _ => Engine::Lz4,
        }))
    }

    fn compression(&self) -> Compression {
        match self.0 {
            Engine::Zstd(_) => Compression::Zstd,
            Engine::Gzip(_) => Compression::Gzip,
            Engine::Lz4 => Compression::Lz4,
        }
    }

    /// Compresses `block` into `out` (its contents are replaced, its memory kept). `false` when that
    /// would not be smaller than the block: store the block as it is; `out` is then of no use.
    pub fn compress(&mut self, block: &[u8], out: &mut Vec<u8>) -> Result<bool, CompressError> {
        let compression = self.compression();
        let library = |message: String| CompressError::Library {
            compression,
            message,
        };
        out.clear();
        match &mut self.0 {
            Engine::Zstd(zstd) => {
                out.reserve(zstd::zstd_safe::compress_bound(block.len()));
                zstd.compress_to_buffer(block, out)
                    .map_err(|e| library(e.to_string()))?;
            }
            Engine::Gzip(zlib) => {
                zlib.reset();
                // One byte of room less than the block has: what does not fit is not worth keeping.
                out.reserve_exact(block.len());
                out.resize(block.len().saturating_sub(1), 0);
                let status = zlib
                    .compress(block, out, FlushCompress::Finish)
                    .map_err(|e| library(e.to_string()))?;
                if status != Status::StreamEnd {
                    return Ok(false);
                }
                out.truncate(zlib.total_out() as usize);
            }
            Engine::Lz4 => {
                out.resize(lz4_flex::block::get_maximum_output_size(block.len()), 0);
                let len = lz4_flex::block::compress_into(block, out)
                    .map_err(|e| library(e.to_string()))?;
                out.truncate(len);
            }
        }
        Ok(out.len() < block.len())
    }
}

/// Decompresses blocks, one after another, in memory it keeps. One per thread.
pub struct Decompressor(Reverse);

enum Reverse {
    Zstd(zstd::bulk::Decompressor<'static>),
    Gzip(Decompress),
    Lz4,
    Xz,
    Lzo,
}

impl fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Decompressor")
            .field(&self.compression().name())
            .finish()
    }
}

impl Decompressor {
    /// Refuses lzma by name.
    pub fn new(compression: Compression) -> Result<Self, CompressError> {
        Ok(Self(match compression {
            Compression::Zstd => Reverse::Zstd(zstd::bulk::Decompressor::new().map_err(|e| {
                CompressError::Library {
                    compression,
                    message: e.to_string(),
                }
            })?),
            Compression::Gzip => Reverse::Gzip(Decompress::new(true)),
            Compression::Lz4 => Reverse::Lz4,
            Compression::Xz => Reverse::Xz,
            Compression::Lzo => Reverse::Lzo,
            other => return Err(CompressError::Unsupported(other, "read")),
        }))
    }

    fn compression(&self) -> Compression {
        match self.0 {
            Reverse::Zstd(_) => Compression::Zstd,
            Reverse::Gzip(_) => Compression::Gzip,
            Reverse::Lz4 => Compression::Lz4,
            Reverse::Xz => Compression::Xz,
            Reverse::Lzo => Compression::Lzo,
        }
    }

    /// Decompresses one whole block into `out` and returns its length. A block that does not end, that does not fit
    /// into `out`, or behind whose end something follows is an error, and `out` then holds anything.
    ///
    /// The last matters for safety: the kernel stops at the end of the first zstd frame or zlib stream, libzstd goes on
    /// with the next. What was checked must be what the kernel sees.
    pub fn decompress(&mut self, block: &[u8], out: &mut [u8]) -> Result<usize, CompressError> {
        let corrupt = CompressError::Corrupt {
            compression: self.compression(),
            limit: out.len(),
        };
        match &mut self.0 {
            Reverse::Zstd(zstd) => {
                if !block.starts_with(&ZSTD_MAGIC)
                    || zstd::zstd_safe::find_frame_compressed_size(block) != Ok(block.len())
                {
                    return Err(corrupt);
                }
                zstd.decompress_to_buffer(block, out).map_err(|_| corrupt)
            }
            Reverse::Gzip(zlib) => {
                zlib.reset(true);
                match zlib.decompress(block, out, FlushDecompress::Finish) {
                    Ok(Status::StreamEnd) if zlib.total_in() as usize == block.len() => {
                        Ok(zlib.total_out() as usize)
                    }
                    _ => Err(corrupt),
                }
            }
            Reverse::Lz4 => lz4_flex::block::decompress_into(block, out).map_err(|_| corrupt),
            Reverse::Xz => unxz(block, out).ok_or(corrupt),
            Reverse::Lzo => lzokay::decompress::decompress(block, out).map_err(|_| corrupt),
        }
    }
}

/// Memory that one xz block may ask for, in KiB. Its dictionary is never longer than the largest block, 1 MiB, so that
/// only a forged one wants more.
const XZ_MEMORY_KIB: u32 = 2048;

/// Decompresses one xz stream that is all of `block`; gives the length.
fn unxz(block: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut stream = XzReader::new_mem_limit(block, false, XZ_MEMORY_KIB);
    let mut len = 0;
    loop {
        // One byte more than there is room for: the stream must end, and its check sums with it.
        let (room, over) = (&mut out[len..], &mut [0]);
        let full = room.is_empty();
        let got = stream.read(if full { over } else { room }).ok()?;
        match got {
            0 => break,
            _ if full => return None,
            _ => len += got,
        }
    }
    stream.into_inner().is_empty().then_some(len)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: [(Compression, i32); 3] = [
        (Compression::Zstd, 3),
        (Compression::Gzip, 6),
        (Compression::Lz4, 1),
    ];

    fn text(len: usize) -> Vec<u8> {
        (0..len)
            .map(|i| b"the quick brown fox "[i % 20] ^ (i / 997) as u8)
            .collect()
    }

    #[test]
    fn blocks_come_back() {
        for (compression, level) in ALL {
            let (mut c, mut d) = (
                Compressor::new(compression, level).unwrap(),
                Decompressor::new(compression).unwrap(),
            );
            let mut packed = Vec::new();
            for len in [100, 8192, 131_072] {
                let block = text(len);
                assert!(c.compress(&block, &mut packed).unwrap());
                let mut out = vec![0; len];
                assert_eq!(d.decompress(&packed, &mut out).unwrap(), len);
                assert_eq!(out, block);
                let mut small = vec![0; len - 1];
                assert!(
                    d.decompress(&packed, &mut small).is_err(),
                    "{compression} wrote past its bound"
                );
                assert!(d.decompress(&packed[..packed.len() - 1], &mut out).is_err());
            }
        }
    }

    #[test]
    fn nothing_may_follow_a_block() {
        for compression in [Compression::Zstd, Compression::Gzip] {
            let mut c = Compressor::new(compression, 3).unwrap();
            let mut d = Decompressor::new(compression).unwrap();
            let mut packed = Vec::new();
            assert!(c.compress(&text(4096), &mut packed).unwrap());
            let mut out = vec![0; 16_384];
            assert!(d.decompress(&packed, &mut out).is_ok());
            let twice = [packed.as_slice(), packed.as_slice()].concat();
            assert!(d.decompress(&twice, &mut out).is_err(), "{compression}");
            let more = [packed.as_slice(), b"x"].concat();
            assert!(d.decompress(&more, &mut out).is_err(), "{compression}");
        }
        // A skippable frame (RFC 8878, 3.1.2) is no block.
        let skippable = [0x50, 0x2a, 0x4d, 0x18, 1, 0, 0, 0, 0];
        let mut zstd = Decompressor::new(Compression::Zstd).unwrap();
        assert!(zstd.decompress(&skippable, &mut [0; 64]).is_err());
    }

    #[test]
    fn what_does_not_shrink_is_left_alone() {
        let mut state = 1u64;
        let noise: Vec<u8> = (0..4096)
            .map(|_| {
                state = state
                    .wrapping_mul(6_364_136_223_846_793_005)
                    .wrapping_add(1);
                (state >> 56) as u8
            })
            .collect();
        for (compression, level) in ALL {
            let mut c = Compressor::new(compression, level).unwrap();
            assert!(!c.compress(&noise, &mut Vec::new()).unwrap());
            assert!(!c.compress(b"x", &mut Vec::new()).unwrap());
            assert!(c.compress(&text(4096), &mut Vec::new()).unwrap());
        }
    }

    #[test]
    fn others_are_refused_by_name() {
        assert_eq!(
            Decompressor::new(Compression::Lzma)
                .unwrap_err()
                .to_string(),
            "the image uses lzma, which Berth cannot read (it can: zstd, gzip, lz4, xz, lzo)"
        );
        assert_eq!(
            Compressor::new(Compression::Xz, 1).unwrap_err().to_string(),
            "the image uses xz, which Berth cannot write (it can: zstd, gzip, lz4)"
        );
        assert!(Compressor::new(Compression::Lzo, 1).is_err());
        assert!(Compressor::new(Compression::Zstd, 0).is_err());
        assert!(Compressor::new(Compression::Lz4, 9).is_err());
    }

    const FOX: &[u8] = b"the quick brown fox the quick brown fox the quick brown fox\n";

    /// What xz makes of [`FOX`], up to and including the block's flags, and the rest with dictionaries of 8 and 64 MiB.
    fn xz(dictionary: u8, sum: [u8; 4]) -> Vec<u8> {
        let hex = "fd377a585a0000016922de36020021010000000000000000e0003b001c5d003a1a08ce76c7e5e9d60734c3d10ebfce5\
                   5e1aabde117e4b08d9640000085b6bafa0001343c5b3ac3b49042990d010000000001595a";
        let mut bytes: Vec<u8> = (0..hex.len() / 2)
            .map(|at| u8::from_str_radix(&hex[at * 2..at * 2 + 2], 16).unwrap())
            .collect();
        bytes[16] = dictionary;
        bytes[20..24].copy_from_slice(&sum);
        bytes
    }

    #[test]
    fn xz_streams_are_read_whole_and_bounded() {
        let mut d = Decompressor::new(Compression::Xz).unwrap();
        let modest = xz(0x10, [0xa8, 0x70, 0x8e, 0x86]);
        let mut out = [0; 100];
        assert_eq!(d.decompress(&modest, &mut out), Ok(FOX.len()));
        assert_eq!(&out[..FOX.len()], FOX);
        assert!(d.decompress(&modest, &mut out[..FOX.len()]).is_ok());
        assert!(d.decompress(&modest, &mut out[..FOX.len() - 1]).is_err());
        let huge = xz(0x1c, [0x10, 0xcf, 0x58, 0xcc]);
        assert!(d.decompress(&huge, &mut out).is_err(), "64 MiB for a block");
        for len in 0..modest.len() {
            assert!(d.decompress(&modest[..len], &mut out).is_err(), "{len}");
        }
        for more in [&b"x"[..], &[0; 4], &modest] {
            let more = [modest.as_slice(), more].concat();
            assert!(d.decompress(&more, &mut out).is_err());
        }
        for at in 0..modest.len() {
            let mut damaged = modest.clone();
            damaged[at] ^= 0x40;
            assert!(d.decompress(&damaged, &mut out).is_err(), "{at}");
        }
    }

    #[test]
    fn lzo_blocks_are_read_whole_and_bounded() {
        let mut d = Decompressor::new(Compression::Lzo).unwrap();
        // A first byte of 17 + n is n literals; 17, 0, 0 is the end.
        let block = [&[17 + 6][..], b"berths", &[17, 0, 0]].concat();
        let mut out = [0; 16];
        assert_eq!(d.decompress(&block, &mut out), Ok(6));
        assert_eq!(&out[..6], b"berths");
        assert!(d.decompress(&block, &mut out[..5]).is_err());
        for len in 0..block.len() {
            assert!(d.decompress(&block[..len], &mut out).is_err(), "{len}");
        }
        assert!(
            d.decompress(&[&block[..], b"x"].concat(), &mut out)
                .is_err()
        );
    }
}
