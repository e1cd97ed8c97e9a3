//! The superblock and the compressor options behind it.

use super::{
    ABSENT, FLAG_COMPRESSOR_OPTIONS, Fields, FormatError, MAGIC, MAX_BLOCK_SIZE, MIN_BLOCK_SIZE,
    MetaHeader, MetaRef, VERSION, put16, put32, put64,
};
use crate::compress::Compression;

/// The first 96 bytes of an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Inodes in the image; their numbers are 1 to this.
    pub inode_count: u32,
    /// Seconds since 1970, as an unsigned number.
    pub mkfs_time: u32,
    /// Bytes of a data block: a power of two, 4 KiB to 1 MiB.
    pub block_size: u32,
    /// Fragment blocks.
    pub fragment_count: u32,
    /// The one compressor of all blocks.
    pub compression: Compression,
    /// `FLAG_…` bits.
    pub flags: u16,
    /// Entries in the id table.
    pub id_count: u16,
    /// Where the root folder's inode lies, from `inode_table`.
    pub root_inode: MetaRef,
    /// Bytes of the image without the padding.
    pub bytes_used: u64,
    /// Start of the id table's list.
    pub id_table: u64,
    /// Start of [`super::XattrIdTable`], or [`ABSENT`].
    pub xattr_table: u64,
    /// First metadata block of the inode table.
    pub inode_table: u64,
    /// First metadata block of the directory table.
    pub directory_table: u64,
    /// Start of the fragment table's list. Absent or empty when there are no fragments.
    pub fragment_table: u64,
    /// Start of the export table's list, or [`ABSENT`].
    pub export_table: u64,
}

impl Superblock {
    /// Bytes on disk.
    pub const LEN: usize = 96;

    /// Appends the 96 bytes.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put32(out, MAGIC);
        put32(out, self.inode_count);
        put32(out, self.mkfs_time);
        put32(out, self.block_size);
        put32(out, self.fragment_count);
        put16(out, self.compression as u16);
        put16(out, self.block_size.trailing_zeros() as u16);
        put16(out, self.flags);
        put16(out, self.id_count);
        put16(out, VERSION.0);
        put16(out, VERSION.1);
        put64(out, self.root_inode.to_raw());
        put64(out, self.bytes_used);
        put64(out, self.id_table);
        put64(out, self.xattr_table);
        put64(out, self.inode_table);
        put64(out, self.directory_table);
        put64(out, self.fragment_table);
        put64(out, self.export_table);
    }

    /// Reads and checks the fields that stand by themselves, and that the tables lie in the image and in
    /// the order every writer gives them. Table contents are the reader's to check.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut f = Fields::new("superblock", bytes, Self::LEN)?;
        let magic = f.u32()?;
        if magic != MAGIC {
            return Err(FormatError::Magic(magic));
        }
        let (inode_count, mkfs_time, block_size, fragment_count) =
            (f.u32()?, f.u32()?, f.u32()?, f.u32()?);
        let (compression, block_log, flags, id_count) = (f.u16()?, f.u16()?, f.u16()?, f.u16()?);
        let version = (f.u16()?, f.u16()?);
        if version != VERSION {
            return Err(FormatError::Version(version.0, version.1));
        }
        if !block_size.is_power_of_two() || !(MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&block_size)
        {
            return Err(value("block size", block_size));
        }
        if u32::from(block_log) != block_size.trailing_zeros() {
            return Err(value("block size logarithm", block_log));
        }
        let compression =
            Compression::from_id(compression).ok_or_else(|| value("compressor", compression))?;
        let sb = Self {
            inode_count,
            mkfs_time,
            block_size,
            fragment_count,
            compression,
            flags,
            id_count,
            root_inode: MetaRef::from_raw(f.u64()?)?,
            bytes_used: f.u64()?,
            id_table: f.u64()?,
            xattr_table: f.u64()?,
            inode_table: f.u64()?,
            directory_table: f.u64()?,
            fragment_table: f.u64()?,
            export_table: f.u64()?,
        };
        sb.check_order()?;
        Ok(sb)
    }

    fn check_order(&self) -> Result<(), FormatError> {
        if self.inode_count == 0 {
            return Err(value("inode count", 0u32));
        }
        if self.id_count == 0 {
            return Err(value("id count", 0u32));
        }
        let mut last = Self::LEN as u64;
        let tables = [
            ("inode table start", self.inode_table, true),
            ("directory table start", self.directory_table, true),
            (
                "fragment table start",
                self.fragment_table,
                self.fragment_count > 0,
            ),
            ("export table start", self.export_table, false),
            ("id table start", self.id_table, true),
            ("xattr table start", self.xattr_table, false),
            ("image size", self.bytes_used, true),
        ];
        for (what, start, required) in tables {
            if start == ABSENT && !required {
                continue;
            }
            if start == ABSENT || start < last {
                return Err(FormatError::Value { what, value: start });
            }
            last = start;
        }
        if self.inode_table == self.directory_table {
            return Err(value("inode table start", self.inode_table));
        }
        Ok(())
    }
}

fn value(what: &'static str, value: impl Into<u64>) -> FormatError {
    FormatError::Value {
        what,
        value: value.into(),
    }
}

/// What a compressor tells about itself behind the superblock, as one metadata block stored as it is.
/// Needed for lz4 always, for others only when not the default; a reader needs none of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompressorOptions {
    /// Level 1 to 9, window 8 to 15, strategies (bits).
    Gzip {
        level: u32,
        window: u16,
        strategies: u16,
    },
    /// Version (1), flags (bit 0: high compression).
    Lz4 { version: u32, flags: u32 },
    /// Level 1 to 22.
    Zstd { level: u32 },
}

impl CompressorOptions {
    /// Appends header and options.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let len = match self {
            Self::Gzip { .. } | Self::Lz4 { .. } => 8,
            Self::Zstd { .. } => 4,
        };
        put16(
            out,
            MetaHeader {
                size: len,
                compressed: false,
            }
            .to_raw(),
        );
        match *self {
            Self::Gzip {
                level,
                window,
                strategies,
            } => {
                put32(out, level);
                put16(out, window);
                put16(out, strategies);
            }
            Self::Lz4 { version, flags } => {
                put32(out, version);
                put32(out, flags);
            }
            Self::Zstd { level } => put32(out, level),
        }
    }

    /// Reads the options after a superblock that announces them; `None` when it does not, or when the
    /// compressor is one whose options are of no interest (xz, lzo). `bytes` start at offset 96.
    pub fn decode(sb: &Superblock, bytes: &[u8]) -> Result<Option<Self>, FormatError> {
        if sb.flags & FLAG_COMPRESSOR_OPTIONS == 0 {
            return Ok(None);
        }
        let mut f = Fields::new("compressor options", bytes, 2)?;
        let header = MetaHeader::from_raw(f.u16()?)?;
        let mut f = Fields::new("compressor options", f.take(usize::from(header.size))?, 0)?;
        Ok(match sb.compression {
            Compression::Gzip => Some(Self::Gzip {
                level: f.u32()?,
                window: f.u16()?,
                strategies: f.u16()?,
            }),
            Compression::Lz4 => Some(Self::Lz4 {
                version: f.u32()?,
                flags: f.u32()?,
            }),
            Compression::Zstd => Some(Self::Zstd { level: f.u32()? }),
            _ => None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Superblock {
        Superblock {
            inode_count: 3,
            mkfs_time: 7,
            block_size: 131_072,
            fragment_count: 1,
            compression: Compression::Zstd,
            flags: FLAG_COMPRESSOR_OPTIONS,
            id_count: 1,
            root_inode: MetaRef {
                block: 5,
                offset: 9,
            },
            bytes_used: 900,
            id_table: 600,
            xattr_table: ABSENT,
            inode_table: 200,
            directory_table: 300,
            fragment_table: 400,
            export_table: 500,
        }
    }

    #[test]
    fn a_superblock_comes_back() {
        let mut out = Vec::new();
        sample().encode(&mut out);
        assert_eq!(out.len(), Superblock::LEN);
        assert_eq!(&out[..4], b"hsqs");
        assert_eq!(Superblock::decode(&out), Ok(sample()));
        for cut in 0..out.len() {
            assert!(matches!(
                Superblock::decode(&out[..cut]),
                Err(FormatError::Truncated { .. })
            ));
        }
    }

    #[test]
    fn impossible_fields_are_refused() {
        let refuse = |change: fn(&mut Superblock)| {
            let (mut sb, mut out) = (sample(), Vec::new());
            change(&mut sb);
            sb.encode(&mut out);
            assert!(
                matches!(Superblock::decode(&out), Err(FormatError::Value { .. })),
                "{sb:?}"
            );
        };
        refuse(|sb| sb.block_size = 5000);
        refuse(|sb| sb.block_size = 2048);
        refuse(|sb| sb.block_size = 1 << 21);
        refuse(|sb| sb.inode_table = 10);
        refuse(|sb| sb.directory_table = sb.inode_table);
        refuse(|sb| sb.bytes_used = 10);
        refuse(|sb| sb.id_table = ABSENT);
        refuse(|sb| sb.fragment_table = ABSENT);
        refuse(|sb| sb.id_count = 0);
        refuse(|sb| sb.inode_count = 0);
    }

    #[test]
    fn options_come_back() {
        let mut sb = sample();
        for (compression, options) in [
            (Compression::Zstd, CompressorOptions::Zstd { level: 3 }),
            (
                Compression::Gzip,
                CompressorOptions::Gzip {
                    level: 9,
                    window: 15,
                    strategies: 0,
                },
            ),
            (
                Compression::Lz4,
                CompressorOptions::Lz4 {
                    version: 1,
                    flags: 0,
                },
            ),
        ] {
            sb.compression = compression;
            let mut out = Vec::new();
            options.encode(&mut out);
            assert_eq!(CompressorOptions::decode(&sb, &out), Ok(Some(options)));
            assert!(CompressorOptions::decode(&sb, &out[..out.len() - 1]).is_err());
        }
    }
}
