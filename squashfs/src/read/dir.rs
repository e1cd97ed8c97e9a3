//! Folders: listing, resuming a listing, and finding a name.
//!
//! A listing is a sequence of runs: a head (count, inode table block, base inode number) and up to 256 entries whose
//! inodes share that block. A position in it is the byte offset of an entry; the run it belongs to is found by walking
//! from the listing's start or from the folder's index (one entry per 8 KiB), so that a position is all that need be
//! remembered, and one that names no entry is never taken for one.

use super::Reader;
use super::error::ReadError;
use super::inode::{Directory, FileType, Inode, InodeKind, InodeRef};
use super::meta::{MetaCursor, MetaPos};
use super::source::ReadAt;

/// Longest name in bytes.
pub const NAME_MAX: usize = 256;
/// What the stated size of a folder counts for `.` and `..`.
pub(crate) const DOTS: u32 = 3;
/// Most entries in one run.
const RUN_MAX: u32 = 256;

/// One name in a folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name: no '/', no NUL, neither `.` nor `..`; any other bytes.
    pub name: Vec<u8>,
    /// Its inode.
    pub inode: InodeRef,
    /// Its inode's number.
    pub number: u32,
    /// Its inode's type.
    pub file_type: FileType,
    /// Position of the entry after this one: give it to [`DirStream::seek`] to go on there.
    pub next: u32,
}

/// A listing being read.
pub struct DirStream<'a, S> {
    cursor: Option<MetaCursor<'a, S>>,
    reader: &'a Reader<S>,
    dir: Directory,
    /// Bytes of the listing already read.
    at: u32,
    /// Bytes of the whole listing.
    len: u32,
    /// What is left of the current run.
    run_left: u32,
    run_block: u32,
    run_number: u32,
}

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
        let InodeKind::Directory(dir) = &inode.kind else {
            return Err(ReadError::NotADirectory);
        };
        DirStream::new(self, dir.clone())
    }

    /// The entry `name` of a folder, if there is one.
    pub fn lookup(&self, inode: &Inode, name: &[u8]) -> Result<Option<DirEntry>, ReadError> {
        let mut stream = self.read_dir(inode)?;
        if !valid_name(name) {
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

/// Whether `name` may stand in a folder.
pub(crate) fn valid_name(name: &[u8]) -> bool {
    !(name.is_empty() || name.len() > NAME_MAX)
        && name != b"."
        && name != b".."
        && !name.iter().any(|byte| matches!(byte, b'/' | 0))
}

impl<'a, S: ReadAt> DirStream<'a, S> {
    fn new(reader: &'a Reader<S>, dir: Directory) -> Result<Self, ReadError> {
        let len = dir.size.saturating_sub(DOTS);
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
            at: 0,
            len,
            run_left: 0,
            run_block: 0,
            run_number: 0,
        })
    }

    /// Position of the entry that [`Self::next_entry`] gives next.
    pub fn position(&self) -> u32 {
        self.at
    }

    /// The next entry, or `None` at the end.
    pub fn next_entry(&mut self) -> Result<Option<DirEntry>, ReadError> {
        let mut name = Vec::new();
        let Some(head) = self.next_into(&mut name)? else {
            return Ok(None);
        };
        Ok(Some(DirEntry {
            name,
            inode: head.inode,
            number: head.number,
            file_type: head.file_type,
            next: self.at,
        }))
    }

    /// Like [`Self::next_entry`], with the name put into `name`: no allocation per entry.
    pub(crate) fn next_into(&mut self, name: &mut Vec<u8>) -> Result<Option<EntryHead>, ReadError> {
        let Some(cursor) = &mut self.cursor else {
            return Ok(None);
        };
        let bad = |what| Err(ReadError::corrupt(what, u64::from(self.dir.block)));
        if self.run_left == 0 {
            if self.at >= self.len {
                return Ok(None);
            }
            let head = cursor.fields::<12>()?;
            self.run_left = head.u32(0).saturating_add(1);
            self.run_block = head.u32(4);
            self.run_number = head.u32(8);
            self.at = self.at.saturating_add(12);
            if self.run_left > RUN_MAX {
                return bad("run of directory entries");
            }
        }
        let head = cursor.fields::<8>()?;
        let name_len = u32::from(head.u16(6)) + 1;
        self.at = self.at.saturating_add(8 + name_len);
        if name_len as usize > NAME_MAX || self.at > self.len {
            return bad("directory entry outside its folder");
        }
        name.resize(name_len as usize, 0);
        cursor.read(name)?;
        if !valid_name(name) {
            return bad("name in a folder");
        }
        self.run_left -= 1;
        let Some(file_type) = FileType::from_basic(head.u16(4)) else {
            return bad("type of a directory entry");
        };
        Ok(Some(EntryHead {
            inode: InodeRef::new(self.run_block, head.u16(0)),
            number: self.run_number.wrapping_add_signed(i32::from(head.u16(2) as i16)),
            file_type,
        }))
    }

    /// Goes to the first entry at or after `position`, a value of [`DirEntry::next`] or 0.
    pub fn seek(&mut self, position: u32) -> Result<(), ReadError> {
        if position < self.at {
            *self = Self::new(self.reader, self.dir.clone())?;
        }
        if position >= self.len {
            self.at = self.len;
            self.cursor = None;
            return Ok(());
        }
        self.skip_by_index(|start, _| start <= position)?;
        let mut name = Vec::new();
        while self.at < position {
            if self.next_into(&mut name)?.is_none() {
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
        let mut index = self.reader.cursor(self.reader.inodes, self.dir.tail)?;
        let mut found = None;
        let mut name = [0u8; NAME_MAX];
        for _ in 0..self.dir.index_count {
            let head = index.fields::<12>()?;
            let (position, block) = (head.u32(0), head.u32(4));
            let name_len = head.u32(8).saturating_add(1) as usize;
            let Some(name) = name.get_mut(..name_len) else {
                return Err(ReadError::corrupt("name in a folder's index", u64::from(block)));
            };
            index.read(name)?;
            if position >= self.len || !before(position, name) {
                break;
            }
            found = Some((position, block));
        }
        if let Some((position, block)) = found.filter(|(position, _)| *position > self.at) {
            // The run lies in that block, as far in as the listing's start and its own position say.
            let offset = (u64::from(self.dir.offset) + u64::from(position)) % 8192;
            let pos = self.reader.dir_pos(block, offset as u16);
            self.cursor = Some(self.reader.cursor(self.reader.dirs, pos)?);
            self.at = position;
            self.run_left = 0;
        }
        Ok(())
    }
}

/// An entry without its name.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EntryHead {
    pub(crate) inode: InodeRef,
    pub(crate) number: u32,
    pub(crate) file_type: FileType,
}
