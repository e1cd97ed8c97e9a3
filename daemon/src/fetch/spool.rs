//! The spool on disk: `spool/sha256/<hex>` for whole blobs, `<hex>.part` for those on their way.
//!
//! Invariant: a file without `.part` had its digest when it was renamed. It is not synced: after a power failure it
//! may be short, so its size is compared at every use, and the converter compares every layer's content with the
//! image's configuration anyway.

use std::fs::{File, FileTimes, OpenOptions};
use std::io::{self, Read as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use berth_image::Digest;
use sha2::{Digest as _, Sha256};

const READ_SIZE: usize = 1 << 20;

/// The folder of blobs.
#[derive(Debug, Clone)]
pub struct Spool {
    dir: PathBuf,
}

/// A blob on its way, being written.
#[derive(Debug)]
pub struct Part {
    pub file: File,
    pub hasher: Sha256,
    /// Bytes that are there, and in `hasher`.
    pub length: u64,
}

/// A file of the spool, for trimming.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SpoolFile {
    pub digest: Digest,
    pub path: PathBuf,
    pub size: u64,
    pub used_at: SystemTime,
}

impl Spool {
    pub fn open(state_dir: &Path) -> io::Result<Self> {
        let dir = state_dir.join("spool").join("sha256");
        std::fs::create_dir_all(&dir)?;
        Ok(Self { dir })
    }

    fn path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(digest.hex())
    }

    fn part_path(&self, digest: &Digest) -> PathBuf {
        self.dir.join(format!("{}.part", digest.hex()))
    }

    /// The whole blob, if it is there. Marks it as used now.
    pub fn whole(&self, digest: &Digest, size: u64) -> io::Result<Option<File>> {
        let file = match File::open(self.path(digest)) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(e),
        };
        if file.metadata()?.len() != size {
            std::fs::remove_file(self.path(digest))?;
            return Ok(None);
        }
        file.set_times(FileTimes::new().set_modified(SystemTime::now()))?;
        Ok(Some(file))
    }

    /// Opens the blob's part, with what an earlier run left of it, hashed again. One longer than `size` is begun anew.
    pub fn part(&self, digest: &Digest, size: u64) -> io::Result<Part> {
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(self.part_path(digest))?;
        if file.metadata()?.len() > size {
            file.set_len(0)?;
        }
        let (mut hasher, mut length) = (Sha256::new(), 0);
        let mut buffer = vec![0; READ_SIZE];
        loop {
            match file.read(&mut buffer)? {
                0 => break,
                n => {
                    hasher.update(&buffer[..n]);
                    length += n as u64;
                }
            }
        }
        Ok(Part {
            file,
            hasher,
            length,
        })
    }

    /// The part's content was found right: it becomes the blob.
    pub fn finish(&self, digest: &Digest) -> io::Result<()> {
        std::fs::rename(self.part_path(digest), self.path(digest))
    }

    /// Removes a blob and its part.
    pub fn remove(&self, digest: &Digest) -> io::Result<()> {
        for path in [self.path(digest), self.part_path(digest)] {
            match std::fs::remove_file(path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
                _ => {}
            }
        }
        Ok(())
    }

    /// Everything in the spool, parts too. Files that are not the spool's are left alone.
    pub fn files(&self) -> io::Result<Vec<SpoolFile>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let hex = name.to_str().map(|n| n.strip_suffix(".part").unwrap_or(n));
            let digest = hex.and_then(|h| Digest::from_hex(h).ok());
            // A file that is removed meanwhile is no longer there to be counted.
            if let (Some(digest), Ok(facts)) = (digest, entry.metadata()) {
                files.push(SpoolFile {
                    digest,
                    path: entry.path(),
                    size: facts.len(),
                    used_at: facts.modified()?,
                });
            }
        }
        Ok(files)
    }
}
