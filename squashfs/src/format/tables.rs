//! The small records: references, headers of metadata blocks, fragments, xattrs.

use super::{Fields, FormatError, METADATA_SIZE, put16, put32, put64};

/// A place in a table of metadata blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MetaRef {
    /// Offset of the block's header from the start of the table; 48 bits.
    pub block: u64,
    /// Offset in the block after decompression; below 8,192.
    pub offset: u16,
}

impl MetaRef {
    /// The 64-bit form.
    pub fn to_raw(self) -> u64 {
        self.block << 16 | u64::from(self.offset)
    }

    /// Refuses an offset that no metadata block has.
    pub fn from_raw(raw: u64) -> Result<Self, FormatError> {
        let offset = (raw & 0xffff) as u16;
        if usize::from(offset) >= METADATA_SIZE {
            return Err(FormatError::Value {
                what: "metadata reference",
                value: raw,
            });
        }
        Ok(Self {
            block: raw >> 16,
            offset,
        })
    }
}

/// The u16 before every metadata block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MetaHeader {
    /// Stored bytes that follow, 1 to 8,192.
    pub size: u16,
    /// Whether they are compressed.
    pub compressed: bool,
}

impl MetaHeader {
    /// Bytes on disk.
    pub const LEN: usize = 2;

    /// The raw form; bit 15 says "stored as it is".
    pub fn to_raw(self) -> u16 {
        self.size | if self.compressed { 0 } else { 0x8000 }
    }

    /// Refuses sizes beyond a metadata block. A raw size of 0 means 32,768 to old writers: refused too.
    pub fn from_raw(raw: u16) -> Result<Self, FormatError> {
        let size = raw & 0x7fff;
        if size == 0 || usize::from(size) > METADATA_SIZE {
            return Err(FormatError::Value {
                what: "metadata block size",
                value: u64::from(raw),
            });
        }
        Ok(Self {
            size,
            compressed: raw & 0x8000 == 0,
        })
    }
}

/// The u32 that tells how a data or fragment block is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct BlockSize(pub u32);

impl BlockSize {
    const UNCOMPRESSED: u32 = 1 << 24;
    /// A block of zeros that takes no bytes.
    pub const HOLE: Self = Self(0);

    /// A block of `stored` bytes (below 16 MiB).
    pub fn new(stored: u32, compressed: bool) -> Self {
        debug_assert!(stored < Self::UNCOMPRESSED);
        Self(stored | if compressed { 0 } else { Self::UNCOMPRESSED })
    }

    /// Bytes in the image.
    pub fn stored(self) -> u32 {
        self.0 & (Self::UNCOMPRESSED - 1)
    }

    /// Whether these are compressed.
    pub fn compressed(self) -> bool {
        self.0 & Self::UNCOMPRESSED == 0
    }

    /// Whether the block is a hole.
    pub fn is_hole(self) -> bool {
        self.stored() == 0
    }

    /// Refuses a block that is stored longer than `block_size`, or has unknown bits.
    pub fn check(self, block_size: u32) -> Result<Self, FormatError> {
        if self.0 >> 25 != 0 || self.stored() > block_size {
            return Err(FormatError::Value {
                what: "data block size",
                value: u64::from(self.0),
            });
        }
        Ok(self)
    }
}

/// One fragment block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FragmentEntry {
    /// Where it begins in the image.
    pub start: u64,
    /// How it is stored.
    pub size: BlockSize,
}

impl FragmentEntry {
    /// Bytes on disk; 512 fit a metadata block.
    pub const LEN: usize = 16;

    /// Appends the record.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put64(out, self.start);
        put32(out, self.size.0);
        put32(out, 0);
    }

    /// Reads a record.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut f = Fields::new("fragment entry", bytes, Self::LEN)?;
        Ok(Self {
            start: f.u64()?,
            size: BlockSize(f.u32()?),
        })
    }
}

/// The name spaces of xattrs that the format knows; others cannot be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum XattrPrefix {
    /// `user.`
    User = 0,
    /// `trusted.`
    Trusted = 1,
    /// `security.`
    Security = 2,
}

impl XattrPrefix {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::User, Self::Trusted, Self::Security];

    /// The text, dot included.
    pub fn as_bytes(self) -> &'static [u8] {
        match self {
            Self::User => b"user.",
            Self::Trusted => b"trusted.",
            Self::Security => b"security.",
        }
    }

    /// Splits a full name; `None` when the format has no such name space or nothing follows it.
    pub fn split(name: &[u8]) -> Option<(Self, &[u8])> {
        Self::ALL
            .into_iter()
            .find_map(|p| Some((p, name.strip_prefix(p.as_bytes())?)))
            .filter(|(_, rest)| !rest.is_empty())
    }
}

/// The head of one key in the key/value table: this, the name without prefix, then a u32 length and the
/// value. When `out_of_line`, the length is 8 and the value is a raw [`MetaRef`] (from the start of the
/// key/value table) to a u32 length and the value proper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XattrEntry {
    /// Name space.
    pub prefix: XattrPrefix,
    /// Whether the value is stored elsewhere.
    pub out_of_line: bool,
    /// Bytes of the name that follow.
    pub name_len: u16,
}

impl XattrEntry {
    /// Bytes on disk without the name.
    pub const LEN: usize = 4;
    const OUT_OF_LINE: u16 = 0x0100;

    /// Appends the head.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put16(
            out,
            self.prefix as u16
                | if self.out_of_line {
                    Self::OUT_OF_LINE
                } else {
                    0
                },
        );
        put16(out, self.name_len);
    }

    /// Reads a head; an unknown name space is an error.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut f = Fields::new("xattr entry", bytes, Self::LEN)?;
        let (raw, name_len) = (f.u16()?, f.u16()?);
        let prefix = match raw & !Self::OUT_OF_LINE {
            0 => XattrPrefix::User,
            1 => XattrPrefix::Trusted,
            2 => XattrPrefix::Security,
            _ => {
                return Err(FormatError::Value {
                    what: "xattr name space",
                    value: u64::from(raw),
                });
            }
        };
        Ok(Self {
            prefix,
            out_of_line: raw & Self::OUT_OF_LINE != 0,
            name_len,
        })
    }
}

/// One set of xattrs; an inode names it by its index.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XattrId {
    /// Where its keys begin, from the start of the key/value table.
    pub start: MetaRef,
    /// Keys in the set.
    pub count: u32,
    /// Bytes `listxattr` answers: full names, each with a NUL.
    pub size: u32,
}

impl XattrId {
    /// Bytes on disk; 512 fit a metadata block.
    pub const LEN: usize = 16;

    /// Appends the record.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put64(out, self.start.to_raw());
        put32(out, self.count);
        put32(out, self.size);
    }

    /// Reads a record.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut f = Fields::new("xattr id", bytes, Self::LEN)?;
        Ok(Self {
            start: MetaRef::from_raw(f.u64()?)?,
            count: f.u32()?,
            size: f.u32()?,
        })
    }
}

/// What the superblock's `xattr_table` points to; the u64 list of the ids' metadata blocks follows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct XattrIdTable {
    /// Absolute offset of the first key/value metadata block.
    pub key_values: u64,
    /// Number of sets.
    pub count: u32,
}

impl XattrIdTable {
    /// Bytes on disk without the list.
    pub const LEN: usize = 16;

    /// Appends the record.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put64(out, self.key_values);
        put32(out, self.count);
        put32(out, 0);
    }

    /// Reads a record.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut f = Fields::new("xattr id table", bytes, Self::LEN)?;
        Ok(Self {
            key_values: f.u64()?,
            count: f.u32()?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_and_short_ones_do_not() {
        let mut out = Vec::new();
        let frag = FragmentEntry {
            start: 1 << 40,
            size: BlockSize::new(77, false),
        };
        frag.encode(&mut out);
        assert_eq!(FragmentEntry::decode(&out), Ok(frag));
        assert!(FragmentEntry::decode(&out[..15]).is_err());

        out.clear();
        let id = XattrId {
            start: MetaRef {
                block: 99,
                offset: 8191,
            },
            count: 3,
            size: 40,
        };
        id.encode(&mut out);
        assert_eq!(XattrId::decode(&out), Ok(id));

        out.clear();
        let key = XattrEntry {
            prefix: XattrPrefix::Security,
            out_of_line: true,
            name_len: 9,
        };
        key.encode(&mut out);
        assert_eq!(XattrEntry::decode(&out), Ok(key));
        assert!(XattrEntry::decode(&[3, 0, 0, 0]).is_err());

        out.clear();
        let table = XattrIdTable {
            key_values: 5,
            count: 6,
        };
        table.encode(&mut out);
        assert_eq!(XattrIdTable::decode(&out), Ok(table));
    }

    #[test]
    fn references_and_headers_have_limits() {
        assert!(MetaRef::from_raw(8192).is_err());
        assert_eq!(
            MetaRef::from_raw(5 << 16 | 8191),
            Ok(MetaRef {
                block: 5,
                offset: 8191
            })
        );
        assert!(MetaHeader::from_raw(0).is_err());
        assert!(MetaHeader::from_raw(8193).is_err());
        assert_eq!(
            MetaHeader::from_raw(0x8000 | 8192),
            Ok(MetaHeader {
                size: 8192,
                compressed: false
            })
        );
        assert!(BlockSize(131_073).check(131_072).is_err());
        assert!(BlockSize(1 << 25).check(131_072).is_err());
        assert!(BlockSize::new(131_072, false).check(131_072).is_ok());
    }

    #[test]
    fn xattr_names_are_split() {
        assert_eq!(
            XattrPrefix::split(b"user.a"),
            Some((XattrPrefix::User, &b"a"[..]))
        );
        assert_eq!(XattrPrefix::split(b"user."), None);
        assert_eq!(XattrPrefix::split(b"system.posix_acl_access"), None);
    }
}
