//! Mounting a connection to a server.
//!
//! With the right to mount (root, or root of a user namespace) a detached mount is made by descriptors, to be attached
//! here or handed to somebody else; without, `fusermount3` does it.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::Command;

use berth_mount::fuse::FuseError;
pub use berth_mount::fuse::{detached, open_device, read_further_ahead};
use rustix::fs::CWD;
use rustix::io::{Errno, FdFlags};
use rustix::mount::{MoveMountFlags, move_mount};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SocketFlags, SocketType,
};

/// Why there is no mount.
#[derive(Debug, thiserror::Error)]
pub enum MountError {
    /// The kernel makes no mount.
    #[error(transparent)]
    Kernel(#[from] FuseError),
    /// The folder takes none.
    #[error("cannot mount there: {0}")]
    Attach(Errno),
    /// `fusermount3` could not be run, or did not mount.
    #[error("fusermount3 did not mount: {0}")]
    Helper(String),
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
    .map_err(MountError::Attach)
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
