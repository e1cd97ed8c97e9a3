//! The store on the parallel filesystem: opening it, and publishing into it.
//!
//! One process writes (the sealer), any number read. Invariant: a name below `images/` or `refs/` holds whole content
//! from the moment it can be seen. So everything is written under `tmp/`, which lies on the same filesystem, synced,
//! renamed, and its new folder synced. There are no locks: nodes never write.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, Mode, OFlags, fsync, mkdirat, openat, renameat, statat, unlinkat};
use rustix::io::Errno;

use crate::digest::{Digest, hex};
use crate::layout;
use crate::platform::Platform;
use crate::reference::ImageRef;
use crate::shown::clip;

const FIRST_LINE: &str = "berth-store 1";

/// Why a store cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("`{path}` is not a Berth store: it has no FORMAT file (is the filesystem mounted?)")]
    NoFormat { path: PathBuf },
    #[error("`{path}` holds a store of format `{found}`, this version reads `{FIRST_LINE}`")]
    Format { path: PathBuf, found: String },
    #[error("`{path}` is another store: its UUID is {found}, expected {expected}")]
    Uuid {
        path: PathBuf,
        found: String,
        expected: String,
    },
    #[error("`{path}` belongs to `{found}`, not to `{expected}`")]
    Owner {
        path: PathBuf,
        found: String,
        expected: String,
    },
    #[error("`{path}` is not empty and not a Berth store")]
    NotEmpty { path: PathBuf },
    #[error("{what} `{path}`: {source}")]
    Io {
        what: &'static str,
        path: PathBuf,
        source: io::Error,
    },
}

/// What a store's `FORMAT` file says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Format {
    /// 32 hexadecimal digits, drawn when the store was made.
    pub uuid: String,
    /// The name of the one daemon that may write here.
    pub owner: String,
}

/// A store, opened by its root folder. Paths given to its methods are relative to that folder.
#[derive(Debug)]
pub struct Store {
    root: OwnedFd,
    path: PathBuf,
    format: Format,
}

/// A file below `tmp/` that vanishes when dropped, unless it was published.
#[derive(Debug)]
pub struct Temp<'a> {
    store: &'a Store,
    name: Option<PathBuf>,
    file: File,
}

impl Store {
    /// Makes an empty store in `path`, which must be empty or not exist. Only `berth store init` does this: a daemon
    /// that made a store where it found none would publish into an unmounted filesystem's empty mount point.
    pub fn init(path: &Path, owner: &str) -> Result<Self, StoreError> {
        let io = |what| {
            move |source: io::Error| StoreError::Io {
                what,
                path: path.to_owned(),
                source,
            }
        };
        std::fs::create_dir_all(path).map_err(io("cannot create the store"))?;
        let mut entries = std::fs::read_dir(path).map_err(io("cannot read"))?;
        if entries.any(|e| e.is_ok_and(|e| e.file_name() != "lost+found")) {
            return Err(StoreError::NotEmpty {
                path: path.to_owned(),
            });
        }
        let mut random = [0u8; 16];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())
            .map_err(|e| io("cannot draw a UUID for")(e.into()))?;
        let format = Format {
            uuid: hex(&random),
            owner: owner.to_owned(),
        };
        let root = open_dir(CWD, path).map_err(|e| io("cannot open")(e.into()))?;
        for dir in [layout::IMAGES, layout::REFS, layout::TMP, layout::TRASH] {
            mkdirat(&root, dir, Mode::from_raw_mode(0o755))
                .map_err(|e| io("cannot fill")(e.into()))?;
        }
        let store = Self {
            root,
            path: path.to_owned(),
            format,
        };
        let text = format!(
            "{FIRST_LINE}\nuuid: {}\nowner: {owner}\n",
            store.format.uuid
        );
        store
            .publish_bytes(Path::new(layout::FORMAT), text.as_bytes())
            .map_err(io("cannot write"))?;
        Ok(store)
    }

    /// Opens the store in `path`. Whoever knows its UUID or its owner passes them, and another store is refused.
    pub fn open(path: &Path, uuid: Option<&str>, owner: Option<&str>) -> Result<Self, StoreError> {
        let io = |what| {
            move |e: Errno| StoreError::Io {
                what,
                path: path.to_owned(),
                source: e.into(),
            }
        };
        let root = open_dir(CWD, path).map_err(io("cannot open the store"))?;
        let text = match read_small(&root, Path::new(layout::FORMAT), 4096) {
            Ok(bytes) => String::from_utf8_lossy(&bytes).into_owned(),
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(StoreError::NoFormat {
                    path: path.to_owned(),
                });
            }
            Err(source) => {
                return Err(StoreError::Io {
                    what: "cannot read FORMAT of",
                    path: path.to_owned(),
                    source,
                });
            }
        };
        let mut lines = text.lines();
        let first = lines.next().unwrap_or_default();
        if first != FIRST_LINE {
            return Err(StoreError::Format {
                path: path.to_owned(),
                found: clip(first),
            });
        }
        let value = |key: &str| {
            let line = text
                .lines()
                .find_map(|l| l.strip_prefix(key)?.strip_prefix(':'));
            line.map(|v| v.trim().to_owned()).unwrap_or_default()
        };
        let format = Format {
            uuid: value("uuid"),
            owner: value("owner"),
        };
        if let Some(expected) = uuid.filter(|u| *u != format.uuid) {
            let (found, expected) = (clip(&format.uuid), expected.to_owned());
            return Err(StoreError::Uuid {
                path: path.to_owned(),
                found,
                expected,
            });
        }
        if let Some(expected) = owner.filter(|o| *o != format.owner) {
            let (found, expected) = (clip(&format.owner), expected.to_owned());
            return Err(StoreError::Owner {
                path: path.to_owned(),
                found,
                expected,
            });
        }
        Ok(Self {
            root,
            path: path.to_owned(),
            format,
        })
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    pub fn format(&self) -> &Format {
        &self.format
    }

    /// The whole of a small file, at most `limit` bytes.
    pub fn read(&self, relative: &Path, limit: usize) -> io::Result<Vec<u8>> {
        read_small(&self.root, relative, limit)
    }

    /// Opens a file for reading.
    pub fn open_file(&self, relative: &Path) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        Ok(openat(&self.root, relative, flags, Mode::empty())?.into())
    }

    /// A new empty file below `tmp/`, open for reading and writing, readable by everybody once published.
    pub fn create_temp(&self) -> io::Result<Temp<'_>> {
        let mut random = [0u8; 16];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let name = Path::new(layout::TMP).join(hex(&random));
        let flags =
            OFlags::RDWR | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = openat(&self.root, &name, flags, Mode::from_raw_mode(0o644))?;
        Ok(Temp {
            store: self,
            name: Some(name),
            file: file.into(),
        })
    }

    /// Writes `bytes` to a temporary file and publishes it as `relative`, replacing what was there.
    pub fn publish_bytes(&self, relative: &Path, bytes: &[u8]) -> io::Result<()> {
        let mut temp = self.create_temp()?;
        temp.file.write_all(bytes)?;
        temp.publish(relative)
    }

    /// Takes an image away: its record first, so that nobody finds it any more, then its data file to `trash/`, where
    /// running jobs keep reading it. Returns whether there was a record.
    pub fn remove_image(&self, manifest: &Digest, platform: &Platform) -> io::Result<bool> {
        let dir = layout::image_dir(manifest, platform);
        let existed = match unlinkat(&self.root, dir.join(layout::RECORD), AtFlags::empty()) {
            Ok(()) => true,
            Err(Errno::NOENT) => false,
            Err(e) => return Err(e.into()),
        };
        self.sync_dir(&dir).or_else(not_found_is_done)?;
        self.trash(&dir)?;
        Ok(existed)
    }

    /// Removes what an interrupted run left: files below `tmp/`, and image folders that have no record. Returns how
    /// many of each. Only the sealer may call this, before it starts any work.
    pub fn sweep(&self) -> io::Result<(usize, usize)> {
        let mut temps = 0;
        for name in self.list(Path::new(layout::TMP))? {
            unlinkat(
                &self.root,
                Path::new(layout::TMP).join(name),
                AtFlags::empty(),
            )?;
            temps += 1;
        }
        let mut halves = 0;
        for (manifest, platform) in self.image_dirs()? {
            let dir = layout::image_dir(&manifest, &platform);
            if !self.exists(&dir.join(layout::RECORD))? {
                self.trash(&dir)?;
                halves += 1;
            }
        }
        Ok((temps, halves))
    }

    /// Every image folder, with or without a record, in no particular order.
    pub fn image_dirs(&self) -> io::Result<Vec<(Digest, Platform)>> {
        let base = Path::new(layout::IMAGES).join("sha256");
        let mut found = Vec::new();
        for fan in self.list(&base).or_else(not_found_is_done)? {
            for name in self.list(&base.join(fan))? {
                found.extend(name.to_str().and_then(layout::parse_image_dir));
            }
        }
        Ok(found)
    }

    /// The references that have a signed entry, with the entry's path relative to the store, in no particular order.
    pub fn ref_entries(&self) -> io::Result<Vec<(ImageRef, PathBuf)>> {
        let mut found = Vec::new();
        let mut folders = vec![PathBuf::from(layout::REFS)];
        while let Some(folder) = folders.pop() {
            let entries = match std::fs::read_dir(self.path.join(&folder)) {
                Err(e) if e.kind() == io::ErrorKind::NotFound => continue,
                entries => entries?,
            };
            for entry in entries {
                let entry = entry?;
                let path = folder.join(entry.file_name());
                if entry.file_type()?.is_dir() {
                    folders.push(path);
                } else if let Some(reference) = layout::parse_ref_entry(&path) {
                    found.push((reference, path));
                }
            }
        }
        Ok(found)
    }

    /// Removes what lies in `trash/`: to be called when no job that started before it was put there still runs.
    pub fn empty_trash(&self) -> io::Result<usize> {
        let names = self.list(Path::new(layout::TRASH))?;
        for name in &names {
            std::fs::remove_dir_all(self.path.join(layout::TRASH).join(name))?;
        }
        Ok(names.len())
    }

    fn trash(&self, dir: &Path) -> io::Result<()> {
        let mut random = [0u8; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let name = dir
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        let target = Path::new(layout::TRASH).join(format!("{name}.{}", hex(&random)));
        match renameat(&self.root, dir, &self.root, &target) {
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }

    fn exists(&self, relative: &Path) -> io::Result<bool> {
        Ok(self.size_of(relative)?.is_some())
    }

    /// Bytes of a file; `None` where there is none.
    pub fn size_of(&self, relative: &Path) -> io::Result<Option<u64>> {
        match statat(&self.root, relative, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(found) => Ok(Some(found.st_size as u64)),
            Err(Errno::NOENT) => Ok(None),
            Err(e) => Err(e.into()),
        }
    }

    fn list(&self, relative: &Path) -> io::Result<Vec<PathBuf>> {
        let entries = std::fs::read_dir(self.path.join(relative))?;
        entries
            .map(|e| e.map(|e| PathBuf::from(e.file_name())))
            .collect()
    }

    /// Makes a folder and those above it, each synced into its parent so that a crash keeps the path whole.
    fn ensure_dir(&self, relative: &Path) -> io::Result<()> {
        let mut path = PathBuf::new();
        for part in relative.components() {
            let parent = path.clone();
            path.push(part);
            match mkdirat(&self.root, &path, Mode::from_raw_mode(0o755)) {
                Ok(()) => self.sync_dir(&parent)?,
                Err(Errno::EXIST) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    fn sync_dir(&self, relative: &Path) -> io::Result<()> {
        let relative = if relative.as_os_str().is_empty() {
            Path::new(".")
        } else {
            relative
        };
        Ok(fsync(open_dir(&self.root, relative)?)?)
    }
}

impl Temp<'_> {
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Syncs the file, renames it to `relative` and syncs that folder.
    pub fn publish(mut self, relative: &Path) -> io::Result<()> {
        self.file.sync_all()?;
        let Some(name) = self.name.take() else {
            return Ok(());
        };
        let dir = relative.parent().unwrap_or(Path::new(""));
        let result = (|| {
            self.store.ensure_dir(dir)?;
            match renameat(&self.store.root, &name, &self.store.root, relative) {
                Ok(()) => Ok(()),
                // A retried NFS rename may report failure after it succeeded: the target tells.
                Err(e) if self.is_published_as(relative) => {
                    let _ = e;
                    Ok(())
                }
                Err(e) => Err(io::Error::from(e)),
            }?;
            self.store.sync_dir(dir)
        })();
        if result.is_err() {
            // Best effort: the sweep at the sealer's next start takes what stays.
            let _ = unlinkat(&self.store.root, &name, AtFlags::empty());
        }
        result
    }

    fn is_published_as(&self, relative: &Path) -> bool {
        let target = statat(&self.store.root, relative, AtFlags::SYMLINK_NOFOLLOW);
        let ours = rustix::fs::fstat(&self.file);
        matches!((target, ours), (Ok(t), Ok(o)) if t.st_ino == o.st_ino && t.st_dev == o.st_dev)
    }
}

impl Drop for Temp<'_> {
    fn drop(&mut self) {
        if let Some(name) = self.name.take() {
            let _ = unlinkat(&self.store.root, name, AtFlags::empty());
        }
    }
}

fn open_dir(at: impl std::os::fd::AsFd, path: &Path) -> rustix::io::Result<OwnedFd> {
    openat(
        at,
        path,
        OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
        Mode::empty(),
    )
}

fn read_small(root: &OwnedFd, relative: &Path, limit: usize) -> io::Result<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let file = File::from(openat(root, relative, flags, Mode::empty())?);
    let mut bytes = Vec::new();
    file.take(limit as u64 + 1).read_to_end(&mut bytes)?;
    if bytes.len() > limit {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("larger than {limit} bytes"),
        ));
    }
    Ok(bytes)
}

fn not_found_is_done<T: Default>(e: io::Error) -> io::Result<T> {
    if e.kind() == io::ErrorKind::NotFound {
        Ok(T::default())
    } else {
        Err(e)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unmounted_store_is_not_an_empty_one() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(
            Store::open(dir.path(), None, None),
            Err(StoreError::NoFormat { .. })
        ));
        let made = Store::init(dir.path(), "site").unwrap();
        let uuid = made.format().uuid.clone();
        assert!(Store::open(dir.path(), Some(&uuid), Some("site")).is_ok());
        assert!(matches!(
            Store::open(dir.path(), Some("00"), None),
            Err(StoreError::Uuid { .. })
        ));
        assert!(matches!(
            Store::open(dir.path(), None, Some("other")),
            Err(StoreError::Owner { .. })
        ));
        assert!(matches!(
            Store::init(dir.path(), "site"),
            Err(StoreError::NotEmpty { .. })
        ));
    }

    #[test]
    fn half_done_work_is_swept_and_whole_images_stay() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(dir.path(), "site").unwrap();
        let platform = Platform::host();
        let (whole, half) = (Digest::of(b"whole"), Digest::of(b"half"));
        for image in [&whole, &half] {
            store
                .publish_bytes(
                    &layout::image_dir(image, &platform).join("rootfs-x.squashfs"),
                    b"data",
                )
                .unwrap();
        }
        store
            .publish_bytes(&layout::record(&whole, &platform), b"record")
            .unwrap();
        std::fs::write(dir.path().join("tmp/left"), "x").unwrap();

        assert_eq!(store.sweep().unwrap(), (1, 1));
        assert_eq!(store.image_dirs().unwrap(), [(whole, platform.clone())]);
        assert_eq!(store.empty_trash().unwrap(), 1);

        assert!(store.remove_image(&whole, &platform).unwrap());
        assert!(!store.remove_image(&whole, &platform).unwrap());
        assert_eq!(store.image_dirs().unwrap(), []);
    }

    #[test]
    fn a_dropped_temporary_file_leaves_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let store = Store::init(dir.path(), "site").unwrap();
        drop(store.create_temp().unwrap());
        assert_eq!(
            std::fs::read_dir(dir.path().join("tmp")).unwrap().count(),
            0
        );
    }
}
