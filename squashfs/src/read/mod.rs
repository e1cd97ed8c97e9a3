//! Reading an image from any source, from many threads at once.
//!
//! What is read is not trusted: every length is bounded by the image's own size before anything is allocated, every
//! reference must lie in its table, every step through a table goes forward. A damaged image gives errors; it never
//! makes the reader panic, loop or grow. (Whether an image is fit for a kernel is asked of [`crate::check()`]: it
//! looks at everything, the reader only at what it is asked for.)
//!
//! Metadata and data blocks are decoded once, into two caches with byte limits; the reader has no other state that
//! changes, and no lock is held while the source is read or a block is decoded.

mod cache;
mod decode;
mod dir;
mod error;
mod file;
mod inode;
mod meta;
mod source;
mod xattr;

use cache::BlockCache;
use decode::Decoder;
use file::{DataBlock, FileIndex, Stored};
use meta::{MetaBlock, MetaPos, Region};
use xattr::XattrTable;

pub use dir::{DirEntry, DirStream, NAME_MAX};
pub use error::ReadError;
pub use inode::{Directory, FileType, Inode, InodeKind, InodeRef, Regular};
pub use source::ReadAt;
