//! What a manifest or index says (OCI image-spec 1.1 manifest.md and image-index.md; Docker's schema 2 and manifest
//! list), as far as making an image needs it. Pure.

use berth_client::api::{ErrorBody, ErrorKind};
use berth_image::shown::{clip, parse_error};
use berth_image::{Digest, Platform};
use serde::Deserialize;

use crate::seal::protocol::MAX_LAYERS;

pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
/// Layers that can be unpacked.
const LAYERS: [&str; 6] = [
    "application/vnd.oci.image.layer.v1.tar",
    "application/vnd.oci.image.layer.v1.tar+gzip",
    "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar",
    "application/vnd.docker.image.rootfs.diff.tar.gzip",
    "application/vnd.docker.image.rootfs.diff.tar.zstd",
];
/// Most entries of an index.
const MAX_ENTRIES: usize = 1000;
/// Largest image configuration, in bytes.
pub const MAX_CONFIG: u64 = 4 << 20;

/// Why an answer that arrived whole is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ManifestError {
    #[error("{0} is not a manifest: {1}")]
    Malformed(Digest, String),
    #[error("{0} is a Docker schema 1 manifest, which was given up in 2017")]
    Schema1(Digest),
    #[error("{0} is a `{1}`, not a container image")]
    NotAnImage(Digest, String),
    #[error("{0} could be read as an image and as an index")]
    Ambiguous(Digest),
    #[error("layer {index} of {manifest} has the unsupported type `{media_type}`{}", if *.foreign { " (a foreign layer, which the registry does not hold)" } else { "" })]
    Layer {
        manifest: Digest,
        index: usize,
        media_type: String,
        foreign: bool,
    },
    #[error("{manifest} has {found} {what}, at most {limit} are allowed")]
    TooMany {
        manifest: Digest,
        what: &'static str,
        found: usize,
        limit: usize,
    },
    #[error("the layers of {manifest} have {found} bytes, at most {limit} are allowed here")]
    TooLarge {
        manifest: Digest,
        found: u64,
        limit: u64,
    },
    #[error("the configuration of {0} has {1} bytes, at most {MAX_CONFIG} are allowed")]
    ConfigSize(Digest, u64),
    #[error("indexes are nested deeper than {0} levels")]
    Nested(usize),
    #[error("there is no image for {wanted}, only for {}", if .available.is_empty() { "none".into() } else { .available.join(", ") })]
    NoPlatform {
        wanted: Platform,
        available: Vec<String>,
    },
}

impl From<ManifestError> for ErrorBody {
    fn from(e: ManifestError) -> Self {
        let (kind, hint) = match &e {
            ManifestError::NoPlatform { available, .. } => (
                ErrorKind::NoPlatform,
                available
                    .first()
                    .map(|p| format!("ask for one of these, as in --platform {p}")),
            ),
            ManifestError::Schema1(_) => (
                ErrorKind::ConversionFailed,
                Some("push the image again with a current tool".into()),
            ),
            ManifestError::TooLarge { .. } => (
                ErrorKind::ConversionFailed,
                Some("the site sets this by [convert.limits] max_bytes".into()),
            ),
            ManifestError::Malformed(..) => (ErrorKind::UpstreamUnavailable, None),
            _ => (ErrorKind::ConversionFailed, None),
        };
        Self {
            kind,
            message: e.to_string(),
            hint,
        }
    }
}

/// A manifest or an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    Image(Manifest),
    Index(Index),
}

/// The manifest of one image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    pub digest: Digest,
    pub config: Descriptor,
    /// Base first.
    pub layers: Vec<Descriptor>,
}

/// A list of manifests for platforms.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    pub digest: Digest,
    manifests: Vec<Descriptor>,
}

/// OCI image-spec, descriptor.md. Sizes are bytes.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    #[serde(default)]
    pub media_type: String,
    pub digest: Digest,
    pub size: u64,
    #[serde(default)]
    platform: Option<DescribedPlatform>,
}

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct DescribedPlatform {
    #[serde(default)]
    os: String,
    #[serde(default)]
    architecture: String,
    #[serde(default)]
    variant: Option<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Raw {
    #[serde(default)]
    media_type: Option<String>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Version {
    schema_version: u32,
}

/// Reads `bytes`, whose digest is `digest`. Only they say what they are: a registry's `Content-Type` is not part of
/// what the digest vouches for, and cannot make an index of an image (CVE-2021-41190) or nonsense of either.
pub fn parse(digest: Digest, bytes: &[u8]) -> Result<Document, ManifestError> {
    let malformed = |e: serde_json::Error| ManifestError::Malformed(digest, parse_error(&e));
    let version: Version = serde_json::from_slice(bytes).map_err(malformed)?;
    if version.schema_version == 1 {
        return Err(ManifestError::Schema1(digest));
    }
    let raw: Raw = serde_json::from_slice(bytes).map_err(malformed)?;
    let kind = raw.media_type.as_deref().unwrap_or_default();
    let (image, index) = (
        raw.config.is_some() || raw.layers.is_some(),
        raw.manifests.is_some(),
    );
    match (kind, raw.config, raw.layers, raw.manifests) {
        _ if image && index => Err(ManifestError::Ambiguous(digest)),
        (DOCKER_LIST | OCI_INDEX | "" | "application/json", None, None, Some(manifests)) => {
            limit(digest, "entries", manifests.len(), MAX_ENTRIES)?;
            Ok(Document::Index(Index { digest, manifests }))
        }
        (
            DOCKER_MANIFEST | OCI_MANIFEST | "" | "application/json",
            Some(config),
            Some(layers),
            None,
        ) => {
            limit(digest, "layers", layers.len(), MAX_LAYERS)?;
            Ok(Document::Image(Manifest {
                digest,
                config,
                layers,
            }))
        }
        (kind, ..) => Err(ManifestError::NotAnImage(digest, clip(kind))),
    }
}

impl Manifest {
    /// Whether this is an image that can be made, before anything of it is fetched. `max_bytes` is for all layers.
    pub fn check(&self, max_bytes: u64) -> Result<(), ManifestError> {
        let found = self.layer_bytes();
        if found > max_bytes {
            return Err(ManifestError::TooLarge {
                manifest: self.digest,
                found,
                limit: max_bytes,
            });
        }
        let config = self.config.media_type.as_str();
        if config != OCI_CONFIG && config != DOCKER_CONFIG {
            return Err(ManifestError::NotAnImage(self.digest, clip(config)));
        }
        if self.config.size > MAX_CONFIG {
            return Err(ManifestError::ConfigSize(self.digest, self.config.size));
        }
        let unknown = |l: &Descriptor| !LAYERS.contains(&l.media_type.as_str());
        match self.layers.iter().position(unknown) {
            None => Ok(()),
            Some(index) => {
                let media_type = clip(&self.layers[index].media_type);
                Err(ManifestError::Layer {
                    manifest: self.digest,
                    index,
                    foreign: media_type.contains("foreign")
                        || media_type.contains("nondistributable"),
                    media_type,
                })
            }
        }
    }

    /// Compressed bytes of all layers.
    pub fn layer_bytes(&self) -> u64 {
        self.layers
            .iter()
            .fold(0, |sum: u64, l| sum.saturating_add(l.size))
    }
}

impl Index {
    /// The entry for `wanted`: one of exactly that variant before one that merely fits. Entries without a platform
    /// are taken for indexes to look into, and tried last.
    pub fn select(&self, wanted: &Platform) -> Result<&Descriptor, ManifestError> {
        let fits = |d: &&Descriptor| {
            d.platform
                .as_ref()
                .is_some_and(|p| wanted.accepts(&p.os, &p.architecture, p.variant.as_deref()))
        };
        let exact = |d: &&Descriptor| {
            let variant = d.platform.as_ref().and_then(|p| p.variant.as_deref());
            variant.filter(|v| !v.is_empty()) == wanted.variant()
        };
        let is_index = |d: &&Descriptor| matches!(d.media_type.as_str(), OCI_INDEX | DOCKER_LIST);
        let entries = || self.manifests.iter();
        entries()
            .filter(fits)
            .find(exact)
            .or_else(|| entries().find(fits))
            .or_else(|| entries().find(is_index))
            .ok_or_else(|| ManifestError::NoPlatform {
                wanted: wanted.clone(),
                available: self.available(),
            })
    }

    /// What there is, for people; without attestations, which call themselves `unknown/unknown`.
    fn available(&self) -> Vec<String> {
        let mut all: Vec<String> = (self.manifests.iter())
            .filter_map(|d| d.platform.as_ref())
            .filter(|p| p.os != "unknown")
            .map(|p| {
                let variant = p.variant.as_deref().filter(|v| !v.is_empty());
                let variant = variant.map(|v| format!("/{v}")).unwrap_or_default();
                clip(&format!("{}/{}{variant}", p.os, p.architecture))
            })
            .take(20)
            .collect();
        all.sort();
        all.dedup();
        all
    }
}

fn limit(
    manifest: Digest,
    what: &'static str,
    found: usize,
    limit: usize,
) -> Result<(), ManifestError> {
    if found <= limit {
        return Ok(());
    }
    Err(ManifestError::TooMany {
        manifest,
        what,
        found,
        limit,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const D: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn read(text: &str) -> Result<Document, ManifestError> {
        parse(Digest::of(text.as_bytes()), text.as_bytes())
    }

    fn descriptor(media_type: &str, more: &str) -> String {
        format!(r#"{{"mediaType":"{media_type}","digest":"{D}","size":3{more}}}"#)
    }

    fn image(config: &str, layer: &str) -> Manifest {
        let text = format!(
            r#"{{"schemaVersion":2,"config":{},"layers":[{}]}}"#,
            descriptor(config, ""),
            descriptor(layer, "")
        );
        match read(&text).unwrap() {
            Document::Image(m) => m,
            other => panic!("{other:?}"),
        }
    }

    fn index(platforms: &[(&str, &str, Option<&str>)]) -> Index {
        let entries: Vec<String> = platforms
            .iter()
            .map(|(os, arch, variant)| {
                let variant = variant
                    .map(|v| format!(r#","variant":"{v}""#))
                    .unwrap_or_default();
                let more =
                    format!(r#","platform":{{"os":"{os}","architecture":"{arch}"{variant}}}"#);
                descriptor(OCI_MANIFEST, &more)
            })
            .collect();
        let text = format!(
            r#"{{"schemaVersion":2,"manifests":[{}]}}"#,
            entries.join(",")
        );
        match read(&text).unwrap() {
            Document::Index(i) => i,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn what_is_no_image_is_named() {
        assert!(matches!(
            read(r#"{"schemaVersion":1,"fsLayers":[]}"#),
            Err(ManifestError::Schema1(_))
        ));
        assert!(matches!(read("{}"), Err(ManifestError::Malformed(..))));
        assert!(matches!(
            read(r#"{"schemaVersion":2}"#),
            Err(ManifestError::NotAnImage(..))
        ));
        let both = r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#;
        assert!(matches!(read(both), Err(ManifestError::Ambiguous(_))));
        let helm = image("application/vnd.cncf.helm.config.v1+json", LAYERS[1]);
        assert!(matches!(helm.check(9), Err(ManifestError::NotAnImage(..))));
        assert_eq!(image(OCI_CONFIG, LAYERS[2]).check(3), Ok(()));
        let large = image(OCI_CONFIG, LAYERS[2]).check(2);
        assert!(matches!(
            large,
            Err(ManifestError::TooLarge { found: 3, .. })
        ));
    }

    #[test]
    fn a_foreign_layer_is_refused_by_name() {
        let e = image(
            DOCKER_CONFIG,
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        );
        let e = e.check(9).unwrap_err().to_string();
        assert!(
            e.starts_with("layer 0 of sha256:") && e.contains("foreign layer"),
            "{e}"
        );
    }

    #[test]
    fn a_platform_is_chosen_exactly_then_loosely() {
        let linux = |s: &str| s.parse::<Platform>().unwrap();
        let many = index(&[
            ("linux", "amd64", Some("v3")),
            ("linux", "amd64", None),
            ("unknown", "unknown", None),
            ("linux", "arm64", Some("v8")),
        ]);
        let chosen = many.select(&linux("linux/amd64")).unwrap();
        assert_eq!(chosen.platform.as_ref().unwrap().variant, None);
        assert!(many.select(&linux("linux/arm64")).is_ok());
        let e = many.select(&linux("linux/s390x")).unwrap_err().to_string();
        assert_eq!(
            e,
            "there is no image for linux/s390x, only for linux/amd64, linux/amd64/v3, linux/arm64/v8"
        );
    }
}
