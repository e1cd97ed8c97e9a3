//! Folders: listing, resuming a listing, and finding a name.
//!
//! A listing is a sequence of runs: a head (count, inode table block, base inode number) and up to 256 entries whose
//! inodes share that block. A position in it is the byte offset of an entry; the run it belongs to is found by walking
//! from the listing's start or from the folder's index (one entry per 8 KiB), so that a position is all that need be
//! remembered, and one that names no entry is never taken for one.

use super::Reader;
use super::error::ReadError;
use super::inode::Inode;
use super::meta::{MetaCursor, MetaPos};
use super::source::ReadAt;
use crate::format::{
    self, DirHeader, DirIndex, DirInode, InodeType, MAX_NAME, METADATA_SIZE, MetaRef,
};

/// One name in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name: no '/', no NUL, neither `.` nor `..`; any other bytes.
    pub name: Vec<u8>,
    /// Its inode.
    pub inode: MetaRef,
    /// Its inode's number.
    pub number: u32,
    /// Its inode's basic type.
    pub file_type: InodeType,
    /// Position of the entry after this one: give it to [`DirStream::seek`] to go on there.
    pub next: u32,
}

/// A listing being read.
pub struct DirStream<'a, S> {
    cursor: Option<MetaCursor<'a, S>>,
    reader: &'a Reader<S>,
    dir: DirInode,
    /// Where the folder's index lies.
    index: MetaPos,
    /// Bytes of the listing already read.
    at: u32,
    /// Bytes of the whole listing.
    len: u32,
    /// What is left of the current run.
    run: DirHeader,
}

const NO_RUN: DirHeader = DirHeader {
    count: 0,
    inode_block: 0,
    inode_number: 0,
};

impl<S: std::fmt::Debug> std::fmt::Debug for DirStream<'_, S> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("DirStream")
            .field("dir", &self.dir)
            .field("at", &self.at)
            .finish_non_exhaustive()
    }
}

impl<S: ReadAt> Reader<S> {
    /// Lists a folder from its first entry, in the order of the names' bytes, without `.` and `..`.
    pub fn read_dir(&self, inode: &Inode) -> Result<DirStream<'_, S>, ReadError> {
        DirStream::new(self, *inode.as_dir()?, inode.tail)
    }

    /// The entry `name` of a folder, if there is one.
    pub fn find(&self, inode: &Inode, name: &[u8]) -> Result<Option<DirEntry>, ReadError> {
        let mut stream = self.read_dir(inode)?;
        if !format::check_name(name) {
            return Ok(None);
        }
        stream.skip_by_index(|_, first| first <= name)?;
        while let Some(entry) = stream.next_entry()? {
            match entry.name.as_slice().cmp(name) {
                std::cmp::Ordering::Less => {}
                std::cmp::Ordering::Equal => return Ok(Some(entry)),
                std::cmp::Ordering::Greater => return Ok(None),
            }
        }
        Ok(None)
    }

    pub(crate) fn dir_pos(&self, block: u32, offset: u16) -> MetaPos {
        MetaPos {
            block: self.dirs.start.saturating_add(u64::from(block)),
            offset: u32::from(offset),
        }
    }
}

impl<'a, S: ReadAt> DirStream<'a, S> {
    fn new(reader: &'a Reader<S>, dir: DirInode, index: MetaPos) -> Result<Self, ReadError> {
        let len = dir.listing_len();
        if u64::from(len) > reader.dirs.most_decoded() {
            return Err(ReadError::corrupt("folder size", u64::from(len)));
        }
        let cursor = match len {
            0 => None,
            _ => Some(reader.cursor(reader.dirs, reader.dir_pos(dir.block, dir.offset))?),
        };
        Ok(Self {
            cursor,
            reader,
            dir,
            index,
            at: 0,
            len,
            run: NO_RUN,
        })
    }

    /// Position of the entry that [`Self::next_entry`] gives next.
    pub fn position(&self) -> u32 {
        self.at
    }

    /// The next entry, or `None` at the end.
    pub fn next_entry(&mut self) -> Result<Option<DirEntry>, ReadError> {
        let mut buffer = EntryBuffer::default();
        let Some(entry) = self.next_into(&mut buffer)? else {
            return Ok(None);
        };
        Ok(Some(DirEntry {
            name: entry.name.to_vec(),
            inode: entry.inode,
            number: entry.number,
            file_type: entry.file_type,
            next: self.at,
        }))
    }

    /// Like [`Self::next_entry`], with the name in `buffer`: no allocation per entry.
    pub fn next_into<'b>(
        &mut self,
        buffer: &'b mut EntryBuffer,
    ) -> Result<Option<EntryView<'b>>, ReadError> {
        let Some(cursor) = &mut self.cursor else {
            return Ok(None);
        };
        if self.run.count == 0 {
            if self.at >= self.len {
                return Ok(None);
            }
            self.run = DirHeader::decode(&cursor.bytes::<{ DirHeader::LEN }>()?)?;
            self.at = self.at.saturating_add(DirHeader::LEN as u32);
        }
        const FIXED: usize = format::DirEntry::FIXED_LEN;
        cursor.read(&mut buffer.0[..FIXED])?;
        let len = format::DirEntry::len_of(&buffer.0[..FIXED])?;
        self.at = self.at.saturating_add(len as u32);
        if self.at > self.len {
            return Err(ReadError::corrupt(
                "directory entry outside its folder",
                u64::from(self.dir.block),
            ));
        }
        cursor.read(&mut buffer.0[FIXED..len])?;
        let entry = format::DirEntry::decode(&buffer.0[..len])?;
        self.run.count -= 1;
        Ok(Some(EntryView {
            name: entry.name,
            inode: MetaRef {
                block: u64::from(self.run.inode_block),
                offset: entry.inode_offset,
            },
            number: self
                .run
                .inode_number
                .wrapping_add_signed(i32::from(entry.inode_delta)),
            file_type: entry.kind,
        }))
    }

    /// When a run begins here: its position, and the block of the directory table that its head begins in.
    pub(crate) fn run_start(&mut self) -> Result<Option<(u32, u64)>, ReadError> {
        let (at, len, run) = (self.at, self.len, self.run.count);
        match &mut self.cursor {
            Some(cursor) if run == 0 && at < len => {
                cursor.settle()?;
                Ok(Some((at, cursor.pos().block)))
            }
            _ => Ok(None),
        }
    }

    /// Goes to the first entry at or after `position`, a value of [`DirEntry::next`] or 0.
    pub fn seek(&mut self, position: u32) -> Result<(), ReadError> {
        if position < self.at {
            *self = Self::new(self.reader, self.dir, self.index)?;
        }
        if position >= self.len {
            self.at = self.len;
            self.cursor = None;
            return Ok(());
        }
        self.skip_by_index(|start, _| start <= position)?;
        let mut buffer = EntryBuffer::default();
        while self.at < position {
            if self.next_into(&mut buffer)?.is_none() {
                break;
            }
        }
        Ok(())
    }

    /// Jumps to the last run in the folder's index for which `before(its position, its first name)` holds.
    fn skip_by_index(&mut self, before: impl Fn(u32, &[u8]) -> bool) -> Result<(), ReadError> {
        if self.dir.index_count == 0 || self.cursor.is_none() {
            return Ok(());
        }
        let mut index = self.reader.cursor(self.reader.inodes, self.index)?;
        let mut found = None;
        let mut bytes = [0u8; DirIndex::FIXED_LEN + MAX_NAME];
        for _ in 0..self.dir.index_count {
            index.read(&mut bytes[..DirIndex::FIXED_LEN])?;
            let len = DirIndex::len_of(&bytes[..DirIndex::FIXED_LEN])?;
            index.read(&mut bytes[DirIndex::FIXED_LEN..len])?;
            let record = DirIndex::decode(&bytes[..len])?;
            if record.listing_offset >= self.len || !before(record.listing_offset, record.name) {
                break;
            }
            found = Some((record.listing_offset, record.block));
        }
        if let Some((position, block)) = found.filter(|(position, _)| *position > self.at) {
            // The run lies in that block, as far in as the listing's start and its own position say.
            let offset = (u64::from(self.dir.offset) + u64::from(position)) % METADATA_SIZE as u64;
            let pos = self.reader.dir_pos(block, offset as u16);
            self.cursor = Some(self.reader.cursor(self.reader.dirs, pos)?);
            self.at = position;
            self.run = NO_RUN;
        }
        Ok(())
    }
}

/// Room for one entry's bytes.
#[derive(Debug)]
pub struct EntryBuffer([u8; format::DirEntry::FIXED_LEN + MAX_NAME]);

impl Default for EntryBuffer {
    fn default() -> Self {
        Self([0; format::DirEntry::FIXED_LEN + MAX_NAME])
    }
}

/// A [`DirEntry`] whose name lies in an [`EntryBuffer`]; its `next` is [`DirStream::position`].
#[derive(Debug, Clone, Copy)]
pub struct EntryView<'b> {
    /// The name.
    pub name: &'b [u8],
    /// Its inode.
    pub inode: MetaRef,
    /// Its inode's number.
    pub number: u32,
    /// Its inode's basic type.
    pub file_type: InodeType,
}
