//! The SquashFS 4.0 on-disk format: the one place where its bytes are written down.
//!
//! Everything is little-endian and packed; nothing is aligned unless said. Offsets are bytes from the
//! start of the image. Encoders append to a `Vec<u8>`; decoders take a slice, check every bound and
//! never allocate from a length field. Values are normalised: a basic and an extended inode of one kind
//! decode to the same struct, and encoding picks the smallest form that holds the value.
//!
//! # Order of an image
//! ```text
//! 0        superblock (96 bytes)                              [`Superblock`]
//! 96       compressor options, one stored metadata block, when FLAG_COMPRESSOR_OPTIONS
//!          data blocks and fragment blocks, in any order, back to back
//!          inode table          metadata blocks               [`Inode`]
//!          directory table      metadata blocks               [`DirHeader`], [`DirEntry`]
//!          fragment table       metadata blocks + u64 list    [`FragmentEntry`], 512 a block
//!          export table         metadata blocks + u64 list    u64 inode references, 1,024 a block
//!          id table             metadata blocks + u64 list    u32 ids, 2,048 a block
//!          xattr key/values     metadata blocks               [`XattrEntry`]
//!          xattr ids            metadata blocks               [`XattrId`], 512 a block
//!          xattr id table       16 bytes + u64 list           [`XattrIdTable`]
//! used     (zeros to a multiple of 4,096)
//! ```
//! A table with a u64 list starts (superblock field) at the *list*, whose entries are the absolute
//! offsets of its metadata blocks. The kernel wants the lists to end exactly where the next table
//! begins: fragment list before export blocks, export list before id blocks, id list before the xattr
//! key/values (or `bytes_used`), xattr id list before `bytes_used`. A table that is absent has the
//! start [`ABSENT`].
//!
//! # Metadata blocks
//! A u16 header ([`MetaHeader`]), then up to 8,192 bytes before compression. Records cross block
//! borders freely. A *metadata reference* ([`MetaRef`]) is `(block << 16) | offset`: the block's header
//! offset from the start of its table, and an offset into the block after decompression.
//!
//! # Data blocks
//! A file of `size` bytes is `size / block_size` full blocks and, when a remainder is left, either one
//! short block or a piece of a fragment block. Blocks of one file lie back to back from `start`; a u32
//! for each ([`BlockSize`]) tells its stored size, bit 24 set when it is stored as it is, 0 for a hole.
//!
//! # Directories
//! A listing is runs of a [`DirHeader`] and up to 256 [`DirEntry`]s whose inodes lie in one metadata
//! block and whose inode numbers are within ±32,767 of the header's. Names are sorted by bytes. The
//! inode's `size` is the listing's length + 3 (3 when empty). A listing longer than a metadata block has
//! an index in its (extended) inode: each [`DirIndex`] names a header's first entry.

mod directory;
mod inode;
mod superblock;
mod tables;

pub use directory::{DirEntry, DirHeader, DirIndex, check_name};
pub use inode::{
    DeviceInode, DirInode, FileInode, Inode, InodeBody, InodeType, IpcInode, SymlinkInode,
};
pub use superblock::{CompressorOptions, Superblock};
pub use tables::{
    BlockSize, FragmentEntry, MetaHeader, MetaRef, XattrEntry, XattrId, XattrIdTable, XattrPrefix,
};

/// `hsqs` read as a little-endian u32.
pub const MAGIC: u32 = 0x7371_7368;
/// Format version 4.0; nothing else is written or read.
pub const VERSION: (u16, u16) = (4, 0);
/// Bytes of a metadata block before compression.
pub const METADATA_SIZE: usize = 8192;
/// Smallest and largest block size; always a power of two.
pub const MIN_BLOCK_SIZE: u32 = 4096;
/// See [`MIN_BLOCK_SIZE`].
pub const MAX_BLOCK_SIZE: u32 = 1 << 20;
/// Table start of a table that is not there.
pub const ABSENT: u64 = u64::MAX;
/// Fragment index of a file without a fragment.
pub const NO_FRAGMENT: u32 = u32::MAX;
/// Xattr id of an inode without xattrs.
pub const NO_XATTR: u32 = u32::MAX;
/// Longest name of a directory entry that Linux takes (the format could hold 256).
pub const MAX_NAME: usize = 255;
/// Longest symlink target that Linux takes; kernels refuse an inode whose target exceeds a page.
pub const MAX_SYMLINK: usize = 4095;
/// Ids the table can hold: the superblock's count is a u16.
pub const MAX_IDS: usize = 65_535;
/// Entries under one directory header.
pub const MAX_DIR_RUN: usize = 256;
/// What an inode's directory size counts beyond the listing (`.` and `..` in the kernel's eyes).
pub const DIR_SIZE_BIAS: u32 = 3;
/// Padding of the whole file.
pub const PAD: u64 = 4096;

/// Superblock flags. Only [`FLAG_COMPRESSOR_OPTIONS`] changes how the image is read.
pub const FLAG_UNCOMPRESSED_INODES: u16 = 0x0001;
/// Data blocks are stored as they are.
pub const FLAG_UNCOMPRESSED_DATA: u16 = 0x0002;
/// Fragment blocks are stored as they are.
pub const FLAG_UNCOMPRESSED_FRAGMENTS: u16 = 0x0008;
/// No fragments are used.
pub const FLAG_NO_FRAGMENTS: u16 = 0x0010;
/// Tails of files with full blocks are in fragments too.
pub const FLAG_ALWAYS_FRAGMENTS: u16 = 0x0020;
/// Files were deduplicated.
pub const FLAG_DUPLICATES: u16 = 0x0040;
/// There is an export table.
pub const FLAG_EXPORTABLE: u16 = 0x0080;
/// Xattrs are stored as they are.
pub const FLAG_UNCOMPRESSED_XATTRS: u16 = 0x0100;
/// No xattrs are stored.
pub const FLAG_NO_XATTRS: u16 = 0x0200;
/// A metadata block of compressor options follows the superblock.
pub const FLAG_COMPRESSOR_OPTIONS: u16 = 0x0400;
/// The id table is stored as it is.
pub const FLAG_UNCOMPRESSED_IDS: u16 = 0x0800;

/// Why bytes are not what the format allows.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// Fewer bytes than the record needs. A reader at the end of a metadata block may fetch more.
    #[error("{what} is cut short: {need} bytes needed, {have} there")]
    Truncated {
        /// The record.
        what: &'static str,
        /// Bytes it needs.
        need: usize,
        /// Bytes there were.
        have: usize,
    },
    /// The first four bytes are not `hsqs`.
    #[error("not a SquashFS image (magic {0:#010x})")]
    Magic(u32),
    /// Another version than 4.0.
    #[error("SquashFS version {0}.{1} is not 4.0")]
    Version(u16, u16),
    /// A field with a value the format does not allow.
    #[error("{what} has an impossible value {value:#x}")]
    Value {
        /// The field.
        what: &'static str,
        /// What it held.
        value: u64,
    },
}

/// A cursor over bytes that never reads past their end.
pub(crate) struct Fields<'a> {
    what: &'static str,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Fields<'a> {
    pub(crate) fn new(
        what: &'static str,
        bytes: &'a [u8],
        need: usize,
    ) -> Result<Self, FormatError> {
        if bytes.len() < need {
            return Err(FormatError::Truncated {
                what,
                need,
                have: bytes.len(),
            });
        }
        Ok(Self { what, bytes, at: 0 })
    }

    pub(crate) fn take(&mut self, len: usize) -> Result<&'a [u8], FormatError> {
        let end = self
            .at
            .checked_add(len)
            .filter(|end| *end <= self.bytes.len());
        let Some(end) = end else {
            return Err(FormatError::Truncated {
                what: self.what,
                need: self.at.saturating_add(len),
                have: self.bytes.len(),
            });
        };
        let part = &self.bytes[self.at..end];
        self.at = end;
        Ok(part)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], FormatError> {
        let mut out = [0; N];
        out.copy_from_slice(self.take(N)?);
        Ok(out)
    }

    pub(crate) fn u16(&mut self) -> Result<u16, FormatError> {
        self.array().map(u16::from_le_bytes)
    }

    pub(crate) fn i16(&mut self) -> Result<i16, FormatError> {
        self.array().map(i16::from_le_bytes)
    }

    pub(crate) fn u32(&mut self) -> Result<u32, FormatError> {
        self.array().map(u32::from_le_bytes)
    }

    pub(crate) fn u64(&mut self) -> Result<u64, FormatError> {
        self.array().map(u64::from_le_bytes)
    }
}

pub(crate) fn put16(out: &mut Vec<u8>, value: u16) {
    out.extend_from_slice(&value.to_le_bytes());
}

pub(crate) fn put32(out: &mut Vec<u8>, value: u32) {
    out.extend_from_slice(&value.to_le_bytes());
}

pub(crate) fn put64(out: &mut Vec<u8>, value: u64) {
    out.extend_from_slice(&value.to_le_bytes());
}
