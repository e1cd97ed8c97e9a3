//! The new root: image and layer put together, and the change of root into it.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, fstat, mkdirat, openat, stat};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_create,
    fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};
use rustix::process::{chdir, fchdir, pivot_root};

use super::ViewError;
use super::error::step;

/// Bytes the container's own layer may have when nobody writes into it.
const LAYER_BYTES: u64 = 64 << 20;
/// Files and folders in the container's own layer.
const LAYER_INODES: u64 = 32_768;
/// What a file in memory is taken to cost at least, in bytes.
const BYTES_AN_INODE: u64 = 1024;

/// A filesystem in memory, mounted over the root of this namespace and reached by descriptor alone, where the new root
/// is put together. It goes with the old root.
pub(super) struct Stage {
    tmpfs: OwnedFd,
    layer: OwnedFd,
    upper: OwnedFd,
    writable: bool,
    unprivileged: bool,
}

impl Stage {
    pub(super) fn new(writable_bytes: Option<u64>, unprivileged: bool) -> Result<Stage, ViewError> {
        let context = fsopen("tmpfs", FsOpenFlags::FSOPEN_CLOEXEC).map_err(step("open tmpfs"))?;
        let bytes = LAYER_BYTES + writable_bytes.unwrap_or(0);
        // A file costs memory whatever its size.
        let inodes = LAYER_INODES + writable_bytes.unwrap_or(0) / BYTES_AN_INODE;
        let configured = fsconfig_set_string(&context, "source", "berth")
            .and_then(|()| fsconfig_set_string(&context, "size", bytes.to_string()))
            .and_then(|()| fsconfig_set_string(&context, "nr_inodes", inodes.to_string()))
            .and_then(|()| fsconfig_set_string(&context, "mode", "0755"))
            .and_then(|()| fsconfig_create(&context));
        configured.map_err(step("make a tmpfs"))?;
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        let tmpfs = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(step("mount a tmpfs"))?;
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&tmpfs, c"", CWD, c"/", flags).map_err(step("attach a tmpfs"))?;
        for name in ["layer", "image", "root", "upper", "work"] {
            mkdirat(&tmpfs, name, Mode::from(0o755)).map_err(step("make a folder on a tmpfs"))?;
        }
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let folder = |name| {
            openat(&tmpfs, name, flags, Mode::empty()).map_err(step("open a folder on a tmpfs"))
        };
        let (layer, upper) = (folder("layer")?, folder("upper")?);
        let writable = writable_bytes.is_some();
        Ok(Stage {
            tmpfs,
            layer,
            upper,
            writable,
            unprivileged,
        })
    }

    /// The empty folder for the container's own layer.
    pub(super) fn skeleton(&self) -> BorrowedFd<'_> {
        self.layer.as_fd()
    }

    /// The folder that takes what a writable container writes.
    pub(super) fn upper(&self) -> BorrowedFd<'_> {
        self.upper.as_fd()
    }

    /// Image and layer as one tree, attached: the new root.
    pub(super) fn root_over(&self, image: OwnedFd) -> Result<OwnedFd, ViewError> {
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        move_mount(&image, c"", &self.tmpfs, c"image", flags).map_err(step("attach the image"))?;
        // The layers are named relative to the working directory: no text of anybody's is in the options.
        fchdir(&self.tmpfs).map_err(step("enter a tmpfs"))?;
        let context =
            fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).map_err(step("open overlayfs"))?;
        let set = |key, value| fsconfig_set_string(&context, key, value);
        set("source", "berth").map_err(step("name the overlay"))?;
        set("lowerdir", "layer:image").map_err(step("stack the image's layers"))?;
        let mut attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV;
        if self.writable {
            set("upperdir", "upper").map_err(step("stack the writable layer"))?;
            set("workdir", "work").map_err(step("stack the writable layer"))?;
            if self.unprivileged {
                // Only root may keep `trusted.` attributes.
                fsconfig_set_flag(&context, "userxattr").map_err(step("set up the overlay"))?;
            }
        } else {
            attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
            fsconfig_set_flag(&context, "ro").map_err(step("make the overlay read-only"))?;
        }
        // Attributes in an image must not lead the overlay anywhere else.
        set("redirect_dir", "nofollow").map_err(step("set up the overlay"))?;
        set("metacopy", "off").map_err(step("set up the overlay"))?;
        fsconfig_create(&context).map_err(step("make the overlay"))?;
        let root = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(step("mount the overlay"))?;
        move_mount(&root, c"", &self.tmpfs, c"root", flags).map_err(step("attach the overlay"))?;
        Ok(root)
    }
}

/// Makes `root` this namespace's root and lets go of the old one, with everything below it.
pub(super) fn change_root(root: OwnedFd) -> Result<(), ViewError> {
    fchdir(&root).map_err(step("enter the new root"))?;
    pivot_root(".", ".").map_err(step("change the root"))?;
    // Over the new root now lies the old one, and over that the stage. Each call takes away the topmost.
    for _ in 0..2 {
        unmount(".", UnmountFlags::DETACH).map_err(step("let go of the old root"))?;
    }
    chdir("/").map_err(step("enter the new root"))?;
    // Whoever enters the namespace starts at its topmost root, which is where ".." of the root leads.
    let (new, top) = (fstat(&root), stat("/.."));
    let (new, top) = (
        new.map_err(step("look at the new root"))?,
        top.map_err(step("look at the new root"))?,
    );
    if (new.st_dev, new.st_ino) != (top.st_dev, top.st_ino) {
        return Err(step("let go of the old root")(Errno::BUSY));
    }
    Ok(())
}
