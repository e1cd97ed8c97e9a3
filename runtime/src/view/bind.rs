//! One thing of the node's that appears in the image: opened, cloned, attached.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, OFlags, StatVfsMountFlags, fstat, fstatvfs};
use rustix::mount::{MountAttrFlags, MoveMountFlags, OpenTreeFlags, move_mount, open_tree};

use super::error::at;
use super::{Spot, ViewError, inside};
use crate::opener::{OpenError, Opener};
use crate::sys::mount_set_attributes;

/// Why users bind nothing there.
pub(super) const NOT_IN_SYSTEM: &str = "not allowed in /proc and /sys";

/// A bind, as asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Bind {
    /// What it is, for messages: "the home folder".
    pub what: &'static str,
    /// Absolute, in the task's mount namespace; opened with the user's rights.
    pub source: PathBuf,
    /// Absolute, in the image.
    pub target: PathBuf,
    pub read_only: bool,
    pub kind: Kind,
    pub if_absent: IfAbsent,
}

/// A symbolic link in the container's own layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Link {
    /// Absolute, in the image.
    pub path: PathBuf,
    /// Where it leads.
    pub to: PathBuf,
    /// Made also where the image has something of that name.
    pub replace: bool,
}

/// What a bind may do and where it may go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `/proc`, `/sys`: the image must have a folder of that name, or nothing; no symbolic link.
    System,
    /// `/dev`: the same, and devices work there.
    Devices,
    /// Anything else: `nosuid,nodev`, and where the target already shows the source, nothing is done.
    Ordinary,
    /// Only where the image has nothing, or an empty folder.
    Fallback,
    /// What users asked for: [`Kind::Ordinary`], and not at `/` or below the system's folders.
    Users,
}

/// What to do when the source cannot be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IfAbsent {
    Fail,
    /// Go on without it if there is nothing of that name.
    Skip,
    /// Go on without it, whatever the reason; but not when its filesystem hangs.
    SkipAny,
}

/// A bind whose source was opened.
pub(super) struct OpenBind<'a> {
    pub(super) bind: &'a Bind,
    pub(super) source: OwnedFd,
    pub(super) is_dir: bool,
}

/// Opens all sources, as the user.
pub(super) fn open_sources<'a>(
    binds: &'a [Bind],
    opener: &mut Opener,
) -> Result<Vec<OpenBind<'a>>, ViewError> {
    let paths: Vec<&Path> = binds.iter().map(|b| b.source.as_path()).collect();
    let mut opened = Vec::with_capacity(binds.len());
    for (bind, answer) in binds.iter().zip(opener.places(&paths)) {
        let source = match answer {
            Ok(source) => source,
            Err(e) if bind.if_absent == IfAbsent::Skip && e.is_absent() => continue,
            // What does not answer now would not answer the job either.
            Err(OpenError::Refused(_)) if bind.if_absent == IfAbsent::SkipAny => continue,
            Err(source) => {
                return Err(ViewError::Source {
                    what: bind.what,
                    path: bind.source.clone(),
                    source,
                });
            }
        };
        let stat = fstat(&source).map_err(at("look at", &bind.source))?;
        let is_dir = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        opened.push(OpenBind {
            bind,
            source,
            is_dir,
        });
    }
    Ok(opened)
}

/// A clone of the source's mounts, detached. Before anything is attached: a clone of `/` must not hold our own mounts.
pub(super) fn clone_tree(open: &OpenBind<'_>) -> Result<OwnedFd, ViewError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE
        | OpenTreeFlags::OPEN_TREE_CLOEXEC
        | OpenTreeFlags::AT_EMPTY_PATH
        | OpenTreeFlags::AT_RECURSIVE;
    let tree = open_tree(&open.source, c"", flags).map_err(at("clone", &open.bind.source))?;
    let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID;
    if open.bind.kind != Kind::Devices {
        attributes |= MountAttrFlags::MOUNT_ATTR_NODEV;
    }
    if open.bind.read_only {
        attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
    }
    mount_set_attributes(tree.as_fd(), attributes.bits().into())
        .map_err(at("restrict", &open.bind.source))?;
    Ok(tree)
}

/// Puts a tree where it belongs below `root`. A mount point in what an earlier bind shows is a place in somebody's real
/// folders, so the user looks for it.
pub(super) fn attach(
    root: BorrowedFd<'_>,
    opener: &mut Opener,
    open: &OpenBind<'_>,
    spot: &Spot,
    tree: BorrowedFd<'_>,
) -> Result<(), ViewError> {
    let bind = open.bind;
    let target = match spot {
        Spot::At(path) => {
            inside(root, path, OFlags::PATH).map_err(at("open the mount point", &bind.target))?
        }
        Spot::Below { bound } => match opener.inside(root, &bind.target) {
            Ok(target) => target,
            Err(e) if e.is_absent() => {
                return Err(ViewError::Foreign {
                    what: bind.what,
                    target: bind.target.clone(),
                    bound: bound.clone(),
                });
            }
            Err(source) => {
                return Err(ViewError::Source {
                    what: bind.what,
                    path: bind.target.clone(),
                    source,
                });
            }
        },
    };
    if bind.kind == Kind::Users && is_systems(root, target.as_fd()) {
        return Err(ViewError::Target {
            what: bind.what,
            target: bind.target.clone(),
            why: NOT_IN_SYSTEM,
        });
    }
    let there = fstat(&target).map_err(at("look at", &bind.target))?;
    if !matches!(bind.kind, Kind::System | Kind::Devices) && !bind.read_only {
        let source = fstat(&open.source).map_err(at("look at", &bind.source))?;
        let same = (there.st_dev, there.st_ino) == (source.st_dev, source.st_ino);
        if same && is_read_only(&target) == is_read_only(&open.source) {
            return Ok(());
        }
    }
    let target_is_dir = FileType::from_raw_mode(there.st_mode) == FileType::Directory;
    if target_is_dir != open.is_dir {
        return Err(ViewError::Unfit {
            what: bind.what,
            target: bind.target.clone(),
            found: if target_is_dir { "a folder" } else { "a file" },
        });
    }
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    move_mount(tree, c"", &target, c"", flags).map_err(at("mount at", &bind.target))
}

/// Whether a place below `root` is in its `/proc` or `/sys`, whatever names and links led there.
fn is_systems(root: BorrowedFd<'_>, place: BorrowedFd<'_>) -> bool {
    let path = |fd: BorrowedFd<'_>| std::fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()));
    let (Ok(root), Ok(place)) = (path(root), path(place)) else {
        // What cannot be told is not allowed.
        return true;
    };
    match place.strip_prefix(&root) {
        Ok(below) => below.starts_with("proc") || below.starts_with("sys"),
        Err(_) => true,
    }
}

fn is_read_only(place: &OwnedFd) -> bool {
    fstatvfs(place).is_ok_and(|s| s.f_flag.contains(StatVfsMountFlags::RDONLY))
}
