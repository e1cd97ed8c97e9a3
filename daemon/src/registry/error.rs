//! What a registry can answer wrongly, with the facts that a person needs to act.

use std::time::Duration;

use berth_client::api::{ErrorBody, ErrorKind};
use berth_image::Digest;

use super::guard::Forbidden;

/// Why a request to a registry failed. No variant carries a token, a password, or a URL's query.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RegistryError {
    #[error("cannot reach registry `{host}`: {why}")]
    Unreachable { host: String, why: String },
    #[error("registry `{host}` answered {status} to {method} {url}")]
    Status {
        host: String,
        method: String,
        url: String,
        status: u16,
        retry_after: Option<Duration>,
    },
    #[error("registry `{host}` refused access to `{repository}` ({status}), tried {credential}")]
    Refused {
        host: String,
        repository: String,
        status: u16,
        credential: String,
    },
    #[error("registry `{host}` has no {what}")]
    NotFound { host: String, what: String },
    #[error("registry `{host}` has the image's manifest and not its blob {blob} ({repository})")]
    NoBlob {
        host: String,
        repository: String,
        blob: String,
    },
    #[error("nothing came from {url} for {} seconds", .after.as_secs())]
    Stalled { url: String, after: Duration },
    #[error("less than 64 KiB a second came from {url} for {} seconds", .after.as_secs())]
    Slow { url: String, after: Duration },
    #[error("the answer from {url} broke off: {why}")]
    Broken { url: String, why: String },
    #[error("{url} sent bytes of {found}, expected {expected}")]
    Digest {
        url: String,
        expected: Digest,
        found: Digest,
    },
    #[error("{url} announces {found} bytes, the manifest says {expected}")]
    Size {
        url: String,
        expected: u64,
        found: u64,
    },
    #[error("the answer from {url} is larger than {limit} bytes")]
    TooLarge { url: String, limit: u64 },
    #[error("registry `{host}`: {why}")]
    Protocol { host: String, why: String },
    #[error("registry `{host}` is not set up right: {why}")]
    SetUp { host: String, why: String },
    #[error("`{name}` has the address {address}, which is not a public one")]
    Forbidden {
        name: String,
        address: std::net::IpAddr,
    },
}

impl RegistryError {
    /// Whether the same request may succeed a little later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Unreachable { .. }
            | Self::Stalled { .. }
            | Self::Slow { .. }
            | Self::Broken { .. } => true,
            Self::Status { status, .. } => matches!(status, 408 | 429 | 500..=599),
            _ => false,
        }
    }

    /// What a registry asked to be waited, unclamped.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::Status { retry_after, .. } => *retry_after,
            _ => None,
        }
    }

    fn kind(&self) -> ErrorKind {
        match self {
            Self::Unreachable { .. }
            | Self::Status { .. }
            | Self::Stalled { .. }
            | Self::Slow { .. }
            | Self::Broken { .. }
            | Self::Protocol { .. }
            | Self::TooLarge { .. } => ErrorKind::UpstreamUnavailable,
            Self::Refused { .. } => ErrorKind::Unauthorized,
            Self::NotFound { .. } | Self::NoBlob { .. } => ErrorKind::UnknownImage,
            Self::Digest { .. } | Self::Size { .. } => ErrorKind::DigestMismatch,
            Self::SetUp { .. } => ErrorKind::Internal,
            Self::Forbidden { .. } => ErrorKind::Denied,
        }
    }

    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Unreachable { host, .. } => {
                format!("is `{host}` right, and reachable from the daemon's machine?")
            }
            Self::Refused { host, .. } => format!(
                "it may not exist or be private: ask the site for credentials, [registry.\"{host}\"] credentials = FILE"
            ),
            Self::NotFound { .. } => "check the spelling of repository and tag".into(),
            Self::NoBlob { .. } => "the image is incomplete in the registry: push it again".into(),
            Self::Status { status: 429, .. } => {
                "the registry limits requests: try later, or give the daemon credentials".into()
            }
            Self::Digest { .. } | Self::Size { .. } => {
                "the registry or something before it serves damaged content".into()
            }
            Self::Forbidden { name, .. } => format!(
                "a registry in the site's own networks is one that the site names: [registry.\"{name}\"], or [policy] networks"
            ),
            _ => return None,
        })
    }
}

impl From<Forbidden> for RegistryError {
    fn from(e: Forbidden) -> Self {
        Self::Forbidden {
            name: e.name,
            address: e.address,
        }
    }
}

impl From<RegistryError> for ErrorBody {
    fn from(e: RegistryError) -> Self {
        Self {
            kind: e.kind(),
            message: e.to_string(),
            hint: e.hint(),
        }
    }
}
