//! What can go wrong when an image is read.

use std::io;
use std::sync::Arc;

use crate::compress::CompressError;
use crate::format::FormatError;

/// A failed read. Cheap to clone: every reader that waited for one block gets the same answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// The source failed.
    #[error("cannot read {len} bytes at {offset}")]
    Io {
        /// Byte offset in the image file.
        offset: u64,
        /// Bytes asked for.
        len: usize,
        /// What the source said.
        source: Arc<io::Error>,
    },
    /// A record is not as the format has it.
    #[error("corrupt image")]
    Format(#[from] FormatError),
    /// A compressor this build does not have, or a block at this offset that it cannot decompress.
    #[error("block at {at:#x}")]
    Compress {
        /// Byte offset in the image file.
        at: u64,
        /// Why.
        source: CompressError,
    },
    /// Records that contradict each other or the image's size.
    #[error("corrupt image: {what} ({at:#x})")]
    Corrupt {
        /// Which rule is broken.
        what: &'static str,
        /// Where: a byte offset in the image, or the number that is wrong.
        at: u64,
    },
    /// A folder was asked of something that is none.
    #[error("not a directory")]
    NotADirectory,
    /// A file's contents were asked of something that is no regular file.
    #[error("not a regular file")]
    NotAFile,
    /// A link's target was asked of something that is no symbolic link.
    #[error("not a symbolic link")]
    NotASymlink,
}

impl ReadError {
    pub(crate) fn corrupt(what: &'static str, at: u64) -> Self {
        Self::Corrupt { what, at }
    }

    pub(crate) fn io(offset: u64, len: usize, source: io::Error) -> Self {
        Self::Io {
            offset,
            len,
            source: Arc::new(source),
        }
    }
}
