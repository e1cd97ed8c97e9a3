//! A detached FUSE mount, made by the process that keeps its connection.
//!
//! What keeps readers waiting, instead of failing, when a server dies is that somebody else holds the connection and
//! the memory into which requests are read; both are made here, so that a keeper needs nothing of a server's code.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{
    AtFlags, MemfdFlags, Mode, OFlags, SealFlags, StatxFlags, ftruncate, memfd_create, statx,
};
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};
use thiserror::Error;

/// Requests in work at a time on one connection.
pub const SLOTS: usize = 16;
/// Bytes of a slot: 64 for the server's own use, and room for a request as large as the kernel wants it.
pub const SLOT: usize = 64 + 8192;

/// KiB that the kernel reads ahead of who reads in order, where root says so; 128 otherwise. It begins with a few pages
/// and doubles, and reads nothing ahead of who reads here and there; but around a page of a mapped file that is missing
/// it reads so much at once, which may have to come from far. And the sixteen requests of a mount have a buffer each.
pub const READ_AHEAD_KIB: u32 = 512;

/// Why there is no mount.
#[derive(Debug, Error)]
#[error("cannot {step}: {source}")]
pub struct FuseError {
    /// What was tried.
    pub step: &'static str,
    /// What the system said.
    #[source]
    pub source: io::Error,
}

fn failed(step: &'static str) -> impl Fn(Errno) -> FuseError {
    move |errno| FuseError {
        step,
        source: errno.into(),
    }
}

/// A new connection that nothing is mounted on.
///
/// # Errors
/// When `/dev/fuse` does not open.
pub fn open_device() -> Result<OwnedFd, FuseError> {
    let flags = OFlags::RDWR | OFlags::CLOEXEC;
    rustix::fs::open("/dev/fuse", flags, Mode::empty()).map_err(failed("open /dev/fuse"))
}

/// A detached mount of the connection: read-only, nosuid, nodev, permissions checked by the kernel, for all users.
///
/// # Errors
/// The kernel's.
pub fn detached(device: BorrowedFd<'_>) -> Result<OwnedFd, FuseError> {
    let fs =
        fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC).map_err(failed("make a FUSE filesystem"))?;
    let set = |key: &'static str, value: &str| {
        fsconfig_set_string(fs.as_fd(), key, value).map_err(failed(key))
    };
    set("source", "berth")?;
    set("subtype", "berth")?;
    set("fd", &device.as_raw_fd().to_string())?;
    set("rootmode", "40000")?;
    set("user_id", &rustix::process::getuid().as_raw().to_string())?;
    set("group_id", &rustix::process::getgid().as_raw().to_string())?;
    for flag in ["ro", "default_permissions", "allow_other"] {
        fsconfig_set_flag(fs.as_fd(), flag).map_err(failed(flag))?;
    }
    fsconfig_create(fs.as_fd()).map_err(failed("start a FUSE filesystem"))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV;
    fsmount(fs.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, attributes).map_err(failed("mount FUSE"))
}

/// Has the kernel read further ahead on a mount; for root. The server has to allow as much when it answers INIT.
///
/// # Errors
/// The system's: a `/sys` that is not there or read-only, say.
pub fn read_further_ahead(mount: BorrowedFd<'_>) -> io::Result<()> {
    // Nothing that the server would have to be asked for: it may not run yet.
    let flags = AtFlags::EMPTY_PATH | AtFlags::STATX_DONT_SYNC;
    let facts = statx(mount, "", flags, StatxFlags::empty())?;
    let (major, minor) = (facts.stx_dev_major, facts.stx_dev_minor);
    let path = format!("/sys/class/bdi/{major}:{minor}/read_ahead_kb");
    std::fs::write(path, READ_AHEAD_KIB.to_string())
}

/// Memory for the requests in work on one connection; its size can no longer change.
///
/// # Errors
/// The system's.
pub fn request_memory() -> Result<OwnedFd, Errno> {
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    let fd = memfd_create("berth-fuse-requests", flags)?;
    ftruncate(&fd, (SLOT * SLOTS) as u64)?;
    let seals = SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&fd, seals)?;
    Ok(fd)
}
