//! Capabilities of a task: kept over Slurm's change of user, used for one `setns`, then gone for good.
//!
//! Raw system calls only. From `enter` on, the process looks at files that belong to an image: nothing here or after it
//! in this crate opens, loads or looks up anything by path, but for one `chdir` that comes when nothing is left to abuse.
#![allow(unsafe_code, reason = "raw system calls between setns and exec")]

use crate::ffi::errno;
use std::ffi::{CStr, c_int, c_long, c_ulong};
use std::os::fd::{AsRawFd as _, BorrowedFd};

const CAP_SETPCAP: u32 = 8;
const CAP_SYS_CHROOT: u32 = 18;
const CAP_SYS_ADMIN: u32 = 21;
/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION: u32 = 0x2008_0522;

#[repr(C)]
struct Header {
    version: u32,
    pid: c_int,
}

#[repr(C)]
#[derive(Clone, Copy, Default, PartialEq, Eq)]
struct Words {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// The last step's name in [`Failed`].
pub const CHDIR: &str = "enter the working directory";

/// Which step failed, and its errno.
#[derive(Debug, PartialEq, Eq)]
pub struct Failed(pub &'static str, pub c_int);

/// Lets the permitted set survive Slurm's `setreuid` to the user. exec clears it again.
pub fn keep_over_user_change() -> Result<(), Failed> {
    prctl("keep capabilities", libc::PR_SET_KEEPCAPS, 1)
}

/// Enters the mount namespace, drops every privilege for good, and goes to `cwd`.
pub fn enter(namespace: BorrowedFd<'_>, cwd: &CStr) -> Result<(), Failed> {
    let needed = bit(CAP_SYS_ADMIN) | bit(CAP_SYS_CHROOT) | bit(CAP_SETPCAP);
    set([
        Words {
            effective: needed,
            permitted: needed,
            inheritable: 0,
        },
        Words::default(),
    ])?;
    call("enter the namespace", || {
        // SAFETY: a descriptor and a constant.
        unsafe { libc::syscall(libc::SYS_setns, namespace.as_raw_fd(), libc::CLONE_NEWNS) }
    })?;
    drop_all()?;
    call(CHDIR, || {
        // SAFETY: a C string.
        unsafe { libc::syscall(libc::SYS_chdir, cwd.as_ptr()) }
    })
}

/// Bounding set, ambient set, all three sets; then no_new_privs; then looks that they are gone.
pub fn drop_all() -> Result<(), Failed> {
    for capability in 0..64 {
        match prctl("clear the bounding set", libc::PR_CAPBSET_DROP, capability) {
            // Past the last one this kernel knows.
            Err(Failed(_, libc::EINVAL)) => break,
            other => other?,
        }
    }
    prctl(
        "clear the ambient set",
        libc::PR_CAP_AMBIENT,
        libc::PR_CAP_AMBIENT_CLEAR_ALL as c_ulong,
    )?;
    prctl("forget capabilities", libc::PR_SET_KEEPCAPS, 0)?;
    set([Words::default(); 2])?;
    prctl("set no_new_privs", libc::PR_SET_NO_NEW_PRIVS, 1)?;
    verify()
}

fn verify() -> Result<(), Failed> {
    const STILL: Failed = Failed("drop all capabilities", libc::EPERM);
    if get()? != [Words::default(); 2] {
        return Err(STILL);
    }
    for capability in 0..64 {
        match read(libc::PR_CAPBSET_READ, capability) {
            0 => {}
            code if code < 0 => break,
            _ => return Err(STILL),
        }
    }
    if read(libc::PR_GET_NO_NEW_PRIVS, 0) != 1 || read(libc::PR_GET_KEEPCAPS, 0) != 0 {
        return Err(STILL);
    }
    Ok(())
}

const fn bit(capability: u32) -> u32 {
    1 << capability
}

fn set(words: [Words; 2]) -> Result<(), Failed> {
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    call("set capabilities", || {
        // SAFETY: version 3 takes a header and two records, both alive here.
        unsafe { libc::syscall(libc::SYS_capset, &raw const header, words.as_ptr()) }
    })
}

fn get() -> Result<[Words; 2], Failed> {
    let header = Header {
        version: VERSION,
        pid: 0,
    };
    let mut words = [Words::default(); 2];
    call("read capabilities", || {
        // SAFETY: version 3 fills two records.
        unsafe { libc::syscall(libc::SYS_capget, &raw const header, words.as_mut_ptr()) }
    })?;
    Ok(words)
}

fn prctl(what: &'static str, option: c_int, argument: c_ulong) -> Result<(), Failed> {
    call(what, || read(option, argument))
}

fn read(option: c_int, argument: c_ulong) -> c_long {
    const NOTHING: c_ulong = 0;
    // SAFETY: the options used here take numbers only; unused arguments must be zero.
    unsafe { libc::syscall(libc::SYS_prctl, option, argument, NOTHING, NOTHING, NOTHING) }
}

fn call(what: &'static str, system_call: impl FnOnce() -> c_long) -> Result<(), Failed> {
    if system_call() < 0 {
        Err(Failed(what, errno()))
    } else {
        Ok(())
    }
}
