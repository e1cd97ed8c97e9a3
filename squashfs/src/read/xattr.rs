//! Extended attributes: sets of name and value, shared by the inodes that have the same.

use super::Reader;
use super::error::ReadError;
use super::inode::Inode;
use super::meta::{Fields, MetaCursor, MetaPos, Region};
use super::source::ReadAt;
use crate::format::METADATA_SIZE;

/// Longest list of names the kernel passes on (XATTR_LIST_MAX).
const LIST_MAX: usize = 65536;
/// Longest value (XATTR_SIZE_MAX).
pub(crate) const VALUE_MAX: u32 = 65536;
/// Longest name (XATTR_NAME_MAX).
pub(crate) const XATTR_NAME_MAX: usize = 255;
/// The value is a reference to where it is stored.
pub(crate) const OUT_OF_LINE: u16 = 0x100;
const SET_ENTRY_SIZE: u32 = 16;
const SETS_PER_BLOCK: u32 = METADATA_SIZE as u32 / SET_ENTRY_SIZE;

/// The xattr tables of an image that has them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct XattrTable {
    /// Names and values.
    pub(crate) pairs: Region,
    /// Number of sets.
    pub(crate) count: u32,
    /// Where the array of pointers to the set table's blocks starts.
    pub(crate) pointers: u64,
}

/// Where a set lies.
#[derive(Debug, Clone, Copy)]
pub(crate) struct XattrSet {
    pub(crate) start: MetaPos,
    pub(crate) count: u32,
    pub(crate) size: u32,
}

/// The namespace in front of a name.
pub(crate) fn prefix(kind: u16) -> Option<&'static [u8]> {
    match kind & !OUT_OF_LINE {
        0 => Some(b"user."),
        1 => Some(b"trusted."),
        2 => Some(b"security."),
        _ => None,
    }
}

impl<S: ReadAt> Reader<S> {
    /// Names of an inode's extended attributes, with their namespaces.
    pub fn xattr_names(&self, inode: &Inode) -> Result<Vec<Vec<u8>>, ReadError> {
        let mut names = Vec::new();
        let mut total = 0;
        if let Some(mut pairs) = self.xattr_pairs(inode)? {
            while let Some(name) = pairs.next_name()? {
                total += name.len() + 1;
                if total > LIST_MAX {
                    return Err(ReadError::corrupt("list of xattrs", inode.reference.0));
                }
                pairs.skip_value()?;
                names.push(name);
            }
        }
        Ok(names)
    }

    /// The value of the extended attribute `name` (with its namespace), if the inode has it.
    pub fn xattr(&self, inode: &Inode, name: &[u8]) -> Result<Option<Vec<u8>>, ReadError> {
        if let Some(mut pairs) = self.xattr_pairs(inode)? {
            while let Some(found) = pairs.next_name()? {
                if found == name {
                    return pairs.value().map(Some);
                }
                pairs.skip_value()?;
            }
        }
        Ok(None)
    }

    fn xattr_pairs(&self, inode: &Inode) -> Result<Option<XattrPairs<'_, S>>, ReadError> {
        let Some(table) = self.xattrs else {
            return Ok(None);
        };
        let Some(index) = self.xattr_index(inode)? else {
            return Ok(None);
        };
        let set = self.xattr_set(table, index)?;
        self.pairs_of(table, set).map(Some)
    }

    pub(crate) fn xattr_set(&self, table: XattrTable, index: u32) -> Result<XattrSet, ReadError> {
        if index >= table.count {
            return Err(ReadError::corrupt("xattr index", u64::from(index)));
        }
        let block = self.pointer(table.pointers, u64::from(index / SETS_PER_BLOCK))?;
        let region = Region {
            start: table.pairs.start,
            end: table.pointers,
        };
        let mut cursor = self.cursor(
            region,
            MetaPos {
                block,
                offset: index % SETS_PER_BLOCK * SET_ENTRY_SIZE,
            },
        )?;
        let entry = cursor.fields::<16>()?;
        Ok(XattrSet {
            start: pair_pos(table, entry.u64(0))?,
            count: entry.u32(8),
            size: entry.u32(12),
        })
    }

    pub(crate) fn pairs_of(
        &self,
        table: XattrTable,
        set: XattrSet,
    ) -> Result<XattrPairs<'_, S>, ReadError> {
        // The shortest pair is a head, a name of one byte and a value's length: more than fit in a full list of
        // names is a lie that would cost time.
        if set.count as usize > LIST_MAX / 2 {
            return Err(ReadError::corrupt("count of xattrs", set.start.block));
        }
        Ok(XattrPairs {
            cursor: self.cursor(table.pairs, set.start)?,
            reader: self,
            table,
            left: set.count,
            out_of_line: false,
        })
    }
}

fn pair_pos(table: XattrTable, reference: u64) -> Result<MetaPos, ReadError> {
    let block = table
        .pairs
        .start
        .checked_add(reference >> 16)
        .ok_or_else(|| ReadError::corrupt("xattr reference", reference))?;
    Ok(MetaPos {
        block,
        offset: (reference & 0xffff) as u32,
    })
}

/// Reads a set: a name, then its value taken or skipped, and so on.
pub(crate) struct XattrPairs<'a, S> {
    cursor: MetaCursor<'a, S>,
    reader: &'a Reader<S>,
    table: XattrTable,
    left: u32,
    out_of_line: bool,
}

impl<S: ReadAt> XattrPairs<'_, S> {
    /// The next pair's full name; its value must be taken or skipped before the next call.
    pub(crate) fn next_name(&mut self) -> Result<Option<Vec<u8>>, ReadError> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        let head: Fields<4> = self.cursor.fields()?;
        let corrupt = |what| ReadError::corrupt(what, u64::from(head.u16(0)));
        let kind = head.u16(0);
        let prefix = prefix(kind).ok_or_else(|| corrupt("xattr namespace"))?;
        self.out_of_line = kind & OUT_OF_LINE != 0;
        let len = usize::from(head.u16(2));
        if len == 0 || prefix.len() + len > XATTR_NAME_MAX {
            return Err(corrupt("xattr name length"));
        }
        let mut name = prefix.to_vec();
        name.resize(prefix.len() + len, 0);
        self.cursor.read(&mut name[prefix.len()..])?;
        if name.contains(&0) {
            return Err(corrupt("NUL in an xattr name"));
        }
        Ok(Some(name))
    }

    pub(crate) fn skip_value(&mut self) -> Result<(), ReadError> {
        let len = self.value_len()?;
        self.cursor.skip(u64::from(len))
    }

    pub(crate) fn value(&mut self) -> Result<Vec<u8>, ReadError> {
        let len = self.value_len()?;
        if !self.out_of_line {
            let mut value = vec![0u8; len as usize];
            self.cursor.read(&mut value)?;
            return Ok(value);
        }
        if len != 8 {
            return Err(ReadError::corrupt("xattr value reference", u64::from(len)));
        }
        let reference = self.cursor.fields::<8>()?.u64(0);
        let mut away = self
            .reader
            .cursor(self.table.pairs, pair_pos(self.table, reference)?)?;
        let len = away.fields::<4>()?.u32(0);
        if len > VALUE_MAX {
            return Err(ReadError::corrupt("xattr value length", u64::from(len)));
        }
        let mut value = vec![0u8; len as usize];
        away.read(&mut value)?;
        Ok(value)
    }

    fn value_len(&mut self) -> Result<u32, ReadError> {
        let len = self.cursor.fields::<4>()?.u32(0);
        if len > VALUE_MAX {
            return Err(ReadError::corrupt("xattr value length", u64::from(len)));
        }
        Ok(len)
    }
}
