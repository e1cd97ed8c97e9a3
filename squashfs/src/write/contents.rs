//! Where the contents of files ended up: what the tables are made from.

use super::output::Output;
use super::{FileHandle, WriteError};
use crate::format::{FragmentEntry, NO_FRAGMENT};

/// Where a file's contents are.
#[derive(Debug, Clone, Copy)]
pub(super) struct FileRecord {
    pub(super) size: u64,
    pub(super) start: u64,
    /// Index into the list of block sizes; or fragment and offset in it, for a file smaller than a block.
    pub(super) place: u64,
}

impl FileRecord {
    /// Of a file without contents.
    pub(super) const NONE: Self = Self {
        size: 0,
        start: 0,
        place: 0,
    };
}

/// All that the tables need to know about contents.
#[derive(Debug)]
pub(super) struct Appended {
    pub(super) output: Output,
    pub(super) fragments: Vec<FragmentEntry>,
    pub(super) files: Vec<Vec<FileRecord>>,
    pub(super) sizes: Vec<u32>,
}

/// A file's place, as its inode wants it.
pub(super) struct Contents<'a> {
    pub(super) size: u64,
    pub(super) start: u64,
    pub(super) fragment: u32,
    pub(super) fragment_offset: u32,
    pub(super) blocks: &'a [u32],
}

impl Appended {
    pub(super) fn contents(
        &self,
        handle: FileHandle,
        block_size: u32,
    ) -> Result<Contents<'_>, WriteError> {
        if handle == FileHandle::EMPTY {
            return Ok(Contents {
                size: 0,
                start: 0,
                fragment: NO_FRAGMENT,
                fragment_offset: 0,
                blocks: &[],
            });
        }
        let lane = self.files.get(handle.lane as usize);
        let record = lane
            .and_then(|files| files.get(handle.index as usize))
            .ok_or(WriteError::UnknownHandle)?;
        let FileRecord { size, start, place } = *record;
        if size == 0 {
            return Ok(Contents {
                size,
                start: 0,
                fragment: NO_FRAGMENT,
                fragment_offset: 0,
                blocks: &[],
            });
        }
        if size < u64::from(block_size) {
            let (fragment, fragment_offset) = ((place >> 32) as u32, place as u32);
            return Ok(Contents {
                size,
                start: 0,
                fragment,
                fragment_offset,
                blocks: &[],
            });
        }
        let (first, count) = (
            place as usize,
            size.div_ceil(u64::from(block_size)) as usize,
        );
        let blocks = &self.sizes[first..first + count];
        Ok(Contents {
            size,
            start,
            fragment: NO_FRAGMENT,
            fragment_offset: 0,
            blocks,
        })
    }
}
