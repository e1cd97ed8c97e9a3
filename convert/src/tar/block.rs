//! The 512-byte header block.

use super::number::field;
use super::{BLOCK, TarError};

/// A header block as it stands, its checksum verified.
#[derive(Debug)]
pub(super) struct Block(pub(super) [u8; BLOCK]);

/// Which dialect a header is written in: it decides what its last 250 bytes mean.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dialect {
    V7,
    Ustar,
    Gnu,
    Star,
}

impl Block {
    pub(super) fn is_zero(&self) -> bool {
        self.0.iter().all(|b| *b == 0)
    }

    /// The sum of all bytes, the checksum field counted as spaces. Old tars added signed bytes.
    pub(super) fn verify(&self) -> Result<(), TarError> {
        let expected = field(&self.0[148..156], "checksum").map_err(|_| TarError::Checksum)?;
        let (mut unsigned, mut signed) = (0i64, 0i64);
        for (i, &b) in self.0.iter().enumerate() {
            let b = if (148..156).contains(&i) { b' ' } else { b };
            unsigned += i64::from(b);
            signed += i64::from(b as i8);
        }
        if expected == unsigned || expected == signed {
            Ok(())
        } else {
            Err(TarError::Checksum)
        }
    }

    pub(super) fn dialect(&self) -> Dialect {
        match &self.0[257..265] {
            b"ustar  \0" => Dialect::Gnu,
            [b'u', b's', b't', b'a', b'r', 0, ..] if &self.0[508..512] == b"tar\0" => Dialect::Star,
            [b'u', b's', b't', b'a', b'r', 0, ..] => Dialect::Ustar,
            _ => Dialect::V7,
        }
    }

    pub(super) fn kind(&self) -> u8 {
        self.0[156]
    }

    /// The name, with the prefix where the dialect has one.
    pub(super) fn name(&self) -> Vec<u8> {
        let name = text(&self.0[..100]);
        let prefix = match self.dialect() {
            Dialect::Ustar => text(&self.0[345..500]),
            Dialect::Star => text(&self.0[345..476]),
            Dialect::V7 | Dialect::Gnu => b"",
        };
        if prefix.is_empty() {
            return name.to_vec();
        }
        [prefix, b"/", name].concat()
    }

    pub(super) fn link(&self) -> Vec<u8> {
        text(&self.0[157..257]).to_vec()
    }

    pub(super) fn mode(&self) -> Result<i64, TarError> {
        field(&self.0[100..108], "mode")
    }

    pub(super) fn uid(&self) -> Result<i64, TarError> {
        field(&self.0[108..116], "user id")
    }

    pub(super) fn gid(&self) -> Result<i64, TarError> {
        field(&self.0[116..124], "group id")
    }

    pub(super) fn size(&self) -> Result<i64, TarError> {
        field(&self.0[124..136], "size")
    }

    pub(super) fn mtime(&self) -> Result<i64, TarError> {
        field(&self.0[136..148], "time")
    }
}

/// The bytes before the first NUL.
fn text(bytes: &[u8]) -> &[u8] {
    let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
    &bytes[..end]
}
