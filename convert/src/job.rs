//! What a conversion is asked to do, and what it says: the JSON on `berth-convert`'s standard input and output.

use std::os::fd::RawFd;

use berth_image::Digest;
use serde::{Deserialize, Serialize};

/// One conversion. Descriptors are numbers in the converter's process.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Job {
    /// The image file: empty, open for reading and writing.
    pub output_fd: RawFd,
    /// A file without a name, open for reading and writing, for contents that are probably hidden.
    pub spill_fd: RawFd,
    /// Base first, as in the manifest.
    pub layers: Vec<LayerJob>,
    pub options: Options,
}

/// One layer, compressed as it comes from a registry.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerJob {
    /// Where it is read from, to the end. Who feeds it has checked `digest`; only `diff_id` is checked here.
    pub fd: RawFd,
    pub digest: Digest,
    /// Digest of the uncompressed tar stream.
    pub diff_id: Digest,
}

/// How the image is made. The same layers and options give the same bytes; `memory` and `threads` do not matter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Options {
    pub compression: Compression,
    pub level: i32,
    /// Bytes.
    pub block_size: u32,
    pub policy: Policy,
    /// Of the verity tree, 64 hexadecimal digits.
    pub salt: String,
    /// Of the verity tree, 32 hexadecimal digits.
    pub uuid: String,
    pub limits: Limits,
    /// Bytes of buffers, besides about 400 an entry.
    pub memory: u64,
    /// Compressing threads, at least 1.
    pub threads: usize,
}

/// What squashes blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    Zstd,
    Gzip,
    Lz4,
}

/// What of the layers' metadata stays.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Policy {
    pub ownership: Ownership,
    /// Keep set-user-id and set-group-id bits, and `security.capability`.
    pub keep_setid: bool,
    /// Prefixes of the xattrs that stay.
    pub keep_xattrs: Vec<String>,
}

/// Whose the files are.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Ownership {
    /// Owners and modes as in the layers.
    Keep,
    /// Everything owned by root and readable by everybody (`a+rX`).
    Readable,
}

/// Where an image is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Bytes of all layers uncompressed, holes of sparse files included.
    pub max_bytes: u64,
    /// Headers in all layers.
    pub max_entries: u64,
    /// Uncompressed to compressed size of a layer, once it is past 64 MiB.
    pub max_ratio: u64,
}

/// A line on standard output. The last one is `Done` or `Error`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    Progress(Progress),
    /// Something an admin should read, for example that the kernel cannot sandbox.
    Warning(String),
    Done(Done),
    Error(Failure),
}

/// How far a conversion is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes read from the layers.
    pub bytes_in: u64,
    /// Bytes of image file written.
    pub bytes_out: u64,
    /// Headers met.
    pub entries: u64,
}

/// A finished image file; not yet synced.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Done {
    /// Bytes in use according to the superblock.
    pub squashfs_size: u64,
    /// Where the verity superblock begins.
    pub hash_offset: u64,
    /// Bytes of the file.
    pub file_size: u64,
    /// 64 hexadecimal digits.
    pub verity_root: String,
    /// As computed from the streams, base first.
    pub diff_ids: Vec<Digest>,
    /// Names in the image.
    pub entries: u64,
    /// What was left out, one line each.
    pub notes: Vec<String>,
}

/// Why there is no image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub kind: FailureKind,
    /// Index of the layer, 0 = base.
    pub layer: Option<usize>,
    /// Name of the entry, unprintable bytes escaped, clipped.
    pub entry: Option<String>,
    /// One line, without layer and entry.
    pub message: String,
}

/// Whose fault it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum FailureKind {
    /// The layer is not what a layer must be.
    CorruptLayer,
    /// The uncompressed layer is not the one the configuration names.
    DigestMismatch,
    /// One of [`Limits`].
    Limit,
    DiskFull,
    /// Everything else.
    Internal,
}

impl std::fmt::Display for Failure {
    /// `layer 2, entry "etc/passwd": what is wrong`.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if let Some(layer) = self.layer {
            write!(f, "layer {layer}")?;
            if let Some(entry) = &self.entry {
                write!(f, ", entry `{entry}`")?;
            }
            f.write_str(": ")?;
        }
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}
