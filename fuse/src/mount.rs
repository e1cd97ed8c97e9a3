//! Mounting a connection to a server.
//!
//! With the right to mount (root, or root of a user namespace) a detached mount is made by descriptors, to be attached
//! here or handed to somebody else; without, `fusermount3` does it.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::Command;

use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::{Errno, FdFlags};
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount,
};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};

/// Why there is no mount.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// `/dev/fuse` does not open.
    #[error("cannot open /dev/fuse: {0}")]
    Device(Errno),
    /// A step of mounting failed.
    #[error("cannot mount ({step}): {errno}")]
    Mount {
        /// Which call.
        step: &'static str,
        /// What the kernel said.
        errno: Errno,
    },
    /// `fusermount3` could not be run, or did not mount.
    #[error("fusermount3 did not mount: {0}")]
    Helper(String),
}

fn step(step: &'static str) -> impl Fn(Errno) -> MountError {
    move |errno| MountError::Mount { step, errno }
}

/// A new connection that nothing is mounted on.
pub fn open_device() -> Result<OwnedFd, MountError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open("/dev/fuse", flags, Mode::empty()).map_err(MountError::Device)
}

/// A detached mount of the connection: read-only, nosuid, nodev, permissions checked by the kernel, for all users.
pub fn detached(device: BorrowedFd<'_>) -> Result<OwnedFd, MountError> {
    let fs = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(step("fsopen"))?;
    let fs_fd = std::os::fd::AsFd::as_fd(&fs);
    let set =
        |key: &'static str, value: &str| fsconfig_set_string(fs_fd, key, value).map_err(step(key));
    set("source", "berth")?;
    set("subtype", "berth")?;
    set("fd", &device.as_raw_fd().to_string())?;
    set("rootmode", "40000")?;
    set("user_id", &rustix::process::getuid().as_raw().to_string())?;
    set("group_id", &rustix::process::getgid().as_raw().to_string())?;
    for flag in ["ro", "default_permissions", "allow_other"] {
        fsconfig_set_flag(fs_fd, flag).map_err(step(flag))?;
    }
    fsconfig_create(fs_fd).map_err(step("create"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV;
    fsmount(fs_fd, FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(step("fsmount"))
}

/// Attaches a detached mount to a folder.
pub fn attach(mount: BorrowedFd<'_>, folder: &Path) -> Result<(), MountError> {
    move_mount(
        mount,
        c"",
        CWD,
        folder,
        MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
    )
    .map_err(step("move_mount"))
}

/// Mounts on `folder` by `fusermount3`, for this user only; gives the connection.
pub fn by_helper(folder: &Path) -> Result<OwnedFd, MountError> {
    let helper =
        |what: &str, error: &dyn std::fmt::Display| MountError::Helper(format!("{what}: {error}"));
    let (ours, theirs) = rustix::net::socketpair(
        AddressFamily::UNIX,
        SocketType::STREAM,
        SocketFlags::CLOEXEC,
        None,
    )
    .map_err(|e| helper("socketpair", &e))?;
    rustix::io::fcntl_setfd(&theirs, FdFlags::empty()).map_err(|e| helper("fcntl", &e))?;
    let output = Command::new("fusermount3")
        .env("_FUSE_COMMFD", theirs.as_raw_fd().to_string())
        .args([
            "-o",
            "ro,nosuid,nodev,default_permissions,fsname=berth,subtype=berth",
            "--",
        ])
        .arg(folder)
        .output()
        .map_err(|e| helper("cannot run it", &e))?;
    drop(theirs);
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        return Err(MountError::Helper(said.trim().to_owned()));
    }
    let mut byte = [0u8; 1];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    rustix::net::recvmsg(
        &ours,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )
    .map_err(|e| helper("no descriptor came", &e))?;
    control
        .drain()
        .find_map(|message| match message {
            RecvAncillaryMessage::ScmRights(mut fds) => fds.next(),
            _ => None,
        })
        .ok_or_else(|| MountError::Helper("no descriptor came".to_owned()))
}
