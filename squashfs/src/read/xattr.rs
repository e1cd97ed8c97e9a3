//! Extended attributes: sets of name and value, shared by the inodes that have the same.

use super::Reader;
use super::error::ReadError;
use super::inode::Inode;
use super::meta::{LookupTable, MetaCursor, MetaPos, Region};
use super::source::ReadAt;
use crate::format::{MetaRef, XattrEntry, XattrId};

/// Longest list of names the kernel passes on (XATTR_LIST_MAX).
pub(crate) const LIST_MAX: usize = 65536;
/// Longest value (XATTR_SIZE_MAX).
pub(crate) const VALUE_MAX: u32 = 65536;
/// Longest name (XATTR_NAME_MAX).
pub(crate) const XATTR_NAME_MAX: usize = 255;

/// The xattr tables of an image that has them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct XattrTable {
    /// Names and values.
    pub(crate) pairs: Region,
    /// The sets.
    pub(crate) sets: LookupTable,
    /// Number of sets.
    pub(crate) count: u32,
}

impl<S: ReadAt> Reader<S> {
    /// Whether any inode of the image can have extended attributes.
    pub fn has_xattrs(&self) -> bool {
        self.xattrs.is_some_and(|table| table.count > 0)
    }

    /// Names of an inode's extended attributes, with their namespaces.
    pub fn xattr_names(&self, inode: &Inode) -> Result<Vec<Vec<u8>>, ReadError> {
        let mut names = Vec::new();
        let mut total = 0;
        if let Some(mut pairs) = self.xattr_pairs(inode)? {
            while let Some(name) = pairs.next_name()? {
                total += name.len() + 1;
                if total > LIST_MAX {
                    return Err(ReadError::corrupt(
                        "list of xattrs",
                        inode.reference.to_raw(),
                    ));
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

    pub(crate) fn xattr_set(&self, table: XattrTable, index: u32) -> Result<XattrId, ReadError> {
        if index >= table.count {
            return Err(ReadError::corrupt("xattr index", u64::from(index)));
        }
        let bytes = self.lookup::<{ XattrId::LEN }>(table.sets, u64::from(index))?;
        Ok(XattrId::decode(&bytes)?)
    }

    pub(crate) fn pairs_of(
        &self,
        table: XattrTable,
        set: XattrId,
    ) -> Result<XattrPairs<'_, S>, ReadError> {
        // The shortest pair is a head, a name of one byte and a value's length: more than fit in a full list of
        // names is a lie that would cost time.
        if set.count as usize > LIST_MAX / 2 {
            return Err(ReadError::corrupt("count of xattrs", u64::from(set.count)));
        }
        Ok(XattrPairs {
            cursor: self.cursor(table.pairs, pair_pos(table, set.start)?)?,
            reader: self,
            table,
            left: set.count,
            out_of_line: false,
        })
    }
}

fn pair_pos(table: XattrTable, reference: MetaRef) -> Result<MetaPos, ReadError> {
    let block = table
        .pairs
        .start
        .checked_add(reference.block)
        .ok_or_else(|| ReadError::corrupt("xattr reference", reference.to_raw()))?;
    Ok(MetaPos {
        block,
        offset: u32::from(reference.offset),
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

impl<'a, S: ReadAt> XattrPairs<'a, S> {
    /// The next pair's full name; its value must be taken or skipped before the next call.
    pub(crate) fn next_name(&mut self) -> Result<Option<Vec<u8>>, ReadError> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        let entry = XattrEntry::decode(&self.cursor.bytes::<{ XattrEntry::LEN }>()?)?;
        self.out_of_line = entry.out_of_line;
        let mut name = entry.prefix.as_bytes().to_vec();
        let (prefix, len) = (name.len(), usize::from(entry.name_len));
        if len == 0 || prefix + len > XATTR_NAME_MAX {
            return Err(ReadError::corrupt("xattr name length", len as u64));
        }
        name.resize(prefix + len, 0);
        self.cursor.read(&mut name[prefix..])?;
        if name.contains(&0) {
            return Err(ReadError::corrupt("NUL in an xattr name", 0));
        }
        Ok(Some(name))
    }

    pub(crate) fn skip_value(&mut self) -> Result<(), ReadError> {
        let len = self.value_len()?;
        self.cursor.skip(u64::from(len))
    }

    pub(crate) fn value(&mut self) -> Result<Vec<u8>, ReadError> {
        let (mut away, len) = self.open_value()?;
        let mut value = vec![0u8; len as usize];
        away.as_mut().unwrap_or(&mut self.cursor).read(&mut value)?;
        Ok(value)
    }

    /// Skips a value, having looked that it is all there.
    pub(crate) fn check_value(&mut self) -> Result<(), ReadError> {
        let (mut away, len) = self.open_value()?;
        away.as_mut()
            .unwrap_or(&mut self.cursor)
            .skip(u64::from(len))
    }

    /// The value's length, and where its bytes are if not under the cursor.
    fn open_value(&mut self) -> Result<(Option<MetaCursor<'a, S>>, u32), ReadError> {
        let len = self.value_len()?;
        if !self.out_of_line {
            return Ok((None, len));
        }
        if len != 8 {
            return Err(ReadError::corrupt("xattr value reference", u64::from(len)));
        }
        let reference = MetaRef::from_raw(u64::from_le_bytes(self.cursor.bytes()?))?;
        let mut away = self
            .reader
            .cursor(self.table.pairs, pair_pos(self.table, reference)?)?;
        let len = u32::from_le_bytes(away.bytes()?);
        if len > VALUE_MAX {
            return Err(ReadError::corrupt("xattr value length", u64::from(len)));
        }
        Ok((Some(away), len))
    }

    fn value_len(&mut self) -> Result<u32, ReadError> {
        let len = u32::from_le_bytes(self.cursor.bytes()?);
        if len > VALUE_MAX {
            return Err(ReadError::corrupt("xattr value length", u64::from(len)));
        }
        Ok(len)
    }
}
