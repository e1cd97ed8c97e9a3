//! The container's own layer: a small tree over the image's that holds missing mount points and generated files.
//!
//! A folder that both layers have shows the upper one's owner and mode, so those are copied from the image's.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{
    AtFlags, Gid, Mode, OFlags, Uid, chmodat, chownat, fstat, mkdirat, openat, symlinkat,
};
use rustix::io::Errno;

use super::error::at;
use super::generated::GeneratedFile;
use super::place::Missing;
use super::{ViewError, inside};

/// Fills the empty folder `layer`, which nobody else can reach.
pub(super) fn make(
    layer: BorrowedFd<'_>,
    image: BorrowedFd<'_>,
    missing: &BTreeMap<PathBuf, Missing>,
    files: &[GeneratedFile],
) -> Result<(), ViewError> {
    let mut folders: BTreeSet<&Path> = BTreeSet::from([Path::new("")]);
    for path in missing.keys().chain(files.iter().map(|f| &f.path)) {
        folders.extend(path.ancestors().skip(1));
    }
    let whole =
        |(path, kind): (&'_ PathBuf, &Missing)| (*kind == Missing::Folder).then(|| path.clone());
    let leaves: Vec<PathBuf> = missing.iter().filter_map(whole).collect();
    folders.extend(leaves.iter().map(PathBuf::as_path));
    for path in folders {
        make_folder(layer, image, path)?;
    }
    for (path, kind) in missing {
        match kind {
            Missing::Folder => {}
            Missing::File => make_file(layer, path, b"")?,
            Missing::Link(to) => {
                symlinkat(to, layer, path).map_err(at("make the link", path))?;
            }
        }
    }
    for file in files {
        make_file(layer, &file.path, &file.content)?;
    }
    Ok(())
}

/// Gives `folder` the owner and mode of the image's root.
pub(super) fn copy_root(folder: BorrowedFd<'_>, image: BorrowedFd<'_>) -> Result<(), ViewError> {
    copy_looks(folder, image, Path::new(".")).map_err(at("copy the looks of", "/"))
}

fn make_folder(layer: BorrowedFd<'_>, image: BorrowedFd<'_>, path: &Path) -> Result<(), ViewError> {
    if path.as_os_str().is_empty() {
        return copy_root(layer, image);
    }
    mkdirat(layer, path, Mode::from(0o755))
        .and_then(|()| copy_looks(layer, image, path))
        .map_err(at("make the mount point", path))
}

/// Owner and mode of the folder that the image has at `path`, if it has one.
fn copy_looks(layer: BorrowedFd<'_>, image: BorrowedFd<'_>, path: &Path) -> Result<(), Errno> {
    let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::DIRECTORY;
    if let Ok(original) = inside(image, path, flags) {
        let stat = fstat(original)?;
        let (uid, gid) = (Uid::from_raw(stat.st_uid), Gid::from_raw(stat.st_gid));
        match chownat(layer, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW) {
            // In a user namespace there may be no such owner.
            Err(Errno::PERM | Errno::INVAL) => {}
            other => other?,
        }
        chmodat(
            layer,
            path,
            Mode::from_raw_mode(stat.st_mode),
            AtFlags::empty(),
        )?;
    }
    Ok(())
}

fn make_file(layer: BorrowedFd<'_>, path: &Path, content: &[u8]) -> Result<(), ViewError> {
    let fail = |errno| at("make the file", path)(errno);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let mode = Mode::from(0o644);
    let file = openat(layer.as_fd(), path, flags, mode).map_err(fail)?;
    File::from(file)
        .write_all(content)
        .map_err(|e| ViewError::At {
            step: "write the file",
            target: path.to_owned(),
            source: e,
        })
}
