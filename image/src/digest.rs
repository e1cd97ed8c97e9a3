//! Content digests: the identity of everything Berth handles.
//!
//! Only SHA-256 is accepted. OCI registers SHA-512 too, but no registry or builder in use writes it, and one
//! algorithm means one width everywhere (paths, catalogue, records).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use crate::shown::clip;

/// A SHA-256 digest, written `sha256:<64 lowercase hex digits>` (OCI image-spec, descriptor.md, "Digests").
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

/// Why a string is not a digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    #[error("`{0}` is not a digest: expected sha256: and 64 lowercase hexadecimal digits")]
    Malformed(String),
    #[error("`{0}` uses an algorithm other than sha256, which Berth does not accept")]
    Algorithm(String),
}

impl Digest {
    /// The digest of `bytes`.
    pub fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }

    /// A digest from the 32 bytes a hasher gave.
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The 64 lowercase hexadecimal digits, without the algorithm.
    pub fn hex(&self) -> String {
        hex(&self.0)
    }

    /// The first twelve digits: enough for a person's eye, never for identity.
    pub fn short(&self) -> String {
        hex(&self.0[..6])
    }

    /// A digest from its 64 lowercase hexadecimal digits alone.
    pub fn from_hex(digits: &str) -> Result<Self, DigestError> {
        unhex(digits)
            .map(Self)
            .ok_or_else(|| DigestError::Malformed(clip(digits)))
    }
}

impl FromStr for Digest {
    type Err = DigestError;

    fn from_str(s: &str) -> Result<Self, DigestError> {
        match s.split_once(':') {
            Some(("sha256", digits)) => unhex(digits)
                .map(Self)
                .ok_or_else(|| DigestError::Malformed(clip(s))),
            Some((algorithm, _))
                if !algorithm.is_empty()
                    && algorithm.bytes().all(|b| b.is_ascii_alphanumeric()) =>
            {
                Err(DigestError::Algorithm(clip(s)))
            }
            _ => Err(DigestError::Malformed(clip(s))),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for Digest {
    type Error = DigestError;

    fn try_from(s: String) -> Result<Self, DigestError> {
        s.parse()
    }
}

impl From<Digest> for String {
    fn from(d: Digest) -> Self {
        d.to_string()
    }
}

/// Lowercase hexadecimal digits of `bytes`.
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut out = String::with_capacity(bytes.len() * 2);
    for &b in bytes {
        out.push(char::from(DIGITS[usize::from(b >> 4)]));
        out.push(char::from(DIGITS[usize::from(b & 15)]));
    }
    out
}

/// `N` bytes from exactly `2 * N` lowercase hexadecimal digits.
pub fn unhex<const N: usize>(digits: &str) -> Option<[u8; N]> {
    let digits = digits.as_bytes();
    if digits.len() != 2 * N {
        return None;
    }
    let value = |c: u8| match c {
        b'0'..=b'9' => Some(c - b'0'),
        b'a'..=b'f' => Some(c - b'a' + 10),
        _ => None,
    };
    let mut out = [0; N];
    for (byte, pair) in out.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = value(pair[0])? << 4 | value(pair[1])?;
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_what_it_writes() {
        let d = Digest::of(b"");
        assert_eq!(
            d.to_string(),
            "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
        );
        assert_eq!(d.to_string().parse(), Ok(d));
        assert_eq!(Digest::from_hex(&d.hex()), Ok(d));
    }

    #[test]
    fn refuses_what_is_not_one() {
        let upper = Digest::of(b"").to_string().to_uppercase();
        for bad in ["", "sha256:", "sha256:zz", "e3b0", &upper, "sha256:e3b0c4"] {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
        assert!(matches!(
            "sha512:00".parse::<Digest>(),
            Err(DigestError::Algorithm(_))
        ));
    }
}
