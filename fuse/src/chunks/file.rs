//! What is kept of one image on this node: a sparse file with the image's own offsets, and beside it a map that says
//! which chunks were written (docs/FORMATS.md, "The node's cache").
//!
//! The map is a promise of nothing: after a crash, or when somebody changed the file, a chunk may be there in part, so
//! readers check what they read. A chunk is marked after it was written. Nothing is ever synced.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::SystemTime;

use rustix::fs::{Advice, FallocateFlags};

use super::CHUNK;
use super::cache::Cache;
use super::states::{InUse, States};
use super::tree::Chunks;

const MAGIC: &[u8; 16] = b"berth-chunks-2\0\0";
const HEAD: u64 = 64;

/// One image's two files. Dropped, it counts as an image that nobody reads.
#[derive(Debug)]
pub(super) struct CacheFile {
    cache: Arc<Cache>,
    pub(super) root: [u8; 32],
    data: File,
    map: File,
    chunks: Chunks,
    states: States,
    /// Chunks that are not here; for a moment more than that, never fewer.
    missing: AtomicU32,
    used: AtomicU64,
    /// All of it is elsewhere on this node: without readers it goes first.
    spare: AtomicBool,
}

/// What came of a chunk that was to be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Keeping {
    /// No room, a full disk, somebody else's turn.
    Not,
    Kept,
    /// It was the last one that was missing.
    KeptLast,
}

impl CacheFile {
    /// Opens or makes the files in a folder. A map of something else is begun anew.
    pub(super) fn open(
        cache: Arc<Cache>,
        folder: &Path,
        root: &[u8; 32],
        chunks: Chunks,
    ) -> io::Result<Self> {
        let open = |ending: &str| {
            OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
                .open(folder.join(super::cache::name(root, ending)))
        };
        let (map, data) = (open("map")?, open("data")?);
        // Read ahead, pages would come in that nobody asked for.
        let _ = rustix::fs::fadvise(&data, 0, None, Advice::Random);
        let mut head = [0u8; HEAD as usize];
        head[..16].copy_from_slice(MAGIC);
        head[16..24].copy_from_slice(&CHUNK.to_le_bytes());
        head[24..32].copy_from_slice(&u64::from(chunks.count).to_le_bytes());
        head[32..].copy_from_slice(root);
        let len = HEAD + u64::from(chunks.count);
        let mut found = [0u8; HEAD as usize];
        let known = map.metadata()?.len() == len
            && map.read_exact_at(&mut found, 0).is_ok()
            && found == head;
        if !known {
            data.set_len(0)?;
            map.set_len(0)?;
            map.set_len(len)?;
            map.write_all_at(&head, 0)?;
        }
        let mut flags = vec![0u8; chunks.count as usize];
        map.read_exact_at(&mut flags, HEAD)?;
        let here = flags.iter().map(|flag| *flag == 1);
        let used = (0..chunks.count).zip(here.clone());
        let used = used.filter(|(_, here)| *here);
        let used = used.map(|(chunk, _)| chunks.len_of(chunk)).sum();
        Ok(Self {
            cache,
            root: *root,
            data,
            map,
            missing: AtomicU32::new(
                chunks.count - here.clone().filter(|here| *here).count() as u32,
            ),
            states: States::new(here),
            chunks,
            used: AtomicU64::new(used),
            spare: AtomicBool::new(false),
        })
    }

    /// Bytes of the chunks that are here.
    pub(super) fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Whether every chunk is here, as far as the map knows.
    pub(super) fn is_whole(&self) -> bool {
        self.missing.load(Ordering::Acquire) == 0
    }

    /// What is here is not worth its room when its readers are gone.
    pub(super) fn spare(&self) {
        self.spare.store(true, Ordering::Relaxed);
    }

    pub(super) fn count(&self) -> u32 {
        self.states.len()
    }

    pub(super) fn is_here(&self, chunk: u32) -> bool {
        self.states.is_here(chunk)
    }

    /// Uses a chunk if it is here; what is read of it must be checked.
    pub(super) fn use_if_here(&self, chunk: u32) -> Option<InUse<'_>> {
        self.states.use_if_here(chunk)
    }

    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.data.read_exact_at(buf, offset)
    }

    /// Keeps the tree's head and what proves it, which is checked whenever it is read and so needs no mark.
    pub(super) fn write_head(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.data.write_all_at(bytes, offset)
    }

    /// What a reader found in a chunk was not what was sealed.
    pub(super) fn damaged(&self, chunk: u32, found_by: &InUse<'_>) {
        if found_by.forget() {
            self.missing.fetch_add(1, Ordering::AcqRel);
            self.unmark(chunk);
            self.give_back(self.chunks.len_of(chunk));
        }
    }

    /// Writes a chunk and marks it.
    pub(super) fn keep(&self, chunk: u32, bytes: &[u8]) -> Keeping {
        let len = bytes.len() as u64;
        if !self.states.begin(chunk) {
            return Keeping::Not;
        }
        let offset = self.chunks.place(chunk).start;
        let kept = self.cache.reserve(len) && {
            self.used.fetch_add(len, Ordering::Relaxed);
            let written = self.data.write_all_at(bytes, offset);
            if let Err(error) = &written {
                tracing::warn!(%error, "goes on without keeping a chunk");
                // A part of it may have been written.
                let _ = self.punch(offset, len);
                self.give_back(len);
            }
            written.is_ok()
        };
        if kept && let Err(error) = self.map.write_all_at(&[1], HEAD + u64::from(chunk)) {
            tracing::warn!(%error, "a chunk is kept until the next start only");
        }
        self.states.end(chunk, kept);
        match kept {
            false => Keeping::Not,
            true if self.missing.fetch_sub(1, Ordering::AcqRel) == 1 => Keeping::KeptLast,
            true => Keeping::Kept,
        }
    }

    /// Throws a chunk out if it is here, nobody uses it and, on this round, nobody has lately.
    pub(super) fn evict(&self, chunk: u32) -> bool {
        if !self.states.take_away(chunk) {
            return false;
        }
        self.missing.fetch_add(1, Ordering::AcqRel);
        self.unmark(chunk);
        let place = self.chunks.place(chunk);
        let len = place.end - place.start;
        if let Err(error) = self.punch(place.start, len) {
            tracing::warn!(%error, "cannot free a chunk of the cache file");
        }
        self.give_back(len);
        self.states.end(chunk, false);
        true
    }

    fn unmark(&self, chunk: u32) {
        if let Err(error) = self.map.write_all_at(&[0], HEAD + u64::from(chunk)) {
            tracing::warn!(%error, "cannot unmark a chunk");
        }
    }

    fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&self.data, flags, offset, len)?)
    }

    fn give_back(&self, len: u64) {
        self.used.fetch_sub(len, Ordering::Relaxed);
        self.cache.give_back(len);
    }
}

impl Drop for CacheFile {
    fn drop(&mut self) {
        let last = match self.spare.load(Ordering::Relaxed) {
            true => SystemTime::UNIX_EPOCH,
            false => SystemTime::now(),
        };
        // Orders images by their last use after a restart; without it they are as old as their last write.
        let _ = self.map.set_modified(last);
        self.cache.closed(self.root, self.used(), last);
    }
}
