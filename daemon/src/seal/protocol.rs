//! What is said on the sealer's socket (`seal.socket`, Unix stream).
//!
//! A frame is a little-endian `u32` length and that many bytes of JSON. A client sends one [`Request`] a connection.
//! After a `seal` request come the read ends of the layers' pipes, base first as in the manifest, by `SCM_RIGHTS`:
//! one byte [`FDS_BYTE`] for each group of at most [`FDS_PER_MESSAGE`] descriptors. The sealer answers with any
//! number of [`Answer::Progress`] and then exactly one other answer.
//!
//! A pipe's end of file says: this layer is complete and its digest was found right. A client that cannot say that
//! closes the connection instead, and must close it before the pipes: the sealer then ends the conversion and keeps
//! nothing of it.

use std::path::PathBuf;

use berth_client::api::{ErrorBody, ErrorKind};
use berth_image::record::{Admission, Record};
use berth_image::{Digest, ImageRef, Platform};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

/// Largest frame, in bytes: a manifest and a configuration of 4 MiB each, as escaped JSON.
pub const MAX_FRAME: usize = 16 << 20;
/// Most layers of one image. Docker's own limit is 127.
pub const MAX_LAYERS: usize = 512;
/// Most descriptors sent at a time; Linux allows 253.
pub const FDS_PER_MESSAGE: usize = 200;
/// The byte that carries a group of descriptors.
pub const FDS_BYTE: u8 = b'F';

/// What the daemon asks of the sealer.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Request {
    /// Make, sign and publish an image. Answered by [`Answer::Sealed`]; at once, without a conversion, when the
    /// image is there already (the pipes are then closed unread).
    Seal(SealRequest),
    /// Sign and publish what a reference stands for. Answered by [`Answer::RefWritten`].
    Ref(RefRequest),
    /// Take an image's record away and move its data to the trash. Answered by [`Answer::Removed`].
    Remove {
        manifest: Digest,
        platform: Platform,
    },
    /// Delete what lies in the trash. Answered by [`Answer::TrashEmptied`].
    EmptyTrash {},
    /// Answered by [`Answer::Status`].
    Status {},
}

/// An image to be made. The layers' digests, sizes and media types are taken from the manifest.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SealRequest {
    /// Digest of the manifest: the image's identity.
    pub manifest_digest: Digest,
    /// The manifest's bytes (JSON, therefore text); checked against the digest.
    pub manifest: String,
    /// The image configuration's bytes; checked against the digest in the manifest.
    pub config: String,
    pub platform: Platform,
    pub admission: Admission,
}

/// What a reference stands for.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RefRequest {
    pub reference: ImageRef,
    /// What the registry answered: digest of the index, or of the manifest where there is no index.
    pub top: Digest,
    pub platform: Platform,
    /// The manifest for that platform; its record must be in the store. Entries of other platforms stay when `top`
    /// is the same.
    pub manifest: Digest,
    pub resolved_at: Timestamp,
}

/// What the sealer says.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Progress(Progress),
    Sealed(Box<Sealed>),
    RefWritten {
        serial: u64,
    },
    /// Whether there was a record.
    Removed {
        existed: bool,
    },
    TrashEmptied {
        removed: usize,
    },
    Status(Status),
    Error(SealFailure),
}

/// How far a conversion is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Compressed bytes read from the pipes.
    pub bytes_in: u64,
    /// Bytes of image file written.
    pub bytes_out: u64,
    /// Headers met.
    pub entries: u64,
}

/// A published image.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Sealed {
    pub record: Record,
    /// The data file.
    pub path: PathBuf,
    /// It was there already.
    pub existing: bool,
}

/// The sealer, as it sees itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {
    pub version: String,
    pub store_uuid: String,
    /// Id of the key it signs with, 64 hexadecimal digits.
    pub key_id: String,
    /// Images being made now.
    pub conversions: usize,
}

/// Why a request came to nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct SealFailure {
    pub kind: ErrorKind,
    /// One line.
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
    /// Which layer, 0 = base.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer: Option<usize>,
    /// Which entry of that layer, unprintable bytes escaped.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entry: Option<String>,
}

impl SealFailure {
    pub fn new(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self {
            kind,
            message: message.into(),
            hint: None,
            layer: None,
            entry: None,
        }
    }
}

impl From<SealFailure> for ErrorBody {
    fn from(f: SealFailure) -> Self {
        Self {
            kind: f.kind,
            message: f.message,
            hint: f.hint,
        }
    }
}
