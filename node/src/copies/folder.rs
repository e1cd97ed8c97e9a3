//! The files: `whole/` of the cache's folder, root's alone, with a copy a file, and `chunks/` beside it, where the server
//! keeps what it fetched.
//!
//! Everything is found from descriptors of folders that were looked at once. What comes out of `chunks/` is anything: it
//! is opened without waiting and without following a link out of its filesystem, and only ever read. A copy is made
//! without a name, which it gets when it was verified: what is half done goes with the process.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::SystemTime;

use rustix::fs::{
    AtFlags, CWD, Dir, FallocateFlags, FileType, Gid, Mode, OFlags, ResolveFlags, Uid, fallocate,
    fchmod, fchown, fdatasync, fstat, ioctl_ficlone, linkat, mkdir, mkdirat, open, openat, openat2,
    unlinkat,
};
use rustix::io::Errno;

use super::Id;
use super::verity::file_len;
use crate::setup::{Failure, roots_above, roots_alone};

/// Where the server keeps what it fetched.
const CHUNKS: &str = "chunks";
const WHOLE: &str = "whole";
/// Bytes copied at a time, and between two waits for the disk, so that no memory fills with what is not written yet.
const PART: usize = 1 << 20;
const WRITTEN: u64 = 64 << 20;

/// A folder that root owns and nobody else can write.
const ROOTS: OFlags = OFlags::RDONLY
    .union(OFlags::DIRECTORY)
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Folder {
    /// The configured one.
    base: OwnedFd,
    whole: OwnedFd,
}

/// The server's folder in the cache's folder; makes both.
pub(crate) fn of_chunks(cache_dir: &Path, uid: u32, gid: u32) -> io::Result<std::path::PathBuf> {
    let base = owned_base(cache_dir)?;
    make(mkdirat(&base, CHUNKS, Mode::from(0o700)))?;
    let folder = openat(&base, CHUNKS, ROOTS, Mode::empty())?;
    fchmod(&folder, Mode::from(0o700))?;
    fchown(&folder, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    Ok(cache_dir.join(CHUNKS))
}

fn owned_base(cache_dir: &Path) -> io::Result<OwnedFd> {
    make(mkdir(cache_dir, Mode::from(0o755)))?;
    let base = open(cache_dir, ROOTS, Mode::empty())?;
    fchown(&base, Some(Uid::ROOT), Some(Gid::ROOT))?;
    fchmod(&base, Mode::from(0o755))?;
    Ok(base)
}

fn make(made: Result<(), Errno>) -> io::Result<()> {
    match made {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

impl Folder {
    /// The folder as an earlier keeper left it, if one did.
    pub(crate) fn find(cache_dir: &Path) -> Result<Option<Self>, Failure> {
        match rustix::fs::stat(cache_dir.join(WHOLE)) {
            Ok(_) => Self::open(cache_dir).map(Some),
            Err(Errno::NOENT | Errno::NOTDIR) => Ok(None),
            Err(errno) => Err(unusable(cache_dir, errno)),
        }
    }

    /// Makes it, too, where it is not there.
    pub(crate) fn ensure(cache_dir: &Path) -> Result<Self, Failure> {
        let made =
            owned_base(cache_dir).and_then(|base| make(mkdirat(&base, WHOLE, Mode::from(0o700))));
        made.map_err(|error| unusable(cache_dir, error))?;
        Self::open(cache_dir)
    }

    fn open(cache_dir: &Path) -> Result<Self, Failure> {
        let opened = || -> Result<_, Errno> {
            let base = open(cache_dir, ROOTS, Mode::empty())?;
            let whole = openat(&base, WHOLE, ROOTS, Mode::empty())?;
            let facts = (fstat(&base)?, fstat(&whole)?);
            Ok((base, whole, facts))
        };
        let (base, whole, facts) = opened().map_err(|e| unusable(cache_dir, e))?;
        roots_alone(cache_dir, &facts.0)?;
        roots_alone(&cache_dir.join(WHOLE), &facts.1)?;
        roots_above(cache_dir)?;
        Ok(Self { base, whole })
    }

    /// Bytes of the filesystem.
    pub(crate) fn disk(&self) -> io::Result<u64> {
        let disk = rustix::fs::fstatvfs(&self.whole)?;
        Ok(disk.f_blocks.saturating_mul(disk.f_frsize))
    }

    /// What lies there, with the time of its last use; nothing is opened.
    pub(crate) fn list(&self) -> io::Result<Vec<(Id, SystemTime)>> {
        let mut found = Vec::new();
        for entry in Dir::read_from(&self.whole)? {
            let entry = entry?;
            let id = entry.file_name().to_str().ok().and_then(Id::from_name);
            if let Some(id) = id {
                let last = self
                    .open_copy(&id)
                    .and_then(|file| file.metadata()?.modified());
                found.push((id, last.unwrap_or(SystemTime::UNIX_EPOCH)));
            }
        }
        Ok(found)
    }

    /// A copy, to be read; what else may lie there under its name is refused.
    pub(crate) fn open_copy(&self, id: &Id) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = openat(&self.whole, id.name(), flags, Mode::empty())?;
        let facts = fstat(&file)?;
        let right = FileType::from_raw_mode(facts.st_mode) == FileType::RegularFile
            && facts.st_uid == 0
            && facts.st_mode & 0o022 == 0
            && u64::try_from(facts.st_size).ok() == file_len(id.data);
        match right {
            true => Ok(file.into()),
            false => Err(io::Error::other(
                "it is not root's, or not as long as its image",
            )),
        }
    }

    /// What the server has of an image, whatever it is.
    pub(crate) fn open_chunks(&self, id: &Id) -> io::Result<File> {
        let path = format!("{CHUNKS}/{}.data", id.root_hex());
        let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let file = openat2(&self.base, path, flags, Mode::empty(), resolve)?;
        match FileType::from_raw_mode(fstat(&file)?.st_mode) {
            FileType::RegularFile => Ok(file.into()),
            _ => Err(io::Error::other("the cache's file is no regular file")),
        }
    }

    /// A file that nobody can reach, and that only root can open once it has a name.
    pub(crate) fn nameless(&self) -> io::Result<File> {
        let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
        Ok(openat(&self.whole, ".", flags, Mode::from(0o400))?.into())
    }

    /// Gives a file its name.
    pub(crate) fn publish(&self, file: &File, id: &Id) -> io::Result<()> {
        fdatasync(file)?;
        let itself = format!("/proc/self/fd/{}", file.as_raw_fd());
        let flags = AtFlags::SYMLINK_FOLLOW;
        Ok(linkat(CWD, itself, &self.whole, id.name(), flags)?)
    }

    /// Takes a copy's name away. Who reads it goes on; its room is free when nobody does.
    pub(crate) fn remove(&self, id: &Id) {
        match unlinkat(&self.whole, id.name(), AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => tracing::error!(%error, name = id.name(), "cannot remove a copy"),
        }
    }
}

/// All `len` bytes of a file, which may change meanwhile: what arrived is to be looked at afterwards.
pub(crate) fn copy(from: &File, to: &File, len: u64) -> io::Result<()> {
    if from.metadata()?.len() != len {
        return Err(io::Error::other(
            "the cache's file is not as long as the image",
        ));
    }
    // The same blocks of the disk, until one of the two is written.
    if ioctl_ficlone(to, from).is_ok() {
        return to.set_len(len);
    }
    // A full disk is known before anything is written.
    match fallocate(to, FallocateFlags::empty(), 0, len) {
        Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
        Err(errno) => return Err(errno.into()),
    }
    let mut part = vec![0; PART];
    let mut at = 0;
    while at < len {
        let part = &mut part[..(len - at).min(PART as u64) as usize];
        from.read_exact_at(part, at)?;
        to.write_all_at(part, at)?;
        at += part.len() as u64;
        if at.is_multiple_of(WRITTEN) {
            fdatasync(to)?;
        }
    }
    Ok(())
}

fn unusable(cache_dir: &Path, error: impl Into<io::Error>) -> Failure {
    let line = format!("cannot keep whole images in `{}`", cache_dir.display());
    Failure::system(&line, error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, symlink};

    const ID: Id = Id {
        root: [7; 32],
        data: 4096,
    };

    /// A cache's folder with both folders in it, where root runs this.
    fn folder() -> Option<(tempfile::TempDir, Folder)> {
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var_os("CI").is_none(), "CI tests as root");
            eprintln!("left out: needs root");
            return None;
        }
        let dir = tempfile::tempdir().unwrap();
        let cache = dir.path().join("cache");
        assert!(Folder::find(&cache).unwrap().is_none());
        let chunks = of_chunks(&cache, 64304, 64304).unwrap();
        assert_eq!(chunks, cache.join("chunks"));
        assert!(Folder::find(&cache).unwrap().is_none());
        let folder = Folder::ensure(&cache).unwrap();
        assert!(Folder::find(&cache).unwrap().is_some());
        Some((dir, folder))
    }

    #[test]
    fn only_a_file_of_the_caches_own_is_read_and_nothing_waits() {
        let Some((dir, folder)) = folder() else {
            return;
        };
        let name = format!("{}.data", ID.root_hex());
        let at = dir.path().join("cache/chunks").join(&name);
        std::fs::write(dir.path().join("secret"), "of root's").unwrap();
        assert!(folder.open_chunks(&ID).is_err());
        symlink(dir.path().join("secret"), &at).unwrap();
        assert!(folder.open_chunks(&ID).is_err());
        std::fs::remove_file(&at).unwrap();
        rustix::fs::mknodat(CWD, &at, FileType::Fifo, Mode::from(0o600), 0).unwrap();
        assert!(folder.open_chunks(&ID).is_err());
        std::fs::remove_file(&at).unwrap();
        std::fs::create_dir(&at).unwrap();
        assert!(folder.open_chunks(&ID).is_err());
        // Another filesystem, which could be anybody's.
        let none = rustix::mount::MountFlags::empty();
        rustix::mount::mount("berth", &at, "tmpfs", none, c"size=64k").unwrap();
        let inside = folder.open_chunks(&ID).unwrap_err();
        rustix::mount::unmount(&at, rustix::mount::UnmountFlags::DETACH).unwrap();
        assert_eq!(inside.raw_os_error(), Some(Errno::XDEV.raw_os_error()));
        std::fs::remove_dir(&at).unwrap();
        std::fs::write(&at, "chunks").unwrap();
        folder.open_chunks(&ID).unwrap();
    }

    #[test]
    fn a_copy_has_no_name_before_it_is_whole_and_is_roots_alone() {
        let Some((dir, folder)) = folder() else {
            return;
        };
        let whole = dir.path().join("cache/whole");
        let file = folder.nameless().unwrap();
        let source = tempfile::tempfile().unwrap();
        source.write_all_at(b"bytes", 5000).unwrap();
        let short = copy(&source, &file, 8192).unwrap_err();
        assert!(short.to_string().contains("not as long"), "{short}");
        source.set_len(8192).unwrap();
        copy(&source, &file, 8192).unwrap();
        assert_eq!(std::fs::read_dir(&whole).unwrap().count(), 0);
        folder.publish(&file, &ID).unwrap();
        assert!(folder.publish(&file, &ID).is_err());
        let path = whole.join(ID.name());
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o7777, 0o400);
        assert_eq!(std::fs::read(&path).unwrap()[5000..5005], *b"bytes");
        folder.open_copy(&ID).unwrap();
        assert_eq!(folder.list().unwrap()[0].0, ID);
        // Whoever could write it, or make it shorter.
        let with = |mode| {
            std::fs::set_permissions(&path, PermissionsExt::from_mode(mode)).unwrap();
            folder.open_copy(&ID).is_ok()
        };
        assert!(!with(0o620) && !with(0o402) && with(0o400));
        std::os::unix::fs::chown(&path, Some(64304), None).unwrap();
        assert!(folder.open_copy(&ID).is_err());
        std::os::unix::fs::chown(&path, Some(0), None).unwrap();
        file.set_len(8191).unwrap();
        assert!(folder.open_copy(&ID).is_err());
        folder.remove(&ID);
        folder.remove(&ID);
        symlink("/etc/passwd", &path).unwrap();
        assert!(folder.open_copy(&ID).is_err());
    }

    #[test]
    fn a_folder_that_others_can_change_is_not_used() {
        let Some((dir, _)) = folder() else { return };
        let cache = dir.path().join("cache");
        let whole = cache.join("whole");
        let usable = || Folder::find(&cache).is_ok();
        let mode = |path: &Path, mode| {
            std::fs::set_permissions(path, PermissionsExt::from_mode(mode)).unwrap();
        };
        let owner = |path: &Path, uid| std::os::unix::fs::chown(path, Some(uid), None).unwrap();
        for path in [&whole, &cache, dir.path()] {
            assert!(usable());
            owner(path, 64304);
            assert!(!usable(), "{}", path.display());
            owner(path, 0);
            mode(path, 0o777);
            assert!(!usable(), "{}", path.display());
            mode(path, 0o755);
        }
        // One that the server made in the place of root's.
        std::fs::remove_dir(&whole).unwrap();
        std::fs::create_dir(&whole).unwrap();
        owner(&whole, 64304);
        assert!(Folder::ensure(&cache).is_err());
        std::fs::remove_dir(&whole).unwrap();
        symlink(dir.path(), &whole).unwrap();
        assert!(Folder::ensure(&cache).is_err());
    }
}
