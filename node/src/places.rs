//! Folders of the node at which users find images: `RUN_DIR/mounts/UID/DIGEST`.
//!
//! They lie on a small filesystem of their own, private to the node's mount namespace, so that one call takes down all
//! that a killed service left. A user's folder is root's, and lets in that user alone (an access list, as a folder that
//! the user owned could be changed under root's hands).

use std::io;
use std::path::{Path, PathBuf};

use std::os::fd::{AsFd, BorrowedFd};

use rustix::fs::{CWD, Mode, OFlags, XattrFlags, fsetxattr, open};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, UnmountFlags, mount, mount_change,
    move_mount, unmount,
};

use crate::setup::Failure;

/// The folder of all of them.
#[derive(Debug)]
pub(crate) struct Places {
    base: PathBuf,
}

impl Places {
    /// Takes down what an earlier service left, and begins anew.
    pub(crate) fn new(run_dir: &Path) -> Result<Self, Failure> {
        let base = run_dir.join("mounts");
        let places = Self { base };
        let made = || -> Result<(), Errno> {
            make_folder(&places.base, 0o755)?;
            places.clear();
            let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
            let options = c"mode=755,size=4m,nr_inodes=65536";
            mount("berth", &places.base, "tmpfs", flags, options)?;
            mount_change(&places.base, MountPropagationFlags::PRIVATE)
        };
        let line = format!("cannot make `{}`", places.base.display());
        made().map_err(|e| Failure::system(&line, e))?;
        Ok(places)
    }

    /// Takes down everything; who is in there keeps it until leaving.
    pub(crate) fn clear(&self) {
        while unmount(&self.base, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).is_ok() {}
    }

    /// Attaches a detached mount where this user, and nobody else, finds it.
    pub(crate) fn attach(&self, tree: BorrowedFd<'_>, uid: u32, name: &str) -> io::Result<PathBuf> {
        let folder = self.base.join(uid.to_string());
        make_folder(&folder, 0o700)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let opened = open(&folder, flags, Mode::empty())?;
        let list = access_list(uid);
        fsetxattr(
            opened.as_fd(),
            c"system.posix_acl_access",
            &list,
            XattrFlags::empty(),
        )?;
        let path = folder.join(name);
        make_folder(&path, 0o700)?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(tree, c"", CWD, &path, flags)?;
        Ok(path)
    }

    /// Takes one down if nobody is in it.
    pub(crate) fn detach(&self, path: &Path) -> io::Result<()> {
        unmount(path, UnmountFlags::NOFOLLOW)?;
        let _ = rustix::fs::rmdir(path);
        Ok(())
    }
}

fn make_folder(path: &Path, mode: u32) -> Result<(), Errno> {
    match rustix::fs::mkdir(path, Mode::from(mode)) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(errno),
    }
}

/// `rwx` for the owner, `r-x` for one user, nothing for all others (acl(5); `linux/posix_acl_xattr.h`, version 2).
fn access_list(uid: u32) -> Vec<u8> {
    const NOBODY: u32 = u32::MAX;
    let entries: [(u16, u16, u32); 5] = [
        (0x01, 7, NOBODY),
        (0x02, 5, uid),
        (0x04, 0, NOBODY),
        (0x10, 5, NOBODY),
        (0x20, 0, NOBODY),
    ];
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}
