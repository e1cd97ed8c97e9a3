//! The site's keys: Ed25519 (RFC 8032), kept as PEM files that openssl reads too.
//!
//! A private key is PKCS#8 (RFC 8410), a public one SubjectPublicKeyInfo. The key id is the SHA-256 of the latter's
//! DER form, so two people who look at the same file name the same key.

use std::fmt;

use ed25519_dalek::pkcs8::spki::der::pem::LineEnding;
use ed25519_dalek::pkcs8::{DecodePrivateKey, DecodePublicKey, EncodePrivateKey, EncodePublicKey};
use ed25519_dalek::{Signature, Signer, SigningKey, VerifyingKey};

use crate::digest::Digest;

/// Why a key file cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    #[error("not an Ed25519 private key in PKCS#8 PEM form")]
    Private,
    #[error("not an Ed25519 public key in SubjectPublicKeyInfo PEM form")]
    Public,
}

/// SHA-256 of a public key's DER form.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct KeyId(Digest);

impl KeyId {
    /// The 64 hexadecimal digits, as the `keyid` of an envelope.
    pub fn hex(&self) -> String {
        self.0.hex()
    }
}

impl fmt::Display for KeyId {
    /// The first sixteen digits, for people.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.hex()[..16])
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The sealer's private key. Never printed, not even by `Debug`.
pub struct PrivateKey(SigningKey);

impl PrivateKey {
    /// A new key from 32 bytes of the kernel's randomness.
    ///
    /// # Errors
    /// When the kernel gives no randomness.
    pub fn generate() -> std::io::Result<Self> {
        let mut seed = [0u8; 32];
        let mut filled = 0;
        while filled < seed.len() {
            filled += rustix::rand::getrandom(
                &mut seed[filled..],
                rustix::rand::GetRandomFlags::empty(),
            )?;
        }
        Ok(Self(SigningKey::from_bytes(&seed)))
    }

    pub fn from_pem(pem: &str) -> Result<Self, KeyError> {
        SigningKey::from_pkcs8_pem(pem)
            .map(Self)
            .map_err(|_| KeyError::Private)
    }

    pub fn to_pem(&self) -> Result<String, KeyError> {
        self.0
            .to_pkcs8_pem(LineEnding::LF)
            .map(|pem| pem.to_string())
            .map_err(|_| KeyError::Private)
    }

    pub fn public(&self) -> PublicKey {
        PublicKey::new(self.0.verifying_key())
    }

    pub(crate) fn sign(&self, message: &[u8]) -> [u8; 64] {
        self.0.sign(message).to_bytes()
    }
}

impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey({})", self.public().id())
    }
}

/// A key that a node trusts to have signed records.
#[derive(Clone)]
pub struct PublicKey {
    key: VerifyingKey,
    id: KeyId,
}

impl PublicKey {
    fn new(key: VerifyingKey) -> Self {
        // Ed25519's SubjectPublicKeyInfo is a fixed prefix and the 32 bytes of the key (RFC 8410, section 4).
        const PREFIX: [u8; 12] = [
            0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
        ];
        let mut der = [0u8; 44];
        der[..12].copy_from_slice(&PREFIX);
        der[12..].copy_from_slice(key.as_bytes());
        Self {
            key,
            id: KeyId(Digest::of(&der)),
        }
    }

    pub fn from_pem(pem: &str) -> Result<Self, KeyError> {
        VerifyingKey::from_public_key_pem(pem)
            .map(Self::new)
            .map_err(|_| KeyError::Public)
    }

    pub fn to_pem(&self) -> Result<String, KeyError> {
        self.key
            .to_public_key_pem(LineEnding::LF)
            .map_err(|_| KeyError::Public)
    }

    pub fn id(&self) -> KeyId {
        self.id
    }

    /// Strict verification (RFC 8032 with the checks of "Taming the many EdDSAs"): no malleable signature passes.
    pub(crate) fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        Signature::from_slice(signature).is_ok_and(|s| self.key.verify_strict(message, &s).is_ok())
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({})", self.id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pem_reads_back_and_ids_agree_with_the_der_form() {
        let key = PrivateKey::generate().unwrap();
        let again = PrivateKey::from_pem(&key.to_pem().unwrap()).unwrap();
        assert_eq!(key.public().id(), again.public().id());
        let public = PublicKey::from_pem(&key.public().to_pem().unwrap()).unwrap();
        let der = public.key.to_public_key_der().unwrap();
        assert_eq!(public.id().hex(), Digest::of(der.as_bytes()).hex());
        assert!(PrivateKey::from_pem(&public.to_pem().unwrap()).is_err());
    }
}
