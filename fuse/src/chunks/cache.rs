//! What is kept of an image on this node: a sparse file with the image's own offsets, and beside it a map that says
//! which pieces were written.
//!
//! The map is a promise of nothing: after a crash, or when somebody changed the file, a piece may be there in part, so
//! the store checks each one again when it first uses it. Nothing is ever synced.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, FlockOperation};
use rustix::io::Errno;

use super::PIECE;

/// Why there is no cache. The image can be served without.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// A file cannot be opened or written.
    #[error("cannot use the cache file \"{path}\"")]
    Io {
        /// Which.
        path: String,
        /// Why.
        source: io::Error,
    },
    /// Another server has it.
    #[error("the cache file \"{0}\" is in use by another server")]
    InUse(String),
}

const MAGIC: &[u8; 16] = b"berth-pieces-1\0\0";
const HEAD: u64 = 64;

/// The two files. One server uses them at a time.
#[derive(Debug)]
pub struct CacheFile {
    data: File,
    map: File,
}

impl CacheFile {
    /// Opens or makes the cache of the image with this root, in an existing folder. Gives which pieces were there.
    pub fn open(
        folder: &Path,
        root: &[u8; 32],
        pieces: usize,
    ) -> Result<(Self, Vec<bool>), CacheError> {
        let name: String = root.iter().map(|byte| format!("{byte:02x}")).collect();
        let open = |ending: &str| {
            let path = folder.join(format!("{name}.{ending}"));
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .mode(0o600)
                .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
                .open(&path);
            let path = path.display().to_string();
            match file {
                Ok(file) => Ok((file, path)),
                Err(source) => Err(CacheError::Io { path, source }),
            }
        };
        let (map, path) = open("map")?;
        match rustix::fs::flock(&map, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(Errno::WOULDBLOCK) => return Err(CacheError::InUse(path)),
            Err(errno) => {
                let source = errno.into();
                return Err(CacheError::Io { path, source });
            }
        }
        let (data, _) = open("data")?;
        let mut head = [0u8; HEAD as usize];
        head[..16].copy_from_slice(MAGIC);
        head[16..24].copy_from_slice(&PIECE.to_le_bytes());
        head[24..32].copy_from_slice(&(pieces as u64).to_le_bytes());
        head[32..].copy_from_slice(root);
        let cache = Self { data, map };
        let load = || {
            let mut found = [0u8; HEAD as usize];
            let known = cache.map.read_exact_at(&mut found, 0).is_ok() && found == head;
            if !known {
                cache.data.set_len(0)?;
                cache.map.set_len(0)?;
                cache.map.write_all_at(&head, 0)?;
                cache.map.set_len(HEAD + pieces as u64)?;
            }
            let mut flags = vec![0u8; pieces];
            cache.map.read_exact_at(&mut flags, HEAD)?;
            Ok(flags.iter().map(|flag| *flag == 1).collect())
        };
        match load() {
            Ok(flags) => Ok((cache, flags)),
            Err(source) => Err(CacheError::Io { path, source }),
        }
    }

    pub(super) fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        self.data.read_exact_at(buf, offset)
    }

    /// Keeps the tree's head, which is checked whenever it is read and so needs no mark.
    pub(super) fn write_head(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.data.write_all_at(bytes, offset)
    }

    /// Writes a piece and marks it. A full disk is an error like any other.
    pub(super) fn write(&self, piece: usize, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.data.write_all_at(bytes, offset)?;
        self.map.write_all_at(&[1], HEAD + piece as u64)
    }

    /// Forgets a piece and gives its space back.
    pub(super) fn remove(&self, piece: usize, offset: u64, len: u64) -> io::Result<()> {
        self.map.write_all_at(&[0], HEAD + piece as u64)?;
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        rustix::fs::fallocate(&self.data, flags, offset, len)?;
        Ok(())
    }
}
