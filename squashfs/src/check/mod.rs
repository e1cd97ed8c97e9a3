//! Whether a finished image is fit to be signed, and so to be mounted by the kernels of compute nodes.
//!
//! The process that wrote the image parsed what strangers made; this walk, in another process, trusts nothing of what
//! it left behind. It looks at every metadata block and every record once and is stricter than the kernel: the tables
//! must follow each other without gaps, every inode must be named as often as it says, the folders must be one tree,
//! their listings must tile the directory table, and every block must lie in the data area.
//!
//! Time grows with the image's metadata. Memory is [`BYTES_PER_INODE`] an inode, 16 bytes a folder and the reader's
//! caches, whatever the image claims: the count of inodes is checked against the table's size and [`Limits`] first.

mod files;
mod inodes;
mod layout;
mod tree;
mod xattrs;

use crate::compress::Compression;
use crate::read::{CacheSizes, ReadAt, ReadError, Reader};

pub use inodes::BYTES_PER_INODE;

/// What an image may hold.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Most inodes.
    pub max_inodes: u32,
    /// Most folders above an entry.
    pub max_depth: u32,
    /// Whether files may be set-user-id or set-group-id, or have capabilities (`security.capability`).
    pub setid: bool,
    /// Whether there may be block and character devices.
    pub devices: bool,
    /// Namespaces that xattr names may begin with: any of `user.`, `trusted.`, `security.`.
    pub xattrs: Vec<String>,
    /// Whether all contents are read back too, and not only the metadata.
    pub contents: bool,
}

impl Default for Limits {
    /// What an image has that was made with the site's default policy: 64 million inodes, no set-id files, no
    /// devices, `user.` xattrs.
    fn default() -> Self {
        Self {
            max_inodes: 64_000_000,
            max_depth: 4096,
            setid: false,
            devices: false,
            xattrs: vec!["user.".to_owned()],
            contents: false,
        }
    }
}

/// What a checked image holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Summary {
    /// All inodes.
    pub inodes: u32,
    /// Folders among them.
    pub folders: u32,
    /// Regular files among them.
    pub files: u32,
    /// Lengths of all regular files, each inode once, in bytes.
    pub bytes: u64,
    /// Names in all folders.
    pub entries: u64,
    /// Sets of xattrs.
    pub xattr_sets: u32,
    /// Bytes of the image, without padding and hash tree.
    pub image_bytes: u64,
}

/// Why an image must not be signed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum CheckError {
    /// A part cannot be read.
    #[error("{part} cannot be read")]
    Read {
        /// Which.
        part: String,
        /// Why.
        source: ReadError,
    },
    /// The image breaks a rule of the format.
    #[error("{part}: {rule}")]
    Broken {
        /// Which record.
        part: String,
        /// The rule it breaks.
        rule: &'static str,
    },
    /// The image holds what the limits do not allow.
    #[error("{part}: {what} is not allowed here")]
    Forbidden {
        /// Which record.
        part: String,
        /// What it holds.
        what: String,
    },
}

impl CheckError {
    fn broken(part: impl Into<String>, rule: &'static str) -> Self {
        Self::Broken {
            part: part.into(),
            rule,
        }
    }

    fn forbidden(part: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Forbidden {
            part: part.into(),
            what: what.into(),
        }
    }
}

/// Names the part of the image in which reading failed.
trait In<T> {
    fn within(self, part: impl FnOnce() -> String) -> Result<T, CheckError>;
}

impl<T, E: Into<ReadError>> In<T> for Result<T, E> {
    fn within(self, part: impl FnOnce() -> String) -> Result<T, CheckError> {
        self.map_err(|source| CheckError::Read {
            part: part(),
            source: source.into(),
        })
    }
}

/// Walks the whole image; see the module's head.
pub fn check<S: ReadAt>(source: S, limits: &Limits) -> Result<Summary, CheckError> {
    let caches = CacheSizes {
        metadata: 16 << 20,
        data: 4 << 20,
    };
    let reader = Reader::open(source, caches).within(|| "superblock".into())?;
    // The kernel's decoders of what Berth does not write need not meet it through a signed image.
    let compression = reader.superblock().compression;
    if matches!(compression, Compression::Lzo | Compression::Xz) {
        return Err(CheckError::forbidden(
            "superblock",
            format!("compression with {compression}"),
        ));
    }
    let layout = layout::check(&reader, limits)?;
    let xattr_sets = xattrs::check(&reader, limits)?;
    files::check_fragments(&reader, &layout)?;
    let mut table = inodes::scan(&reader, &layout, limits)?;
    let entries = tree::check(&reader, &layout, limits, &mut table)?;
    inodes::check_export(&reader, &table)?;
    if limits.contents {
        files::read_back(&reader, &table)?;
    }
    Ok(Summary {
        inodes: reader.superblock().inode_count,
        folders: table.folders,
        files: table.files,
        bytes: table.bytes,
        entries,
        xattr_sets,
        image_bytes: reader.superblock().bytes_used,
    })
}
