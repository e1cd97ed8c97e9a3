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
        let at = self.reserve(bytes.len() as u64);
        self.file.write_all_at(bytes, at)?;
        Ok(at)
    }

    /// Room for a piece of so many bytes, which are zeros until they are [patched](Self::patch).
    pub fn reserve(&self, length: u64) -> u64 {
        self.end.fetch_add(length, Ordering::Relaxed)
    }

    /// Fills `out` from what was stored at `at`.
    pub fn get(&self, mut at: u64, mut out: &mut [u8]) -> io::Result<()> {
        while !out.is_empty() {
            match self.file.read_at(out, at) {
                // Behind the file's end: room that nothing was put into yet.
                Ok(0) => {
                    out.fill(0);
                    break;
                }
                Ok(n) => {
                    at += n as u64;
                    out = &mut out[n..];
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    /// Overwrites a part of what was stored, from `at` on.
    pub fn patch(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_all_at(bytes, at)
    }
}
