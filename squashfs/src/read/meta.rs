//! Metadata blocks: 8 KiB pieces of the inode, directory and lookup tables, each compressed by itself, and a cursor
//! that reads across them.
//!
//! Invariant: a cursor never leaves its [`Region`], and each step forward moves forward in the file, so that no
//! image can make it loop.

use std::sync::Arc;

use super::Reader;
use super::cache::Weigh;
use super::error::ReadError;
use super::source::ReadAt;
use crate::format::{METADATA_SIZE, MetaHeader};

/// Where a table's metadata blocks lie in the file: `start..end`, absolute bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Region {
    pub(crate) start: u64,
    pub(crate) end: u64,
}

impl Region {
    pub(crate) fn len(&self) -> u64 {
        self.end.saturating_sub(self.start)
    }

    /// No more bytes than this can come out of the region: the smallest block is its header and one byte.
    pub(crate) fn most_decoded(&self) -> u64 {
        (self.len() / 3 + 1).saturating_mul(METADATA_SIZE as u64)
    }
}

/// A place in a table: the block's start as an absolute byte offset and an offset in the decoded block.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct MetaPos {
    pub(crate) block: u64,
    pub(crate) offset: u32,
}

/// A table of records of one length: metadata blocks and the list of their offsets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LookupTable {
    /// Where its metadata blocks may lie.
    pub(crate) blocks: Region,
    /// Where the list of their offsets starts.
    pub(crate) list: u64,
}

/// One decoded metadata block, or a raw piece of a pointer array.
#[derive(Debug)]
pub(crate) struct MetaBlock {
    pub(crate) data: Box<[u8]>,
    /// Where the next block starts in the file.
    pub(crate) next: u64,
}

/// A decoded metadata block, wherever it is kept.
#[derive(Debug)]
pub(crate) enum Block<'a> {
    /// In the cache.
    Cached(Arc<MetaBlock>),
    /// In the mapped tables.
    Mapped {
        /// Its bytes.
        data: &'a [u8],
        /// Where the next block starts in the file.
        next: u64,
    },
}

impl Block<'_> {
    fn data(&self) -> &[u8] {
        match self {
            Self::Cached(block) => &block.data,
            Self::Mapped { data, .. } => data,
        }
    }

    fn next(&self) -> u64 {
        match self {
            Self::Cached(block) => block.next,
            Self::Mapped { next, .. } => *next,
        }
    }
}

impl Weigh for MetaBlock {
    fn weight(&self) -> usize {
        self.data.len()
    }
}

/// Marks a cache key as a raw piece of the file; no file offset is that big.
const RAW: u64 = 1 << 63;
/// Pointer arrays are read in pieces of this size.
const RAW_PIECE: u64 = 4096;

impl<S: ReadAt> Reader<S> {
    /// The decoded metadata block that starts at `at`, which ends before `end`.
    pub(crate) fn meta_block(&self, at: u64, end: u64) -> Result<Block<'_>, ReadError> {
        let block = match self.tables.get().and_then(|tables| tables.block(at)) {
            Some(block) => block,
            None => Block::Cached(
                self.caches
                    .meta
                    .get_or_load((self.id, at), || self.load_meta_block(at, end))?,
            ),
        };
        if block.next() > end {
            return Err(ReadError::corrupt("metadata block outside its table", at));
        }
        Ok(block)
    }

    /// Decodes a metadata block without the cache.
    pub(crate) fn load_meta_block(&self, at: u64, end: u64) -> Result<MetaBlock, ReadError> {
        let outside = || ReadError::corrupt("metadata block outside its table", at);
        if at.checked_add(2).is_none_or(|body| body > end) {
            return Err(outside());
        }
        // Most blocks compress to less than this; one read then brings header and body.
        let mut first = [0u8; 2 + METADATA_SIZE];
        let take = (end - at).min(first.len() as u64) as usize;
        self.read_source(&mut first[..take], at)?;
        let header = MetaHeader::from_raw(u16::from_le_bytes([first[0], first[1]]))?;
        let stored = usize::from(header.size);
        let body = first[..take].get(2..2 + stored).ok_or_else(outside)?;
        let data: Box<[u8]> = if header.compressed {
            let mut decoded = [0u8; METADATA_SIZE];
            let len = self
                .decoder
                .decode(body, &mut decoded)
                .map_err(|source| ReadError::Compress { at, source })?;
            decoded[..len].into()
        } else {
            body.into()
        };
        if data.is_empty() {
            return Err(ReadError::corrupt("empty metadata block", at));
        }
        Ok(MetaBlock {
            data,
            next: at + 2 + stored as u64,
        })
    }

    /// Record `index` of a lookup table: `N` bytes, as many in each metadata block as fit.
    pub(crate) fn lookup<const N: usize>(
        &self,
        table: LookupTable,
        index: u64,
    ) -> Result<[u8; N], ReadError> {
        let per_block = (METADATA_SIZE / N) as u64;
        let pos = MetaPos {
            block: self.pointer(table.list, index / per_block)?,
            offset: (index % per_block) as u32 * N as u32,
        };
        self.cursor(table.blocks, pos)?.bytes()
    }

    /// Element `index` of the list of block offsets that starts at `list`.
    pub(crate) fn pointer(&self, list: u64, index: u64) -> Result<u64, ReadError> {
        let outside = || ReadError::corrupt("lookup table outside the image", list);
        let at = index
            .checked_mul(8)
            .and_then(|skip| list.checked_add(skip))
            .filter(|at| at.checked_add(8).is_some_and(|end| end <= self.end))
            .ok_or_else(outside)?;
        let piece = list + (at - list) / RAW_PIECE * RAW_PIECE;
        let block = self.caches.meta.get_or_load((self.id, piece | RAW), || {
            let len = (self.end - piece).min(RAW_PIECE) as usize;
            let mut data = vec![0u8; len].into_boxed_slice();
            self.read_source(&mut data, piece)?;
            Ok(MetaBlock {
                data,
                next: piece + len as u64,
            })
        })?;
        let from = (at - piece) as usize;
        let bytes = block.data.get(from..from + 8).ok_or_else(outside)?;
        Ok(u64::from_le_bytes(bytes.try_into().expect("eight bytes")))
    }

    pub(crate) fn cursor(
        &self,
        region: Region,
        pos: MetaPos,
    ) -> Result<MetaCursor<'_, S>, ReadError> {
        MetaCursor::new(self, region, pos)
    }
}

/// Reads forward through a table.
pub(crate) struct MetaCursor<'a, S> {
    reader: &'a Reader<S>,
    region: Region,
    block: Block<'a>,
    at: u64,
    offset: usize,
}

impl<'a, S: ReadAt> MetaCursor<'a, S> {
    fn new(reader: &'a Reader<S>, region: Region, pos: MetaPos) -> Result<Self, ReadError> {
        if pos.block < region.start || pos.block >= region.end {
            return Err(ReadError::corrupt("reference outside its table", pos.block));
        }
        let block = reader.meta_block(pos.block, region.end)?;
        // An offset at the very end of a block means the next block's start.
        if pos.offset as usize > block.data().len() {
            return Err(ReadError::corrupt(
                "reference outside its metadata block",
                pos.block,
            ));
        }
        Ok(Self {
            reader,
            region,
            block,
            at: pos.block,
            offset: pos.offset as usize,
        })
    }

    /// Where the next byte is. At the end of a block this may name its end rather than the next block's start.
    pub(crate) fn pos(&self) -> MetaPos {
        MetaPos {
            block: self.at,
            offset: self.offset as u32,
        }
    }

    /// Steps to the next block when this one is used up and there is one, so that [`Self::pos`] says where the next
    /// record begins.
    pub(crate) fn settle(&mut self) -> Result<(), ReadError> {
        match self.offset == self.block.data().len() && self.block.next() < self.region.end {
            true => self.advance(),
            false => Ok(()),
        }
    }

    /// Whether the whole table was read.
    pub(crate) fn at_end(&self) -> bool {
        self.offset == self.block.data().len() && self.block.next() == self.region.end
    }

    fn advance(&mut self) -> Result<(), ReadError> {
        let next = self.block.next();
        if next >= self.region.end {
            return Err(ReadError::corrupt("table ends too early", next));
        }
        self.block = self.reader.meta_block(next, self.region.end)?;
        self.at = next;
        self.offset = 0;
        Ok(())
    }

    pub(crate) fn read(&mut self, mut out: &mut [u8]) -> Result<(), ReadError> {
        while !out.is_empty() {
            let here = &self.block.data()[self.offset..];
            if here.is_empty() {
                self.advance()?;
                continue;
            }
            let take = here.len().min(out.len());
            out[..take].copy_from_slice(&here[..take]);
            self.offset += take;
            out = &mut out[take..];
        }
        Ok(())
    }

    /// The next `N` bytes.
    pub(crate) fn bytes<const N: usize>(&mut self) -> Result<[u8; N], ReadError> {
        let mut bytes = [0u8; N];
        self.read(&mut bytes)?;
        Ok(bytes)
    }

    pub(crate) fn skip(&mut self, mut count: u64) -> Result<(), ReadError> {
        while count > 0 {
            let here = (self.block.data().len() - self.offset) as u64;
            if here == 0 {
                self.advance()?;
                continue;
            }
            let take = here.min(count);
            self.offset += take as usize;
            count -= take;
        }
        Ok(())
    }
}
