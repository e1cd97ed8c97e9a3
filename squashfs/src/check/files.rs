//! Files: block lists, fragments, and on demand all contents.

use super::inodes::Inodes;
use super::layout::Layout;
use super::{CheckError, In};
use crate::format::{BlockSize, FileInode, InodeBody, NO_FRAGMENT};
use crate::read::{Inode, MetaCursor, ReadAt, Reader};

/// Reads the block list under `cursor`, leaving it behind the list.
pub(super) fn check_file<S: ReadAt>(
    reader: &Reader<S>,
    layout: &Layout,
    inode: &Inode,
    file: &FileInode,
    cursor: &mut MetaCursor<'_, S>,
) -> Result<(), CheckError> {
    let part = || format!("inode {}", inode.number);
    let broken = |rule| Err(CheckError::broken(part(), rule));
    let sb = reader.superblock();
    let block_size = u64::from(sb.block_size);
    if file.sparse > file.size {
        return broken("it has more holes than bytes");
    }
    let mut at = file.start;
    let mut left = file.size;
    for _ in 0..file.block_count(sb.block_size) {
        let raw = u32::from_le_bytes(cursor.bytes().within(part)?);
        let size = BlockSize(raw).check(sb.block_size).within(part)?;
        let decoded = left.min(block_size);
        if size.is_hole() && raw != 0 {
            return broken("a block is stored in no bytes");
        }
        if !size.is_hole() {
            if !size.compressed() && u64::from(size.stored()) != decoded {
                return broken("a block that is stored as it is has another length than its file");
            }
            if at < layout.data.start {
                return broken("a block lies outside the data area");
            }
            at += u64::from(size.stored());
            if at > layout.data.end {
                return broken("a block lies outside the data area");
            }
        }
        left -= decoded;
    }
    if file.fragment == NO_FRAGMENT {
        return Ok(());
    }
    if file.fragment >= sb.fragment_count {
        return broken("its fragment does not exist");
    }
    if left == 0 {
        return broken("it has a fragment and no tail to put there");
    }
    if u64::from(file.fragment_offset) + left > block_size {
        return broken("its tail reaches beyond a fragment block");
    }
    Ok(())
}

pub(super) fn check_fragments<S: ReadAt>(
    reader: &Reader<S>,
    layout: &Layout,
) -> Result<(), CheckError> {
    let sb = reader.superblock();
    for index in 0..sb.fragment_count {
        let part = || format!("fragment {index}");
        let stored = reader.fragment(index).within(part)?;
        let len = stored.size.check(sb.block_size).within(part)?.stored();
        let end = stored.at.checked_add(u64::from(len));
        if stored.at < layout.data.start || end.is_none_or(|end| end > layout.data.end) {
            return Err(CheckError::broken(part(), "it lies outside the data area"));
        }
    }
    Ok(())
}

/// Reads every file to its end.
pub(super) fn read_back<S: ReadAt>(reader: &Reader<S>, table: &Inodes) -> Result<(), CheckError> {
    let mut buffer = vec![0u8; reader.superblock().block_size as usize];
    for number in 1..=reader.superblock().inode_count {
        let part = || format!("inode {number}");
        let inode = reader.inode(table.reference(number)).within(part)?;
        if let InodeBody::File(file) = &inode.body {
            let mut at = 0;
            while at < file.size {
                at += reader.read(&inode, at, &mut buffer).within(part)? as u64;
            }
        }
    }
    Ok(())
}
