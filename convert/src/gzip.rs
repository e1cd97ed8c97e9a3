//! The frame around a gzip member's deflate stream (RFC 1952), taken byte by byte.
//!
//! The CRC behind it is not computed: the digest of the whole layer is, and says more at the price of both.

const MAGIC: [u8; 3] = [0x1f, 0x8b, 8];
const FIXED: usize = 10;
const EXTRA: u8 = 1 << 2;
const NAME: u8 = 1 << 3;
const COMMENT: u8 = 1 << 4;
const HEADER_CRC: u8 = 1 << 1;
const RESERVED: u8 = 0b1110_0000;

/// Bytes behind the deflate stream: CRC-32 and length.
pub(crate) const TRAILER: usize = 8;

/// Where in a header the next byte belongs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    Fixed(usize),
    ExtraLength(Option<u8>),
    Extra(u16),
    Name,
    Comment,
    HeaderCrc(u8),
    Done,
}

/// A header that is being read.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Header {
    at: At,
    flags: u8,
}

impl Header {
    pub(crate) fn new() -> Self {
        Self {
            at: At::Fixed(0),
            flags: 0,
        }
    }

    /// Takes the next byte. `Some(true)`: that was the header's last; `None`: this is no gzip header.
    pub(crate) fn push(&mut self, byte: u8) -> Option<bool> {
        self.at = match self.at {
            At::Fixed(n) => {
                if MAGIC.get(n).is_some_and(|expected| *expected != byte) {
                    return None;
                }
                if n == 3 {
                    self.flags = byte;
                    if byte & RESERVED != 0 {
                        return None;
                    }
                }
                if n + 1 < FIXED {
                    At::Fixed(n + 1)
                } else {
                    self.behind(EXTRA)
                }
            }
            At::ExtraLength(None) => At::ExtraLength(Some(byte)),
            At::ExtraLength(Some(low)) => match u16::from_le_bytes([low, byte]) {
                0 => self.behind(NAME),
                length => At::Extra(length),
            },
            At::Extra(1) => self.behind(NAME),
            At::Extra(left) => At::Extra(left - 1),
            At::Name if byte == 0 => self.behind(COMMENT),
            At::Comment if byte == 0 => self.behind(HEADER_CRC),
            At::HeaderCrc(1) => At::Done,
            At::HeaderCrc(left) => At::HeaderCrc(left - 1),
            same => same,
        };
        Some(self.at == At::Done)
    }

    /// The first part that the flags announce, from `part` on.
    fn behind(&self, part: u8) -> At {
        let parts = [
            (EXTRA, At::ExtraLength(None)),
            (NAME, At::Name),
            (COMMENT, At::Comment),
            (HEADER_CRC, At::HeaderCrc(2)),
        ];
        let mut rest = parts.iter().skip_while(|(flag, _)| *flag != part);
        rest.find(|(flag, _)| self.flags & flag != 0)
            .map_or(At::Done, |(_, at)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn length(bytes: &[u8]) -> Option<usize> {
        let mut header = Header::new();
        for (i, &byte) in bytes.iter().enumerate() {
            if header.push(byte)? {
                return Some(i + 1);
            }
        }
        None
    }

    #[test]
    fn every_part_is_passed_over() {
        let fixed = |flags| [0x1f, 0x8b, 8, flags, 0, 0, 0, 0, 0, 255];
        let with = |flags, rest: &[u8]| length(&[&fixed(flags)[..], rest].concat());
        assert_eq!(with(0, b""), Some(10));
        assert_eq!(with(NAME, b"name\0rest"), Some(15));
        assert_eq!(with(EXTRA | COMMENT, b"\x02\0xy\0"), Some(15));
        assert_eq!(with(EXTRA, b"\0\0"), Some(12));
        assert_eq!(
            with(EXTRA | NAME | COMMENT | HEADER_CRC, b"\x01\0xa\0b\0cc.."),
            Some(19)
        );
        assert_eq!(with(NAME, b"endless"), None);
        assert_eq!(with(0x80, b""), None);
        assert_eq!(length(b"\x1f\x8b\x07"), None);
    }
}
