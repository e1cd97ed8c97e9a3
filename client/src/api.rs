//! The daemon's API, version 1, as types. `berthd` serves them and its OpenAPI description is generated from them;
//! everything that talks to it uses them. Sizes are bytes, times are RFC 3339, digests `sha256:<hex>`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

/// Body of `POST /v1/pulls`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PullRequest {
    /// As a user types it.
    pub reference: String,
    /// `os/architecture[/variant]`; the daemon's own platform without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// Try again even where a failure of a moment ago would be the answer: for a person who asks again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub fresh: bool,
}

/// An image on its way into the store, or one that arrived or failed lately.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pull {
    pub id: String,
    /// The canonical form of what was asked for first; others may have joined.
    pub reference: String,
    pub platform: String,
    /// Manifest digest, once resolved.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub digest: Option<String>,
    pub state: PullState,
    pub started_at: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ended_at: Option<String>,
    /// Bytes of all layers that have arrived in the spool.
    pub bytes_fetched: u64,
    /// Compressed size of all layers, once the manifest is known.
    pub bytes_total: u64,
    /// Compressed bytes the converter has read.
    pub bytes_converted: u64,
    /// Path of the SquashFS file, when ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<ErrorBody>,
}

/// Where a pull is: the stages of an image's life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "lowercase")]
pub enum PullState {
    Resolving,
    Fetching,
    Converting,
    Publishing,
    Ready,
    Failed,
}

impl PullState {
    /// Whether nothing more will happen.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Ready | Self::Failed)
    }
}

/// Body of `POST /v1/resolve`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct ResolveRequest {
    pub reference: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// With a job the first answer is kept: every node, step and requeue of it gets the same digest.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<Job>,
}

/// A Slurm job.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct Job {
    pub cluster: String,
    pub id: u32,
}

/// Answer of `POST /v1/resolve`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Resolved {
    /// Canonical form of the reference.
    pub reference: String,
    pub platform: String,
    /// Digest of the manifest for that platform.
    pub digest: String,
    /// Seconds since the registry said so.
    pub age_s: u64,
    /// The registry could not be asked and the answer is older than the site wants.
    pub stale: bool,
}

/// Body of `POST /v1/pins`: what a job will use, asked for at submit.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PinRequest {
    pub cluster: String,
    pub references: Vec<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
}

/// Answer of `POST /v1/pins`, by reference as it was given.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Pins {
    /// Reference → manifest digest.
    pub pins: BTreeMap<String, String>,
    /// Reference → id of the pull that was started or joined; none for an image that is ready.
    pub pulls: BTreeMap<String, String>,
}

/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Image {
    /// Manifest digest.
    pub digest: String,
    pub platform: String,
    /// References that stand for it at present.
    pub references: Vec<String>,
    /// Size of the data file.
    pub size: u64,
    pub created_at: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_used_at: Option<String>,
    /// The SquashFS file.
    pub path: String,
}

/// An image and what was signed about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ImageDetail {
    #[serde(flatten)]
    pub image: Image,
    /// The content of the signed record (docs/FORMATS.md, "The record").
    #[schema(value_type = Object)]
    pub record: serde_json::Value,
}

/// Body of `POST /v1/grants`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct GrantRequest {
    /// Manifest digest.
    pub digest: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<String>,
    /// The node that will read, for logs.
    pub node: String,
    /// How long it will, for example until the job's end; a day without this, at most `daemon.grant_s`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seconds: Option<u64>,
}

/// Answer of `POST /v1/grants`. A secret: whoever has it reads the image in the caller's place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Grant {
    /// For the header `Authorization: Berth-Grant …`.
    pub grant: String,
    pub expires_at: String,
    /// The same as seconds from now.
    pub seconds: u64,
}

/// Answer of `PUT /v1/images/{digest}/trace`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct TraceKept {
    /// `false`: there is one already. An admin replaces any, another user one of a user's that is older than a day.
    pub kept: bool,
}

/// Answer of `GET /v1/status`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct Status {
    pub version: String,
    pub started_at: String,
    pub store: String,
    pub store_uuid: String,
    pub images: u64,
    pub image_bytes: u64,
    pub pulls_in_flight: u64,
    pub spool_bytes: u64,
    /// Bytes fetched from registries since the daemon started.
    pub upstream_bytes: u64,
    /// Images made since the daemon started.
    pub conversions: u64,
    pub sealer: String,
}

/// The body of every answer that is not a success.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct ErrorAnswer {
    pub error: ErrorBody,
}

/// What went wrong, for programs (`kind`) and people (`message`, `hint`: one line each).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, ToSchema, thiserror::Error)]
#[error("{message}")]
pub struct ErrorBody {
    pub kind: ErrorKind,
    pub message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hint: Option<String>,
}

/// The kinds of failure a client may tell apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    BadRequest,
    BadReference,
    /// The registry says that there is no such image.
    UnknownImage,
    /// The registry wants other credentials.
    Unauthorized,
    /// The site or the daemon does not allow it.
    Denied,
    UpstreamUnavailable,
    DigestMismatch,
    NoPlatform,
    CorruptLayer,
    DiskFull,
    StoreUnavailable,
    ConversionFailed,
    NotFound,
    Internal,
}

impl ErrorKind {
    /// The exit code of a program that ends with this error (docs: README, "Exit codes").
    pub fn exit_code(self) -> u8 {
        match self {
            Self::BadRequest | Self::BadReference => 2,
            Self::UpstreamUnavailable | Self::StoreUnavailable | Self::DiskFull => 69,
            Self::Internal => 70,
            Self::Unauthorized | Self::Denied => 77,
            Self::UnknownImage
            | Self::DigestMismatch
            | Self::NoPlatform
            | Self::CorruptLayer
            | Self::ConversionFailed
            | Self::NotFound => 1,
        }
    }

    /// The HTTP status that carries it.
    pub fn status(self) -> u16 {
        match self {
            Self::BadRequest | Self::BadReference => 400,
            Self::Unauthorized | Self::Denied => 403,
            Self::UnknownImage | Self::NoPlatform | Self::NotFound => 404,
            Self::DigestMismatch | Self::CorruptLayer | Self::ConversionFailed => 422,
            Self::UpstreamUnavailable => 502,
            Self::StoreUnavailable => 503,
            Self::DiskFull => 507,
            Self::Internal => 500,
        }
    }
}
