//! The compressors of SquashFS images, for blocks that are wholly in memory.
//!
//! Output sizes are bounded by the caller's buffer: whatever a block claims, no more is written than
//! the buffer holds. The same input gives the same bytes for one build of this crate (libzstd is linked
//! statically at the version in `Cargo.lock`).

use std::fmt;

use flate2::{Compress, Decompress, FlushCompress, FlushDecompress, Status};

/// How a zstd frame begins (RFC 8878, 3.1.1).
const ZSTD_MAGIC: [u8; 4] = 0xFD2F_B528_u32.to_le_bytes();

/// A compressor, by its number in the superblock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
pub enum Compression {
    /// zlib streams.
    Gzip = 1,
    /// Recognised, refused: obsolete.
    Lzma = 2,
    /// Recognised, refused.
    Lzo = 3,
    /// Recognised, refused.
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
    #[error("the image uses {0}, which this build cannot read (it can: zstd, gzip, lz4)")]
    Unsupported(Compression),
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
            other => return Err(CompressError::Unsupported(other)),
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
}

impl fmt::Debug for Decompressor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Decompressor")
            .field(&self.compression().name())
            .finish()
    }
}

impl Decompressor {
    /// Refuses lzma, lzo and xz by name.
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
            other => return Err(CompressError::Unsupported(other)),
        }))
    }

    fn compression(&self) -> Compression {
        match self.0 {
            Reverse::Zstd(_) => Compression::Zstd,
            Reverse::Gzip(_) => Compression::Gzip,
            Reverse::Lz4 => Compression::Lz4,
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
        }
    }
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
        let err = Decompressor::new(Compression::Xz).unwrap_err();
        assert_eq!(
            err.to_string(),
            "the image uses xz, which this build cannot read (it can: zstd, gzip, lz4)"
        );
        assert!(Compressor::new(Compression::Lzo, 1).is_err());
        assert!(Compressor::new(Compression::Zstd, 0).is_err());
        assert!(Compressor::new(Compression::Lz4, 9).is_err());
    }
}
