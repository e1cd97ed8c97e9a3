//! What can go wrong when an image is read.

use std::io;
use std::sync::Arc;

/// A failed read. Cheap to clone: every reader that waited for one block gets the same answer.
#[derive(Debug, Clone, thiserror::Error)]
pub enum ReadError {
    /// The source failed.
    #[error("cannot read {len} bytes at {offset}: {source}")]
    Io {
        /// Byte offset in the image file.
        offset: u64,
        /// Bytes asked for.
        len: usize,
        /// What the source said.
        source: Arc<io::Error>,
    },
    /// The first bytes are not a SquashFS superblock.
    #[error("not a squashfs image")]
    NotSquashfs,
    /// A valid image that this reader does not know.
    #[error("unsupported {what} {value}")]
    Unsupported {
        /// Which field.
        what: &'static str,
        /// Its value.
        value: u64,
    },
    /// The image breaks the format.
    #[error("corrupt image: {what} at {at:#x}")]
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
