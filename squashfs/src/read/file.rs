//! Contents of regular files: block lists, holes, fragments.

use std::sync::Arc;

use super::Reader;
use super::cache::Weigh;
use super::decode::with_buffer;
use super::error::ReadError;
use super::inode::Inode;
use super::meta::{MetaCursor, MetaPos};
use super::source::ReadAt;
use crate::format::{BlockSize, FileInode, FragmentEntry, NO_FRAGMENT};

/// A stored block of the data area.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Stored {
    /// Byte offset in the image.
    pub(crate) at: u64,
    /// Its length and whether it is compressed.
    pub(crate) size: BlockSize,
}

/// A decoded data or fragment block.
#[derive(Debug)]
pub(crate) struct DataBlock(pub(crate) Box<[u8]>);

impl Weigh for DataBlock {
    fn weight(&self) -> usize {
        self.0.len()
    }
}

/// Every so many blocks of a long file its place in the data area is remembered.
const STRIDE: u64 = 512;

/// Where every [`STRIDE`]th block of a long file lies.
#[derive(Debug)]
pub(crate) struct FileIndex(Vec<(MetaPos, u64)>);

impl Weigh for FileIndex {
    fn weight(&self) -> usize {
        self.0.len() * size_of::<(MetaPos, u64)>()
    }
}

impl<S: ReadAt> Reader<S> {
    /// Reads contents of a regular file from byte `offset` on into `buf`. Gives the number of bytes read: all of
    /// `buf`, or less at the file's end.
    pub fn read(&self, inode: &Inode, offset: u64, buf: &mut [u8]) -> Result<usize, ReadError> {
        let file = inode.as_file()?;
        if offset >= file.size || buf.is_empty() {
            return Ok(0);
        }
        let want = (file.size - offset).min(buf.len() as u64) as usize;
        let buf = &mut buf[..want];
        let block_size = u64::from(self.superblock.block_size);
        let blocks = file.block_count(self.superblock.block_size);
        let mut done = 0;
        let mut number = offset / block_size;
        let mut list = match number < blocks {
            true => Some(self.block_list(file, inode.tail, number)?),
            false => None,
        };
        while done < want {
            let within = ((offset + done as u64) % block_size) as usize;
            let here = (file.size - number * block_size).min(block_size) as usize;
            let take = (here - within).min(want - done);
            let out = &mut buf[done..done + take];
            match &mut list {
                Some(list) if number < blocks => {
                    let stored = list.next_block()?;
                    self.read_block(stored, here, within, out)?;
                }
                _ => self.read_tail(file, here, within, out)?,
            }
            done += take;
            number += 1;
        }
        Ok(want)
    }

    fn read_block(
        &self,
        stored: Stored,
        len: usize,
        within: usize,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        if stored.size.is_hole() {
            out.fill(0);
            return Ok(());
        }
        if out.len() == len {
            return self.caches.data.load_into(
                (self.id, stored),
                out,
                |out| match self.decode_data(stored, out)? {
                    decoded if decoded == len => Ok(()),
                    _ => Err(ReadError::corrupt("length of a data block", stored.at)),
                },
                |out| DataBlock(out.into()),
                |block, out| copy_from(&block.0, 0, out, stored.at),
            );
        }
        let block = self.data_block(stored, len)?;
        if block.0.len() != len {
            return Err(ReadError::corrupt("length of a data block", stored.at));
        }
        copy_from(&block.0, within, out, stored.at)
    }

    fn read_tail(
        &self,
        file: &FileInode,
        len: usize,
        within: usize,
        out: &mut [u8],
    ) -> Result<(), ReadError> {
        if file.fragment == NO_FRAGMENT {
            return Err(ReadError::corrupt(
                "file longer than its blocks",
                file.start,
            ));
        }
        let stored = self.fragment(file.fragment)?;
        let block = self.data_block(stored, self.superblock.block_size as usize)?;
        let from = file.fragment_offset as usize;
        if from.checked_add(len).is_none_or(|end| end > block.0.len()) {
            return Err(ReadError::corrupt("tail outside its fragment", stored.at));
        }
        copy_from(&block.0, from + within, out, stored.at)
    }

    /// Where fragment block `index` is stored.
    pub(crate) fn fragment(&self, index: u32) -> Result<Stored, ReadError> {
        let table = self
            .fragments
            .filter(|_| index < self.superblock.fragment_count);
        let Some(table) = table else {
            return Err(ReadError::corrupt("fragment index", u64::from(index)));
        };
        let entry = FragmentEntry::decode(
            &self.lookup::<{ FragmentEntry::LEN }>(table, u64::from(index))?,
        )?;
        if entry.size.is_hole() {
            return Err(ReadError::corrupt("empty fragment block", entry.start));
        }
        Ok(Stored {
            at: entry.start,
            size: entry.size,
        })
    }

    fn data_block(&self, stored: Stored, most: usize) -> Result<Arc<DataBlock>, ReadError> {
        self.caches.data.get_or_load((self.id, stored), || {
            let mut data = vec![0u8; most];
            let len = self.decode_data(stored, &mut data)?;
            data.truncate(len);
            Ok(DataBlock(data.into_boxed_slice()))
        })
    }

    /// Decodes a stored block into `out` without the cache; gives its decoded length.
    pub(crate) fn decode_data(&self, stored: Stored, out: &mut [u8]) -> Result<usize, ReadError> {
        let len = stored.size.check(self.superblock.block_size)?.stored() as usize;
        let end = stored.at.checked_add(len as u64);
        if len == 0 || end.is_none_or(|end| end > self.end) {
            return Err(ReadError::corrupt(
                "data block outside the image",
                stored.at,
            ));
        }
        if !stored.size.compressed() {
            let out = out
                .get_mut(..len)
                .ok_or_else(|| ReadError::corrupt("length of a data block", stored.at))?;
            self.read_source(out, stored.at)?;
            return Ok(len);
        }
        with_buffer(len, |buffer| {
            self.read_source(buffer, stored.at)?;
            self.decoder
                .decode(buffer, out)
                .map_err(|source| ReadError::Compress {
                    at: stored.at,
                    source,
                })
        })
    }

    /// The file's block list from block `first` on.
    pub(crate) fn block_list(
        &self,
        file: &FileInode,
        tail: MetaPos,
        first: u64,
    ) -> Result<BlockList<'_, S>, ReadError> {
        let (pos, data, from) = if first < STRIDE {
            (tail, file.start, 0)
        } else {
            let index = self
                .caches
                .file_indexes
                .get_or_load((self.id, tail), || self.index_file(file, tail))?;
            let stop = first / STRIDE;
            let (pos, data) = *index
                .0
                .get(stop as usize)
                .ok_or_else(|| ReadError::corrupt("block list", file.start))?;
            (pos, data, stop * STRIDE)
        };
        let mut list = BlockList {
            cursor: self.cursor(self.inodes, pos)?,
            at: data,
            block_size: self.superblock.block_size,
        };
        for _ in from..first {
            list.next_block()?;
        }
        Ok(list)
    }

    fn index_file(&self, file: &FileInode, tail: MetaPos) -> Result<FileIndex, ReadError> {
        let mut list = BlockList {
            cursor: self.cursor(self.inodes, tail)?,
            at: file.start,
            block_size: self.superblock.block_size,
        };
        let blocks = file.block_count(self.superblock.block_size);
        let mut stops = Vec::new();
        for number in 0..blocks {
            if number % STRIDE == 0 {
                stops.push((list.cursor.pos(), list.at));
            }
            list.next_block()?;
        }
        Ok(FileIndex(stops))
    }
}

/// Walks a file's block list.
pub(crate) struct BlockList<'a, S> {
    cursor: MetaCursor<'a, S>,
    at: u64,
    block_size: u32,
}

impl<S: ReadAt> BlockList<'_, S> {
    /// The next block; its size word is 0 for a hole.
    pub(crate) fn next_block(&mut self) -> Result<Stored, ReadError> {
        let size = BlockSize(u32::from_le_bytes(self.cursor.bytes()?)).check(self.block_size)?;
        let stored = Stored { at: self.at, size };
        self.at = self
            .at
            .checked_add(u64::from(size.stored()))
            .ok_or_else(|| ReadError::corrupt("place of a data block", stored.at))?;
        Ok(stored)
    }
}

fn copy_from(block: &[u8], from: usize, out: &mut [u8], at: u64) -> Result<(), ReadError> {
    let piece = from
        .checked_add(out.len())
        .and_then(|end| block.get(from..end))
        .ok_or_else(|| ReadError::corrupt("length of a data block", at))?;
    out.copy_from_slice(piece);
    Ok(())
}
