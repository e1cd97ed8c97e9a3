//! The spool on disk: `spool/sha256/<hex>` for whole blobs, `<hex>.<lane>.part` for those on their way. A lane is a
//! registry, or one repository that is fetched from alone.
//!
//! A part holds what one registry sent, and the last byte of a blob is always asked for: a registry gets nothing that
//! it did not have, not even what another one's broken transfer left ([`crate::rights`]).
//!
//! Invariant: a file without `.part` had its digest when it was renamed. It is not synced: after a power failure it
//! may be short, so its size is compared at every use, and the converter compares every layer's content with the
//! image's configuration anyway. What a manifest says of a size is a stranger's word: it never removes good bytes.

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

/// Whose bytes a part holds.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Lane {
    name: String,
    alone: bool,
}

impl Lane {
    /// Of a registry, whose transfer serves all.
    pub fn shared(registry: &str) -> Self {
        Self {
            name: Digest::of(registry.as_bytes()).hex()[..16].to_owned(),
            alone: false,
        }
    }

    /// Of one repository alone.
    pub fn alone(source: &str) -> Self {
        Self {
            alone: true,
            ..Self::shared(source)
        }
    }
}

/// What is known of a blob without reading it.
#[derive(Debug)]
pub enum Held {
    Nothing,
    Whole(File),
    /// A file of another size: a wrong manifest's, or one that a crash cut short.
    OtherSize,
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

    pub(crate) fn part_path(&self, digest: &Digest, lane: &Lane) -> PathBuf {
        self.dir
            .join(format!("{}.{}.part", digest.hex(), lane.name))
    }

    /// The whole blob, if it is there. Marks it as used now.
    pub fn whole(&self, digest: &Digest, size: u64) -> io::Result<Held> {
        let file = match File::open(self.path(digest)) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Held::Nothing),
            Err(e) => return Err(e),
        };
        if file.metadata()?.len() != size {
            return Ok(Held::OtherSize);
        }
        file.set_times(FileTimes::new().set_modified(SystemTime::now()))?;
        Ok(Held::Whole(file))
    }

    /// Makes room for a blob of `size`: a file of another size is read, and removed if it is damaged. If it is good,
    /// it stays, and its size is returned: `size` is wrong.
    pub fn settle(&self, digest: &Digest, size: u64) -> io::Result<Option<u64>> {
        if !matches!(self.whole(digest, size)?, Held::OtherSize) {
            return Ok(None);
        }
        let mut file = File::open(self.path(digest))?;
        let (mut hasher, mut length) = (Sha256::new(), 0);
        hash(&mut file, &mut hasher, &mut length)?;
        if Digest::from_bytes(hasher.finalize().into()) == *digest {
            return Ok(Some(length));
        }
        std::fs::remove_file(self.path(digest))?;
        Ok(None)
    }

    /// Opens the blob's part, with what an earlier run left of it, hashed again; or tells its length when it is longer
    /// than `size`. One source's own part that is too long is begun anew.
    pub fn part(&self, digest: &Digest, lane: &Lane, size: u64) -> io::Result<Result<Part, u64>> {
        let mut file = OpenOptions::new()
            .read(true)
            .append(true)
            .create(true)
            .mode(0o600)
            .open(self.part_path(digest, lane))?;
        let found = file.metadata()?.len();
        if found > size {
            if !lane.alone {
                return Ok(Err(found));
            }
            file.set_len(0)?;
        } else if found == size && size > 0 {
            file.set_len(size - 1)?;
        }
        let (mut hasher, mut length) = (Sha256::new(), 0);
        hash(&mut file, &mut hasher, &mut length)?;
        Ok(Ok(Part {
            file,
            hasher,
            length,
        }))
    }

    /// The part's content was found right: it becomes the blob.
    pub fn finish(&self, digest: &Digest, lane: &Lane) -> io::Result<()> {
        std::fs::rename(self.part_path(digest, lane), self.path(digest))
    }

    /// Removes a part.
    pub fn remove_part(&self, digest: &Digest, lane: &Lane) -> io::Result<()> {
        remove(&self.part_path(digest, lane))
    }

    /// Removes a blob and its parts.
    pub fn remove(&self, digest: &Digest) -> io::Result<()> {
        let files = self.files()?;
        let mut ours = files.iter().filter(|f| f.digest == *digest);
        ours.try_for_each(|f| remove(&f.path))
    }

    /// Everything in the spool, parts too. Files that are not the spool's are left alone.
    pub fn files(&self) -> io::Result<Vec<SpoolFile>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(&self.dir)? {
            let entry = entry?;
            let name = entry.file_name();
            let hex = name.to_str().and_then(|n| n.split('.').next());
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

fn hash(file: &mut File, hasher: &mut Sha256, length: &mut u64) -> io::Result<()> {
    let mut buffer = vec![0; READ_SIZE];
    loop {
        match file.read(&mut buffer)? {
            0 => return Ok(()),
            n => {
                hasher.update(&buffer[..n]);
                *length += n as u64;
            }
        }
    }
}

fn remove(path: &Path) -> io::Result<()> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_wrong_size_removes_nothing_good() {
        let dir = tempfile::tempdir().unwrap();
        let spool = Spool::open(dir.path()).unwrap();
        let (good, shared) = (Digest::of(b"good"), Lane::shared("r"));
        std::fs::write(spool.path(&good), b"good").unwrap();
        assert!(matches!(spool.whole(&good, 3).unwrap(), Held::OtherSize));
        assert_eq!(spool.settle(&good, 3).unwrap(), Some(4));
        assert!(matches!(spool.whole(&good, 4).unwrap(), Held::Whole(_)));
        // What a crash cut short goes.
        std::fs::write(spool.path(&good), b"goo").unwrap();
        assert_eq!(spool.settle(&good, 4).unwrap(), None);
        assert!(matches!(spool.whole(&good, 4).unwrap(), Held::Nothing));

        std::fs::write(spool.part_path(&good, &shared), b"goo").unwrap();
        assert_eq!(spool.part(&good, &shared, 2).unwrap().unwrap_err(), 3);
        assert_eq!(spool.part(&good, &shared, 4).unwrap().unwrap().length, 3);
        // The last byte is asked for even of a part that has it.
        std::fs::write(spool.part_path(&good, &shared), b"good").unwrap();
        assert_eq!(spool.part(&good, &shared, 4).unwrap().unwrap().length, 3);
        // A source's own part is its own.
        let own = Lane::alone("r/a");
        std::fs::write(spool.part_path(&good, &own), b"gooood").unwrap();
        assert_eq!(spool.part(&good, &own, 4).unwrap().unwrap().length, 0);
        assert_eq!(spool.files().unwrap().len(), 2);
    }
}
