//! A file for what would take too much memory: written once, in pieces, by any thread.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

/// An unlinked file, open for reading and writing. Pieces never overlap; nothing is ever taken back.
#[derive(Debug)]
pub struct Spill {
    file: File,
    end: AtomicU64,
}

impl Spill {
    /// Takes the file over, from its beginning.
    pub fn new(file: File) -> Self {
        Self {
            file,
            end: AtomicU64::new(0),
        }
    }

    /// Stores a piece and says where.
    pub fn put(&self, bytes: &[u8]) -> io::Result<u64> {
        let at = self.end.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        self.file.write_all_at(bytes, at)?;
        Ok(at)
    }

    /// Fills `out` from what was stored at `at`.
    pub fn get(&self, at: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_exact_at(out, at)
    }

    /// Overwrites the beginning of what was stored at `at`.
    pub fn patch(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, at)
    }
}
