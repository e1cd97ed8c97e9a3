//! What can go wrong while an image is written.

use std::io;
use std::sync::Arc;

use crate::compress::CompressError;

/// Why an image was not written. Cheap to clone: every lane hears of the first failure.
#[derive(Debug, Clone, thiserror::Error)]
pub enum WriteError {
    /// An option with a value that makes no image.
    #[error("{what} cannot be {value}")]
    Options {
        /// The option.
        what: &'static str,
        /// What was asked for.
        value: u64,
    },
    /// The compressor, or its level, is not to be had.
    #[error(transparent)]
    Compress(#[from] CompressError),
    /// The image or spill file refused.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The system's words.
        source: Arc<io::Error>,
    },
    /// The reader of a file's contents failed.
    #[error("contents of a file: {0}")]
    Contents(Arc<io::Error>),
    /// More of something than the format holds.
    #[error("the image has more {what} than the format holds ({limit})")]
    TooMany {
        /// What there is too much of.
        what: &'static str,
        /// How much is allowed.
        limit: u64,
    },
    /// Two entries of one folder have the same name.
    #[error("two entries of one folder are named {}", .0.escape_ascii())]
    DuplicateName(Vec<u8>),
    /// A handle that did not come from this writer.
    #[error("a file handle is not of this image")]
    UnknownHandle,
    /// `finish` was called while a lane was still open.
    #[error("a lane is still open")]
    LaneOpen,
    /// The writer was given up, or a thread of it panicked.
    #[error("the image writer ended early")]
    Aborted,
}

impl WriteError {
    /// For `map_err`: an error of the file that is being written.
    pub(crate) fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io {
            what,
            source: Arc::new(source),
        }
    }
}

/// Why a node cannot be in a tree.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// Empty, too long, `.`, `..`, or with `/` or NUL.
    #[error("not a name: {}", .0.escape_ascii())]
    Name(Vec<u8>),
    /// The parent is not a folder, or a folder was to be linked.
    #[error("{0}")]
    Kind(&'static str),
    /// Empty or longer than 4,095 bytes, or with a NUL.
    #[error("a symlink target of {0} bytes cannot be stored")]
    Symlink(usize),
    /// Major or minor number out of range.
    #[error("device number {0}:{1} cannot be stored")]
    Device(u32, u32),
    /// Not `user.`, `trusted.` or `security.`, or an empty or overlong name.
    #[error("xattr name cannot be stored: {}", .0.escape_ascii())]
    XattrName(Vec<u8>),
    /// Longer than 65,536 bytes.
    #[error("an xattr value of {0} bytes cannot be stored")]
    XattrValue(usize),
    /// One name twice in a set.
    #[error("xattr given twice: {}", .0.escape_ascii())]
    XattrTwice(Vec<u8>),
    /// More of something than a tree holds.
    #[error("more {0} than a tree holds")]
    TooMany(&'static str),
}
