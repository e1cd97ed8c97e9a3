//! Directory listings and their indexes.

use super::{Fields, FormatError, MAX_DIR_RUN, MAX_NAME, put16, put32};
use crate::format::inode::InodeType;

/// The head of a run of entries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirHeader {
    /// Entries that follow, 1 to 256 (stored less one).
    pub count: u32,
    /// The metadata block their inodes begin in, from the start of the inode table.
    pub inode_block: u32,
    /// What the entries' inode number differences are added to.
    pub inode_number: u32,
}

impl DirHeader {
    /// Bytes on disk.
    pub const LEN: usize = 12;

    /// Appends the head.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put32(out, self.count - 1);
        put32(out, self.inode_block);
        put32(out, self.inode_number);
    }

    /// Refuses a run of more than 256.
    pub fn decode(bytes: &[u8]) -> Result<Self, FormatError> {
        let mut f = Fields::new("directory header", bytes, Self::LEN)?;
        let count = f.u32()?;
        if count as usize >= MAX_DIR_RUN {
            return Err(FormatError::Value {
                what: "directory run",
                value: u64::from(count),
            });
        }
        Ok(Self {
            count: count + 1,
            inode_block: f.u32()?,
            inode_number: f.u32()?,
        })
    }
}

/// One name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirEntry<'a> {
    /// Offset of the inode in the header's metadata block.
    pub inode_offset: u16,
    /// Inode number less the header's.
    pub inode_delta: i16,
    /// The inode's kind; always the basic type, also for extended inodes.
    pub kind: InodeType,
    /// 1 to 255 bytes, without `/` and NUL, not `.` or `..`.
    pub name: &'a [u8],
}

impl<'a> DirEntry<'a> {
    /// Bytes on disk before the name.
    pub const FIXED_LEN: usize = 8;

    /// Appends the entry.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put16(out, self.inode_offset);
        out.extend_from_slice(&self.inode_delta.to_le_bytes());
        put16(out, self.kind as u16);
        put16(out, (self.name.len() - 1) as u16);
        out.extend_from_slice(self.name);
    }

    /// Bytes of the whole entry, from its first 8.
    pub fn len_of(fixed: &[u8]) -> Result<usize, FormatError> {
        let mut f = Fields::new("directory entry", fixed, Self::FIXED_LEN)?;
        f.take(6)?;
        let len = usize::from(f.u16()?) + 1;
        if len > MAX_NAME {
            return Err(FormatError::Value {
                what: "name length",
                value: len as u64,
            });
        }
        Ok(Self::FIXED_LEN + len)
    }

    /// Reads an entry and checks its name by [`check_name`]; the entry's length is
    /// `FIXED_LEN + name.len()`.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, FormatError> {
        let len = Self::len_of(bytes)?;
        let mut f = Fields::new("directory entry", bytes, len)?;
        let (inode_offset, inode_delta, raw) = (f.u16()?, f.i16()?, f.u16()?);
        f.take(2)?;
        let kind = InodeType::from_raw(raw)
            .filter(|kind| !kind.is_extended())
            .ok_or(FormatError::Value {
                what: "directory entry kind",
                value: u64::from(raw),
            })?;
        let name = f.take(len - Self::FIXED_LEN)?;
        if !check_name(name) {
            return Err(FormatError::Value {
                what: "name of length",
                value: name.len() as u64,
            });
        }
        Ok(Self {
            inode_offset,
            inode_delta,
            kind,
            name,
        })
    }
}

/// Whether a name may be an entry's: 1 to 255 bytes, no `/`, no NUL, not `.` or `..`.
pub fn check_name(name: &[u8]) -> bool {
    !name.is_empty()
        && name.len() <= MAX_NAME
        && name != b"."
        && name != b".."
        && !name.iter().any(|&b| b == b'/' || b == 0)
}

/// One entry of a big folder's index: names from `name` on are found from here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirIndex<'a> {
    /// Offset in the listing (before compression) of the header whose first entry is `name`.
    pub listing_offset: u32,
    /// The metadata block that header begins in, from the start of the directory table.
    pub block: u32,
    /// First name of that run.
    pub name: &'a [u8],
}

impl<'a> DirIndex<'a> {
    /// Bytes on disk before the name.
    pub const FIXED_LEN: usize = 12;

    /// Appends the entry.
    pub fn encode(&self, out: &mut Vec<u8>) {
        put32(out, self.listing_offset);
        put32(out, self.block);
        put32(out, (self.name.len() - 1) as u32);
        out.extend_from_slice(self.name);
    }

    /// Bytes of the whole entry, from its first 12.
    pub fn len_of(fixed: &[u8]) -> Result<usize, FormatError> {
        let mut f = Fields::new("directory index", fixed, Self::FIXED_LEN)?;
        f.take(8)?;
        let raw = f.u32()?;
        if raw as usize >= MAX_NAME {
            return Err(FormatError::Value {
                what: "index name length",
                value: u64::from(raw),
            });
        }
        Ok(Self::FIXED_LEN + raw as usize + 1)
    }

    /// Reads an entry; its length is `FIXED_LEN + name.len()`.
    pub fn decode(bytes: &'a [u8]) -> Result<Self, FormatError> {
        let len = Self::len_of(bytes)?;
        let mut f = Fields::new("directory index", bytes, len)?;
        let (listing_offset, block) = (f.u32()?, f.u32()?);
        f.take(4)?;
        Ok(Self {
            listing_offset,
            block,
            name: f.take(len - Self::FIXED_LEN)?,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_back() {
        let mut out = Vec::new();
        let header = DirHeader {
            count: 256,
            inode_block: 4,
            inode_number: 9,
        };
        header.encode(&mut out);
        assert_eq!(DirHeader::decode(&out), Ok(header));
        out[..4].copy_from_slice(&256u32.to_le_bytes());
        assert!(DirHeader::decode(&out).is_err());

        out.clear();
        let entry = DirEntry {
            inode_offset: 7,
            inode_delta: -3,
            kind: InodeType::Fifo,
            name: b"n\xff",
        };
        entry.encode(&mut out);
        assert_eq!(DirEntry::decode(&out), Ok(entry));
        for cut in 0..out.len() {
            assert!(DirEntry::decode(&out[..cut]).is_err());
        }

        out.clear();
        let index = DirIndex {
            listing_offset: 8192,
            block: 100,
            name: b"m",
        };
        index.encode(&mut out);
        assert_eq!(DirIndex::decode(&out), Ok(index));
        out[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(DirIndex::decode(&out).is_err());
    }

    #[test]
    fn bad_names_and_kinds_are_refused() {
        for name in [&b"."[..], b"..", b"a/b", b"a\0"] {
            let mut out = Vec::new();
            DirEntry {
                inode_offset: 0,
                inode_delta: 0,
                kind: InodeType::File,
                name,
            }
            .encode(&mut out);
            assert!(DirEntry::decode(&out).is_err());
        }
        let mut out = Vec::new();
        DirEntry {
            inode_offset: 0,
            inode_delta: 0,
            kind: InodeType::ExtFile,
            name: b"x",
        }
        .encode(&mut out);
        assert!(DirEntry::decode(&out).is_err());
    }
}
