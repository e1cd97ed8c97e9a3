//! A detached mount of a FUSE connection.
//!
//! Works with the right to mount, which is root's, or that of a process in a user namespace of its own: the connection
//! must have been opened in the namespace in which it is mounted.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};
use thiserror::Error;

/// Why there is no mount.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum FuseError {
    /// `/dev/fuse` does not open.
    #[error("cannot open /dev/fuse: {}", words(.0))]
    Device(Errno),
    /// A step of mounting failed.
    #[error("cannot mount through FUSE ({step}): {}", words(errno))]
    Mount {
        /// Which call or option.
        step: &'static str,
        /// What the kernel said.
        errno: Errno,
    },
}

fn words(errno: &Errno) -> String {
    crate::error::plain(&(*errno).into())
}

/// A new connection that nothing is mounted on.
pub fn open_device() -> Result<OwnedFd, FuseError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open("/dev/fuse", flags, Mode::empty()).map_err(FuseError::Device)
}

/// A mount of the connection, attached nowhere: read-only, nosuid, nodev, permissions checked by the kernel, for all
/// users of this user namespace. Returns before anybody serves it.
pub fn detached(device: BorrowedFd<'_>) -> Result<OwnedFd, FuseError> {
    let step = |step| move |errno| FuseError::Mount { step, errno };
    let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(step("fsopen"))?;
    let context = context.as_fd();
    let set = |key: &'static str, value: &str| {
        fsconfig_set_string(context, key, value).map_err(step(key))
    };
    set("source", "berth")?;
    set("subtype", "berth")?;
    set("fd", &device.as_raw_fd().to_string())?;
    set("rootmode", "40000")?;
    set("user_id", &rustix::process::getuid().as_raw().to_string())?;
    set("group_id", &rustix::process::getgid().as_raw().to_string())?;
    for flag in ["ro", "default_permissions", "allow_other"] {
        fsconfig_set_flag(context, flag).map_err(step(flag))?;
    }
    fsconfig_create(context).map_err(step("create"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV;
    fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(step("fsmount"))
}
