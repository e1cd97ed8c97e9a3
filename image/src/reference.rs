//! Image references, as people type them and as registries know them.
//!
//! Accepted: `docker://HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]`, the same without `docker://`, and bare names
//! (`ubuntu`, `group/app:2.1`) that a default registry completes. The grammar is the one of the reference
//! implementation (distribution/reference: domain, path-component, tag), and what a name without a host means is
//! decided by [`ImageRef::parse`]'s `default_registry`, never by a built-in one.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::digest::{Digest, DigestError};
use crate::shown::clip;

/// Longest `registry/repository` accepted (distribution-spec, "Pulling manifests").
const MAX_NAME: usize = 255;
/// Longest tag (distribution-spec: `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`).
const MAX_TAG: usize = 128;

/// A full reference: a registry, a repository there, and a tag, a digest, or both (then the digest decides).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageRef {
    registry: String,
    repository: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a string is not a reference. The `Display` form is one line for the user.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    #[error("the image reference is empty")]
    Empty,
    #[error("`{0}` is not an image reference: {1}")]
    Malformed(String, &'static str),
    #[error("`{0}` names no registry and this site has no default one")]
    NoRegistry(String),
    #[error(
        "`{0}` is a path: only docker:// references, names and paths printed by `berth path` are accepted"
    )]
    Path(String),
    #[error("`{0}`: scheme `{1}` is not supported, use docker://")]
    Scheme(String, String),
    #[error(transparent)]
    Digest(#[from] DigestError),
}

impl ImageRef {
    /// Reads what a user typed. A name without a host gets `default_registry`; a single-component name on
    /// `docker.io` gets `library/` before it (Docker Hub's official images); no tag and no digest is `latest`.
    ///
    /// # Errors
    /// [`ReferenceError`], one line that says what is wrong with which text.
    pub fn parse(text: &str, default_registry: Option<&str>) -> Result<Self, ReferenceError> {
        let malformed = |why| ReferenceError::Malformed(clip(text), why);
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        if text.starts_with('/') || text.starts_with('.') || text.starts_with('~') {
            return Err(ReferenceError::Path(clip(text)));
        }
        let rest = match text.split_once("://") {
            Some(("docker", rest)) => rest,
            Some((scheme, _)) => return Err(ReferenceError::Scheme(clip(text), clip(scheme))),
            None => text,
        };
        let (name, digest) = match rest.split_once('@') {
            Some((name, digest)) => (name, Some(digest.parse::<Digest>()?)),
            None => (rest, None),
        };
        // A colon after the last slash starts a tag; before it, it belongs to HOST:PORT.
        let (name, tag) = match name.rsplit_once(':') {
            Some((before, tag)) if !tag.contains('/') => (before, Some(tag)),
            _ => (name, None),
        };
        if let Some(tag) = tag
            && !is_tag(tag)
        {
            return Err(malformed(
                "a tag is up to 128 letters, digits, `_`, `.` and `-`, the first a letter, digit or `_`",
            ));
        }
        let (registry, repository) = match name.split_once('/') {
            Some((host, path)) if looks_like_host(host) => (host.to_owned(), path.to_owned()),
            _ => {
                let default =
                    default_registry.ok_or_else(|| ReferenceError::NoRegistry(clip(text)))?;
                (default.to_owned(), name.to_owned())
            }
        };
        let registry = match registry.to_ascii_lowercase().as_str() {
            "index.docker.io" | "registry-1.docker.io" => "docker.io".to_owned(),
            host => host.to_owned(),
        };
        let repository = if registry == "docker.io" && !repository.contains('/') {
            format!("library/{repository}")
        } else {
            repository
        };
        if !is_host(&registry) {
            return Err(malformed("the registry is not HOST or HOST:PORT"));
        }
        if !is_repository(&repository) {
            return Err(malformed(
                "a repository is lowercase letters and digits, with single `.`, `_`, `__` or `-` between them, in parts divided by `/`",
            ));
        }
        if registry.len() + 1 + repository.len() > MAX_NAME {
            return Err(malformed("the name is longer than 255 characters"));
        }
        let tag = match (tag, digest) {
            (None, None) => Some("latest".to_owned()),
            (tag, _) => tag.map(str::to_owned),
        };
        Ok(Self {
            registry,
            repository,
            tag,
            digest,
        })
    }

    /// `HOST[:PORT]`, lower case.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    pub fn repository(&self) -> &str {
        &self.repository
    }

    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    pub fn digest(&self) -> Option<Digest> {
        self.digest
    }

    /// The same repository, named by `digest` alone.
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self {
            tag: None,
            digest: Some(digest),
            ..self.clone()
        }
    }

    /// What the manifest endpoint takes: the digest where there is one, else the tag.
    pub fn manifest_name(&self) -> String {
        match (&self.digest, &self.tag) {
            (Some(d), _) => d.to_string(),
            (None, Some(t)) => t.clone(),
            (None, None) => "latest".into(),
        }
    }
}

/// Whether the part before the first slash names a host rather than a repository's first part: the rule that
/// Docker's clients use (a dot, a colon, or `localhost`).
fn looks_like_host(part: &str) -> bool {
    part.contains('.') || part.contains(':') || part == "localhost"
}

fn is_host(text: &str) -> bool {
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port))
            if !host.ends_with(':') && (!host.contains(':') || host.ends_with(']')) =>
        {
            (host, Some(port))
        }
        _ => (text, None),
    };
    if port.is_some_and(|p| p.is_empty() || p.len() > 5 || p.parse::<u16>().is_err()) {
        return false;
    }
    if let Some(v6) = host.strip_prefix('[').and_then(|h| h.strip_suffix(']')) {
        return v6.parse::<std::net::Ipv6Addr>().is_ok();
    }
    !host.is_empty()
        && host.split('.').all(|label| {
            !label.is_empty()
                && label
                    .bytes()
                    .all(|b| b.is_ascii_alphanumeric() || b == b'-')
                && !label.starts_with('-')
                && !label.ends_with('-')
        })
}

fn is_repository(text: &str) -> bool {
    text.split('/').all(is_path_component)
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*` (distribution-spec, "Pulling manifests").
fn is_path_component(part: &str) -> bool {
    let bytes = part.as_bytes();
    let alnum = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let mut i = 0;
    loop {
        let start = i;
        while i < bytes.len() && alnum(bytes[i]) {
            i += 1;
        }
        if i == start {
            return false;
        }
        if i == bytes.len() {
            return true;
        }
        let sep = i;
        while i < bytes.len() && bytes[i] == bytes[sep] {
            i += 1;
        }
        match (bytes[sep], i - sep) {
            (b'.', 1) | (b'_', 1 | 2) | (b'-', _) => {}
            _ => return false,
        }
    }
}

fn is_tag(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    !text.is_empty()
        && text.len() <= MAX_TAG
        && text.bytes().next().is_some_and(word)
        && text.bytes().all(|b| word(b) || b == b'.' || b == b'-')
}

impl fmt::Display for ImageRef {
    /// The canonical form, `HOST/REPOSITORY[:TAG][@DIGEST]`, which [`ImageRef::parse`] reads back.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for ImageRef {
    type Error = ReferenceError;

    fn try_from(s: String) -> Result<Self, ReferenceError> {
        // The canonical form always starts with its registry, so a host without dot or port (`node1/app`) must
        // not be taken for a repository here.
        let (host, _) = s
            .split_once('/')
            .ok_or(ReferenceError::NoRegistry(clip(&s)))?;
        if looks_like_host(host) {
            Self::parse(&s, None)
        } else {
            Self::parse(&s[host.len() + 1..], Some(host))
        }
    }
}

impl From<ImageRef> for String {
    fn from(r: ImageRef) -> Self {
        r.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEX: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    fn parse(s: &str) -> String {
        ImageRef::parse(s, Some("docker.io"))
            .map_or_else(|e| format!("error: {e}"), |r| r.to_string())
    }

    #[test]
    fn completes_names_as_docker_does() {
        assert_eq!(parse("ubuntu"), "docker.io/library/ubuntu:latest");
        assert_eq!(
            parse("docker://ubuntu:22.04"),
            "docker.io/library/ubuntu:22.04"
        );
        assert_eq!(parse("group/app"), "docker.io/group/app:latest");
        assert_eq!(parse("GHCR.io/group/app:2.1"), "ghcr.io/group/app:2.1");
        assert_eq!(
            parse("127.0.0.1:5000/demo/python:1"),
            "127.0.0.1:5000/demo/python:1"
        );
        assert_eq!(parse("[::1]:5000/x"), "[::1]:5000/x:latest");
        assert_eq!(parse("localhost/x"), "localhost/x:latest");
        assert_eq!(parse(&format!("a.b/x@{HEX}")), format!("a.b/x@{HEX}"));
        assert_eq!(parse(&format!("a.b/x:1@{HEX}")), format!("a.b/x:1@{HEX}"));
        assert_eq!(
            parse("index.docker.io/ubuntu"),
            "docker.io/library/ubuntu:latest"
        );
    }

    #[test]
    fn refuses_with_one_line() {
        let long = format!("a.b/{}", "x".repeat(300));
        for bad in [
            "",
            "/etc/passwd",
            "./x",
            "../x",
            "oci://x/y",
            "a.b/",
            "a.b//x",
            "a.b/X",
            "a.b/x:",
            "a.b/x:-1",
            "a.b:99999/x",
            "a.b/x@sha256:12",
            "a.b/x y",
            "a.b/x\n",
            "a.b/_x",
            "a.b/x..y",
            "a.b/x___y",
            "-a.b/x",
            &long,
            "a.b/../x",
        ] {
            let e = parse(bad);
            assert!(e.starts_with("error: "), "{bad:?} was read as {e}");
            assert!(!e.contains('\n'), "{e:?}");
        }
        assert!(ImageRef::parse("ubuntu", None).is_err());
    }

    #[test]
    fn canonical_form_reads_back() {
        for s in [
            "node1/app:1",
            "docker.io/library/ubuntu:latest",
            "a.b:5000/x/y:1",
        ] {
            let r = ImageRef::try_from(s.to_owned()).unwrap();
            assert_eq!(r.to_string(), s);
        }
    }
}
