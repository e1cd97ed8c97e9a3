//! Reading an image from any source, from many threads at once.
//!
//! What is read is not trusted: every length is bounded by the image's own size before anything is allocated, every
//! reference must lie in its table, every step through a table goes forward. A damaged image gives errors; it never
//! makes the reader panic, loop or grow.
//!
//! Metadata and data blocks are decoded once, into caches with byte limits that many readers may share; an image's
//! tables can be decoded into a file instead. The reader has no other state that changes, and no lock is held while the
//! source is read or a block is decoded.

mod cache;
mod decode;
mod dir;
mod error;
mod file;
mod inode;
mod meta;
mod source;
mod tables;
mod xattr;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use cache::BlockCache;
use decode::Decoder;
use file::{DataBlock, FileIndex, Stored};
use meta::{LookupTable, MetaBlock};
pub(crate) use meta::{MetaCursor, MetaPos, Region};
use tables::Tables;
pub(crate) use xattr::LIST_MAX as XATTR_LIST_MAX;
use xattr::XattrTable;

pub use crate::format::{InodeBody, InodeType, MetaRef, Superblock};
pub use dir::{DirEntry, DirStream, EntryBuffer, EntryView};
pub use error::ReadError;
pub use inode::Inode;
pub use source::ReadAt;

use crate::compress::CompressError;
use crate::format::{ABSENT, METADATA_SIZE, XattrIdTable};

/// How much memory readers may keep, in bytes.
#[derive(Debug, Clone, Copy)]
pub struct CacheSizes {
    /// Decoded metadata blocks.
    pub metadata: usize,
    /// Decoded data and fragment blocks.
    pub data: usize,
}

impl Default for CacheSizes {
    /// 32 MiB of metadata (some 400,000 inodes) and 16 MiB of data.
    fn default() -> Self {
        Self {
            metadata: 32 << 20,
            data: 16 << 20,
        }
    }
}

/// Decoded blocks of any number of images: one byte limit for all that share it.
#[derive(Debug)]
pub struct Caches {
    /// By image and place.
    meta: BlockCache<(u64, u64), MetaBlock>,
    data: BlockCache<(u64, Stored), DataBlock>,
    file_indexes: BlockCache<(u64, MetaPos), FileIndex>,
}

/// Blocks of shared caches are taken to be of this size, the format's usual one.
const USUAL_BLOCK: usize = 128 << 10;

impl Caches {
    /// Empty caches.
    pub fn new(sizes: CacheSizes) -> Self {
        Self::for_blocks(sizes, USUAL_BLOCK)
    }

    fn for_blocks(sizes: CacheSizes, block_size: usize) -> Self {
        Self {
            meta: BlockCache::new(sizes.metadata, METADATA_SIZE),
            data: BlockCache::new(sizes.data, block_size),
            file_indexes: BlockCache::new(sizes.metadata / 8, METADATA_SIZE),
        }
    }
}

/// Tells readers' blocks apart in shared caches.
static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// An open image.
#[derive(Debug)]
pub struct Reader<S> {
    source: S,
    id: u64,
    superblock: Superblock,
    /// Nothing is read at or after this offset: the image's own size, not more than the source's.
    end: u64,
    decoder: Decoder,
    inodes: Region,
    dirs: Region,
    fragments: Option<LookupTable>,
    export: Option<LookupTable>,
    xattrs: Option<XattrTable>,
    ids: Box<[u32]>,
    caches: Arc<Caches>,
    tables: OnceLock<Tables>,
}

impl<S: ReadAt> Reader<S> {
    /// Opens an image with caches of its own: reads its superblock and id table, and places every other table.
    pub fn open(source: S, caches: CacheSizes) -> Result<Self, ReadError> {
        Self::open_with(source, |sb| {
            Arc::new(Caches::for_blocks(caches, sb.block_size as usize))
        })
    }

    /// Opens an image as [`Self::open`] does, with caches that other readers use too. Its blocks stay there until they
    /// are pushed out, also when the reader is gone.
    pub fn open_in(source: S, caches: Arc<Caches>) -> Result<Self, ReadError> {
        Self::open_with(source, |_| caches)
    }

    fn open_with(
        source: S,
        caches: impl FnOnce(&Superblock) -> Arc<Caches>,
    ) -> Result<Self, ReadError> {
        let size = source.size().map_err(|e| ReadError::io(0, 0, e))?;
        if size < Superblock::LEN as u64 {
            return Err(ReadError::corrupt(
                "image shorter than its superblock",
                size,
            ));
        }
        let mut bytes = [0u8; Superblock::LEN];
        source
            .read_exact_at(&mut bytes, 0)
            .map_err(|e| ReadError::io(0, bytes.len(), e))?;
        let sb = Superblock::decode(&bytes)?;
        let end = sb.bytes_used;
        if end > size {
            return Err(ReadError::corrupt("image cut short", size));
        }
        let decoder = Decoder::new(sb.compression).map_err(unsupported)?;
        let table = |start: u64| (start != ABSENT).then_some(start);
        let fragments = table(sb.fragment_table).filter(|_| sb.fragment_count > 0);
        let export = table(sb.export_table);
        // Each table's blocks end where its own list starts, and start where the one before ends.
        let first = sb.directory_table;
        let lookup = |list: u64| LookupTable {
            blocks: Region {
                start: first,
                end: list,
            },
            list,
        };
        let after_dirs = fragments.or(export).unwrap_or(sb.id_table);
        let mut reader = Self {
            end,
            decoder,
            inodes: Region {
                start: sb.inode_table,
                end: sb.directory_table,
            },
            dirs: Region {
                start: sb.directory_table,
                end: after_dirs,
            },
            fragments: fragments.map(lookup),
            export: export.map(lookup),
            xattrs: None,
            ids: Box::default(),
            caches: caches(&sb),
            tables: OnceLock::new(),
            superblock: sb,
            source,
            // Enough numbers for readers without end.
            id: NEXT_ID.fetch_add(1, Ordering::Relaxed),
        };
        reader.ids = reader.load_ids(lookup(reader.superblock.id_table))?;
        reader.xattrs = table(reader.superblock.xattr_table)
            .map(|start| reader.load_xattr_table(start))
            .transpose()?;
        Ok(reader)
    }

    /// The image's superblock.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Where the image's bytes come from.
    pub fn source(&self) -> &S {
        &self.source
    }

    pub(crate) fn inode_region(&self) -> Region {
        self.inodes
    }

    pub(crate) fn xattrs(&self) -> Option<XattrTable> {
        self.xattrs
    }

    pub(crate) fn ids(&self) -> &[u32] {
        &self.ids
    }

    fn load_ids(&self, table: LookupTable) -> Result<Box<[u32]>, ReadError> {
        // The count has 16 bits: at most 256 KiB.
        (0..u64::from(self.superblock.id_count))
            .map(|index| Ok(u32::from_le_bytes(self.lookup(table, index)?)))
            .collect()
    }

    fn load_xattr_table(&self, start: u64) -> Result<XattrTable, ReadError> {
        let mut bytes = [0u8; XattrIdTable::LEN];
        let list = start.saturating_add(bytes.len() as u64);
        if list > self.end {
            return Err(ReadError::corrupt("xattr table outside the image", start));
        }
        self.read_source(&mut bytes, start)?;
        let head = XattrIdTable::decode(&bytes)?;
        if head.key_values > start {
            return Err(ReadError::corrupt(
                "xattr table outside the image",
                head.key_values,
            ));
        }
        let pairs = Region {
            start: head.key_values,
            end: start,
        };
        Ok(XattrTable {
            pairs,
            sets: LookupTable {
                blocks: pairs,
                list,
            },
            count: head.count,
        })
    }

    pub(crate) fn read_source(&self, buf: &mut [u8], offset: u64) -> Result<(), ReadError> {
        self.source
            .read_exact_at(buf, offset)
            .map_err(|e| ReadError::io(offset, buf.len(), e))
    }
}

fn unsupported(source: CompressError) -> ReadError {
    ReadError::Compress { at: 0, source }
}
