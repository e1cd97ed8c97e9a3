//! The platform an image is for (OCI image-spec, image-index.md, "platform").

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Operating system, architecture (Go's names) and optional variant, written `os/architecture[/variant]`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Platform {
    os: String,
    architecture: String,
    variant: Option<String>,
}

/// Why a string is not a platform.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a platform: expected os/architecture or os/architecture/variant, as in linux/amd64"
)]
pub struct PlatformError(String);

impl Platform {
    /// The platform of the machine this program runs on.
    pub fn host() -> Self {
        let architecture = match std::env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            "powerpc64" => "ppc64le",
            other => other,
        };
        Self {
            os: "linux".into(),
            architecture: architecture.into(),
            variant: None,
        }
    }

    pub fn os(&self) -> &str {
        &self.os
    }

    pub fn architecture(&self) -> &str {
        &self.architecture
    }

    pub fn variant(&self) -> Option<&str> {
        self.variant.as_deref()
    }

    /// Whether an image described so runs where `self` is wanted. A missing variant on either side matches, and
    /// `arm64` is `arm64/v8` (containerd's normalisation, which builders follow).
    pub fn accepts(&self, os: &str, architecture: &str, variant: Option<&str>) -> bool {
        let normal = |architecture: &str, variant: Option<&str>| match (architecture, variant) {
            ("arm64", Some("v8" | "8")) => None,
            (_, v) => v.filter(|v| !v.is_empty()).map(str::to_owned),
        };
        if self.os != os || self.architecture != architecture {
            return false;
        }
        match (
            normal(&self.architecture, self.variant()),
            normal(architecture, variant),
        ) {
            (Some(want), Some(is)) => want == is,
            _ => true,
        }
    }

    /// The platform as one path component: `linux-amd64`, `linux-arm-v7`.
    pub fn dashed(&self) -> String {
        self.to_string().replace('/', "-")
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(s: &str) -> Result<Self, PlatformError> {
        let word = |w: &&str| {
            !w.is_empty()
                && w.len() <= 32
                && w.bytes()
                    .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'_' || b == b'.')
                && !w.starts_with('.')
        };
        let words: Vec<&str> = s.split('/').collect();
        match words.as_slice() {
            [os, architecture, rest @ ..] if rest.len() <= 1 && words.iter().all(word) => {
                Ok(Self {
                    os: (*os).into(),
                    architecture: (*architecture).into(),
                    variant: rest.first().map(|v| (*v).into()),
                })
            }
            _ => Err(PlatformError(crate::shown::clip(s))),
        }
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        match &self.variant {
            Some(v) => write!(f, "/{v}"),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for Platform {
    type Error = PlatformError;

    fn try_from(s: String) -> Result<Self, PlatformError> {
        s.parse()
    }
}

impl From<Platform> for String {
    fn from(p: Platform) -> Self {
        p.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_match_as_builders_write_them() {
        let arm64: Platform = "linux/arm64".parse().unwrap();
        assert!(arm64.accepts("linux", "arm64", Some("v8")));
        let v7: Platform = "linux/arm/v7".parse().unwrap();
        assert!(v7.accepts("linux", "arm", Some("v7")) && !v7.accepts("linux", "arm", Some("v6")));
        assert!(!arm64.accepts("linux", "amd64", None));
        assert_eq!(v7.dashed(), "linux-arm-v7");
    }

    #[test]
    fn refuses_what_could_leave_a_path() {
        for bad in [
            "",
            "linux",
            "linux/",
            "../x",
            "linux/a/b/c",
            "linux/.x",
            "Linux/amd64",
            "a-b/c",
        ] {
            assert!(bad.parse::<Platform>().is_err(), "{bad}");
        }
    }
}
