//! The node's cache: one folder for all images, one size limit, one process that uses it at a time.
//!
//! Room is made first by throwing out images that nobody reads, least lately read first, then by chunks of the others,
//! each once round the clock without having been read. Bytes that are reserved count at once, so that the limit holds
//! whatever comes at the same time.
//!
//! Locking: `hand` is held while room is made, `inner` for list operations and for removing an idle image's files.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, Weak};
use std::time::SystemTime;

use rustix::fs::FlockOperation;
use rustix::io::Errno;

use super::file::CacheFile;
use super::tree::Chunks;
use crate::lock;

/// Why there is no cache. Images can be served without.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// A file or folder cannot be used.
    #[error("cannot use the cache \"{path}\"")]
    Io {
        /// Which.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Another server has it.
    #[error("the cache \"{0}\" is in use by another server")]
    InUse(String),
}

/// See the module's head.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
    limit: AtomicU64,
    used: AtomicU64,
    evicted: AtomicU64,
    inner: Mutex<Inner>,
    hand: Mutex<Hand>,
    /// Held as long as this process uses the folder.
    _lock: File,
}

#[derive(Debug, Default)]
struct Inner {
    open: Vec<Weak<CacheFile>>,
    idle: Vec<Idle>,
}

/// An image that nobody reads.
#[derive(Debug)]
struct Idle {
    root: [u8; 32],
    bytes: u64,
    last: SystemTime,
}

#[derive(Debug, Default)]
struct Hand {
    image: usize,
    chunk: u32,
}

pub(super) fn name(root: &[u8; 32], ending: &str) -> String {
    let hex: String = root.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{hex}.{ending}")
}

/// The root in the name of a map; other files are not ours.
fn root_of(name: &str) -> Option<[u8; 32]> {
    let hex = name.strip_suffix(".map").filter(|hex| hex.len() == 64)?;
    let mut root = [0; 32];
    for (at, byte) in root.iter_mut().enumerate() {
        *byte = u8::from_str_radix(hex.get(at * 2..at * 2 + 2)?, 16).ok()?;
    }
    Some(root)
}

impl Cache {
    /// Opens the cache in an existing folder that only this process's user can change. `limit` is bytes; `None` is a
    /// tenth of the filesystem.
    pub fn open(folder: &Path, limit: Option<u64>) -> Result<Arc<Self>, CacheError> {
        let shown = || folder.display().to_string();
        let io = |source| CacheError::Io {
            path: shown(),
            source,
        };
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
            .open(folder.join("lock"))
            .map_err(io)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(CacheError::InUse(shown())),
            Err(errno) => return Err(io(errno.into())),
        }
        let limit = match limit {
            Some(limit) => limit,
            None => {
                let disk = rustix::fs::statvfs(folder).map_err(|errno| io(errno.into()))?;
                disk.f_blocks.saturating_mul(disk.f_frsize) / 10
            }
        };
        let mut idle = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(io)? {
            let entry = entry.map_err(io)?;
            let Some(root) = entry.file_name().to_str().and_then(root_of) else {
                continue;
            };
            let data = std::fs::metadata(folder.join(name(&root, "data")));
            idle.push(Idle {
                root,
                bytes: data.map_or(0, |data| data.blocks() * 512),
                last: entry
                    .metadata()
                    .and_then(|map| map.modified())
                    .unwrap_or(SystemTime::UNIX_EPOCH),
            });
        }
        let used = idle.iter().map(|image| image.bytes).sum();
        Ok(Arc::new(Self {
            folder: folder.to_owned(),
            limit: AtomicU64::new(limit),
            used: AtomicU64::new(used),
            evicted: AtomicU64::new(0),
            inner: Mutex::new(Inner {
                open: Vec::new(),
                idle,
            }),
            hand: Mutex::default(),
            _lock: file,
        }))
    }

    /// Bytes kept, of all images.
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Relaxed)
    }

    /// Most bytes kept.
    pub fn limit(&self) -> u64 {
        self.limit.load(Ordering::Relaxed)
    }

    /// Another limit from now on. What is too much goes when room is wanted next.
    pub fn set_limit(&self, limit: u64) {
        self.limit.store(limit, Ordering::Relaxed);
    }

    /// Bytes thrown out to keep the size.
    pub fn evicted(&self) -> u64 {
        self.evicted.load(Ordering::Relaxed)
    }

    pub(super) fn image(
        self: &Arc<Self>,
        root: &[u8; 32],
        chunks: &Chunks,
    ) -> Result<Arc<CacheFile>, CacheError> {
        let mut inner = lock(&self.inner);
        inner.open.retain(|image| image.strong_count() > 0);
        let open: Vec<_> = inner.open.iter().filter_map(Weak::upgrade).collect();
        if let Some(image) = open.iter().find(|image| image.root == *root) {
            let image = Arc::clone(image);
            drop(inner);
            return Ok(image);
        }
        let file = CacheFile::open(Arc::clone(self), &self.folder, root, chunks.clone());
        let image = match file {
            Ok(image) => Arc::new(image),
            Err(source) => {
                drop(inner);
                let path = self.folder.display().to_string();
                return Err(CacheError::Io { path, source });
            }
        };
        if let Some(at) = inner.idle.iter().position(|idle| idle.root == *root) {
            self.give_back(inner.idle.swap_remove(at).bytes);
        }
        self.used.fetch_add(image.used(), Ordering::Relaxed);
        inner.open.push(Arc::downgrade(&image));
        drop(inner);
        // What was looked at is dropped without the lock: the last one to go takes it.
        drop(open);
        Ok(image)
    }

    /// An image's last reader, who read until `last`, is gone.
    pub(super) fn closed(&self, root: [u8; 32], bytes: u64, last: SystemTime) {
        let mut inner = lock(&self.inner);
        let open: Vec<_> = inner.open.iter().filter_map(Weak::upgrade).collect();
        match open.iter().any(|image| image.root == root) {
            // Opened anew since then, and counted by who did: its files are in use.
            true => self.give_back(bytes),
            false => inner.idle.push(Idle { root, bytes, last }),
        }
        // Dropped without the lock, as above.
        drop(inner);
        drop(open);
    }

    /// Room for so many bytes. `false` if too much is in use.
    pub(super) fn reserve(&self, len: u64) -> bool {
        if self.used.fetch_add(len, Ordering::AcqRel) + len <= self.limit() {
            return true;
        }
        let made = self.make_room();
        if !made {
            self.give_back(len);
        }
        made
    }

    pub(super) fn give_back(&self, len: u64) {
        self.used.fetch_sub(len, Ordering::AcqRel);
    }

    fn is_full(&self) -> bool {
        self.used() > self.limit()
    }

    fn make_room(&self) -> bool {
        let mut hand = lock(&self.hand);
        while self.is_full() && self.remove_idle() {}
        if !self.is_full() {
            return true;
        }
        let open: Vec<_> = lock(&self.inner)
            .open
            .iter()
            .filter_map(Weak::upgrade)
            .collect();
        // Twice round: the first takes "used lately" away.
        let mut steps = 2 * open
            .iter()
            .map(|image| u64::from(image.count()))
            .sum::<u64>()
            + 2;
        while self.is_full() && steps > 0 {
            let image = match open.get(hand.image) {
                Some(image) if hand.chunk < image.count() => image,
                _ => {
                    hand.image = (hand.image + 1) % open.len().max(1);
                    hand.chunk = 0;
                    steps -= 1;
                    continue;
                }
            };
            if image.evict(hand.chunk) {
                self.evicted.fetch_add(super::CHUNK, Ordering::Relaxed);
            }
            hand.chunk += 1;
            steps -= 1;
        }
        !self.is_full()
    }

    /// Removes the image that was idle longest; `false` if there is none.
    fn remove_idle(&self) -> bool {
        let mut inner = lock(&self.inner);
        let all = inner.idle.iter().enumerate();
        let Some(oldest) = all.min_by_key(|(_, idle)| idle.last).map(|(at, _)| at) else {
            return false;
        };
        let idle = inner.idle.swap_remove(oldest);
        for ending in ["map", "data"] {
            let path = self.folder.join(name(&idle.root, ending));
            if let Err(error) = std::fs::remove_file(&path) {
                tracing::warn!(%error, path = %path.display(), "cannot remove from the cache");
            }
        }
        self.give_back(idle.bytes);
        self.evicted.fetch_add(idle.bytes, Ordering::Relaxed);
        true
    }
}

#[cfg(test)]
mod tests {
    use super::super::Sealed;
    use super::*;

    #[test]
    fn an_image_that_was_opened_anew_before_its_last_reader_had_gone_is_not_idle() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::open(folder.path(), Some(1 << 20)).unwrap();
        let sealed = Sealed {
            root: [7; 32],
            hash_offset: 1 << 20,
        };
        let chunks = Chunks::of(&sealed).unwrap();
        let image = cache.image(&sealed.root, &chunks).unwrap();
        // What the one before kept was counted too.
        assert!(cache.reserve(1000));
        cache.closed(sealed.root, 1000, SystemTime::now());
        assert_eq!(cache.used(), 0);
        assert!(!cache.remove_idle());
        assert!(folder.path().join(name(&sealed.root, "data")).exists());
        drop(image);
        assert!(cache.remove_idle());
        assert!(!folder.path().join(name(&sealed.root, "data")).exists());
    }
}
