//! Reading tar streams as strangers write them.
//!
//! Formats: V7, ustar (POSIX.1-1988), pax (POSIX.1-2001), GNU (long names, base-256 numbers, old sparse files), star.
//! Sources: POSIX.1-2017 "pax", GNU tar's manual ("Basic Tar Format", "Storing Sparse Files"); where they leave room,
//! Go's `archive/tar` decides, because every container engine reads layers with it.
//!
//! Invariant: memory is bounded by [`MAX_EXTENSION`] for each kind of extended header, for all global ones together, and by [`MAX_SEGMENTS`] for a
//! sparse map, whatever lengths a stream claims. Nothing here touches a file system.
//!
//! - `number`: octal and base-256 fields, pax times;
//! - `block`: the 512-byte header;
//! - `pax`: extended records;
//! - `sparse`: the four ways to store a file with holes;
//! - `reader`: from a byte stream to entries.

mod block;
mod number;
mod pax;
mod reader;
mod sparse;

pub use pax::Xattrs;
pub use reader::{Entry, EntryKind, Sink, TarReader};
pub use sparse::MAX_SEGMENTS;

/// Bytes of a block.
pub const BLOCK: usize = 512;
/// Most bytes of one extended header (pax records, GNU long name): Go's limit.
pub const MAX_EXTENSION: u64 = 1 << 20;

/// What is wrong with a tar stream. No variant names the entry: the caller knows it.
#[derive(Debug, thiserror::Error)]
pub enum TarError {
    #[error("the stream ends in the middle of {0}")]
    Truncated(&'static str),
    #[error("not a tar header: its checksum is wrong")]
    Checksum,
    #[error("the header's {0} is not a number that can be used")]
    Number(&'static str),
    #[error("an extended header of {0} bytes (at most {MAX_EXTENSION} are allowed)")]
    ExtensionSize(u64),
    #[error("global extended headers with xattrs of more than {MAX_EXTENSION} bytes in all")]
    Globals,
    #[error("malformed pax record: {0}")]
    Pax(&'static str),
    #[error("malformed sparse file: {0}")]
    Sparse(&'static str),
    #[error("entries of type `{}` are not supported", char::from(*.0).escape_default())]
    Type(u8),
    #[error("a name with a NUL byte")]
    Nul,
    #[error(transparent)]
    Read(#[from] std::io::Error),
}
