//! A block device to a detached SquashFS mount.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen,
};

use crate::MountError;

/// Mounts `device` read-only, nosuid and nodev, attached nowhere.
pub(crate) fn mount(device: &Path) -> Result<OwnedFd, MountError> {
    let context = fsopen("squashfs", FsOpenFlags::FSOPEN_CLOEXEC)
        .map_err(|e| kernel("fsopen", e, String::new()))?;
    let step = |step, result: Result<(), Errno>| {
        result.map_err(|errno| kernel(step, errno, kernel_log(&context)))
    };
    step("source", fsconfig_set_string(&context, "source", device))?;
    step("ro", fsconfig_set_flag(&context, "ro"))?;
    // Kernels built to choose decompressors by mount option start with one for all; others know no such option.
    if fsconfig_set_string(&context, "threads", "percpu").is_err() {
        let _ = kernel_log(&context);
    }
    step("mount", fsconfig_create(&context))?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NODEV;
    fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
        .map_err(|errno| kernel("fsmount", errno, kernel_log(&context)))
}

fn kernel(step: &'static str, errno: Errno, log: String) -> MountError {
    MountError::Kernel {
        step,
        source: io::Error::from(errno),
        log,
    }
}

/// What the kernel wrote about this mount: lines like `e squashfs: …`, each one read.
fn kernel_log(context: impl AsFd) -> String {
    let mut log = String::new();
    let mut line = [0; 512];
    while let Ok(length @ 1..) = rustix::io::read(&context, &mut line) {
        if let Some(error) = line[..length].strip_prefix(b"e ")
            && log.len() < 2048
        {
            log.push_str(": ");
            log.push_str(String::from_utf8_lossy(error).trim());
        }
    }
    log
}
