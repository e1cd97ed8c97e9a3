//! Manifests as bytes: by tag, by digest, and whether a tag still means what it meant.

use berth_image::Digest;
use reqwest::Method;
use reqwest::header::{ACCEPT, HeaderMap, HeaderValue};

use super::client::{Call, Registry, read_limited, shown};
use super::error::RegistryError;

/// Largest manifest or index, in bytes (the limit that distribution-spec asks registries to allow at least).
pub const MAX_MANIFEST: u64 = 4 << 20;

/// The six kinds there are, in one line: proxies have been seen to keep only one of several `Accept` lines. Schema 1
/// is asked for to be able to say that it is not supported.
const KINDS: &str = "application/vnd.oci.image.index.v1+json, application/vnd.oci.image.manifest.v1+json, \
    application/vnd.docker.distribution.manifest.list.v2+json, application/vnd.docker.distribution.manifest.v2+json, \
    application/vnd.docker.distribution.manifest.v1+prettyjws;q=0.1, application/vnd.docker.distribution.manifest.v1+json;q=0.1";

/// A manifest or index as a registry sent it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RawManifest {
    /// SHA-256 of `bytes`.
    pub digest: Digest,
    pub bytes: Vec<u8>,
}

impl Registry {
    /// The manifest that `name` (a tag or a digest) stands for, tried once.
    ///
    /// # Errors
    /// [`RegistryError::Digest`] when the bytes are not those of `expected`, or not of the digest that the registry
    /// itself names.
    pub async fn manifest(
        &self,
        repository: &str,
        name: &str,
        expected: Option<Digest>,
    ) -> Result<RawManifest, RegistryError> {
        let response = self.call(&call(Method::GET, repository, name)).await?;
        let url = shown(response.url());
        let announced = content_digest(response.headers());
        let bytes = read_limited(response, MAX_MANIFEST, self.stall).await?;
        let found = Digest::of(&bytes);
        match expected.or(announced) {
            Some(expected) if expected != found => Err(RegistryError::Digest {
                url,
                expected,
                found,
            }),
            _ => Ok(RawManifest {
                digest: found,
                bytes,
            }),
        }
    }

    /// The digest that a tag stands for, if the registry says so without sending the manifest. Tried once.
    pub async fn manifest_digest(
        &self,
        repository: &str,
        tag: &str,
    ) -> Result<Option<Digest>, RegistryError> {
        let response = self.call(&call(Method::HEAD, repository, tag)).await?;
        Ok(content_digest(response.headers()))
    }
}

fn call<'a>(method: Method, repository: &'a str, name: &str) -> Call<'a> {
    Call {
        method,
        repository,
        path: format!("manifests/{name}"),
        headers: HeaderMap::from_iter([(ACCEPT, HeaderValue::from_static(KINDS))]),
    }
}

fn content_digest(headers: &HeaderMap) -> Option<Digest> {
    header(headers, "docker-content-digest")?.parse().ok()
}

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    headers.get(name)?.to_str().ok()
}
