//! The system calls that no crate offers as safe functions.
//!
//! Invariant: this program has one thread, always. That makes `fork` without `exec` sound, and lets credentials be set
//! by plain system calls.
#![allow(
    unsafe_code,
    reason = "fork, close_range and mount_setattr have no safe wrapper"
)]

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use rustix::io::Errno;
use rustix::process::{Pid, Signal, WaitOptions, kill_process, waitpid};

/// A forked child that is killed when dropped.
#[derive(Debug)]
pub(crate) struct Child {
    pid: Pid,
}

impl Child {
    /// The process id.
    pub(crate) fn number(&self) -> u32 {
        self.pid.as_raw_pid().unsigned_abs()
    }
}

impl Child {
    /// Ends it, and waits until it is gone.
    pub(crate) fn end(self) {
        let _ = kill_process(self.pid, Signal::KILL);
        let _ = waitpid(Some(self.pid), WaitOptions::empty());
        std::mem::forget(self);
    }

    /// Waits until it has ended by itself.
    pub(crate) fn wait(self) {
        while let Err(Errno::INTR) = waitpid(Some(self.pid), WaitOptions::empty()) {}
        std::mem::forget(self);
    }

    /// Lets it live on by itself.
    pub(crate) fn let_go(self) {
        std::mem::forget(self);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        let _ = kill_process(self.pid, Signal::KILL);
        // Not waited for: one that hangs in a dead filesystem cannot be killed, and must not hang its parent too.
        let _ = waitpid(Some(self.pid), WaitOptions::NOHANG);
    }
}

/// Runs `work` in a forked child, which ends with what it returns, never runs the parent's destructors, and shares no
/// memory with it.
pub(crate) fn fork(work: impl FnOnce() -> i32) -> io::Result<Child> {
    // SAFETY: the process has one thread, so the child may go on in ordinary code.
    match unsafe { libc::fork() } {
        -1 => Err(io::Error::last_os_error()),
        0 => {
            let code = catch_unwind(AssertUnwindSafe(work)).unwrap_or(101);
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(code) }
        }
        pid => match Pid::from_raw(pid) {
            Some(pid) => Ok(Child { pid }),
            None => Err(io::Error::other("fork gave no process")),
        },
    }
}

/// Closes every descriptor of this process but `kept`, which gets a new number and is for no next program. For a fresh
/// child only: whatever else owned a descriptor must not be used or dropped any more.
pub(crate) fn close_all_but(kept: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    const PLACE: i32 = 3;
    let close_range = |first: u32, last: u32| {
        // SAFETY: closes numbers only; the caller gave up every owner of them.
        match unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    };
    // SAFETY: both are plain numbers; what had number 3 is closed by this.
    if unsafe { libc::dup2(kept.as_raw_fd(), PLACE) } != PLACE {
        return Err(io::Error::last_os_error());
    }
    close_range(0, 2)?;
    close_range(4, u32::MAX)?;
    inherited(PLACE)
}

/// Closes every descriptor of this process but 0, 1, 2 and `kept`, which the next program inherits. For a fresh child
/// only: whatever else owned a descriptor must not be used or dropped any more.
pub(crate) fn keep_for_exec(kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    for fd in kept {
        rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty())?;
    }
    close_others(kept)
}

/// The same, and the next program inherits nothing.
pub(crate) fn close_others(kept: &[BorrowedFd<'_>]) -> io::Result<()> {
    let number = |fd: &BorrowedFd<'_>| fd.as_raw_fd().unsigned_abs();
    let mut numbers: Vec<u32> = kept.iter().map(number).collect();
    numbers.sort_unstable();
    let mut first = 3;
    for last in numbers
        .into_iter()
        .filter(|n| *n > 2)
        .map(|n| n - 1)
        .chain([u32::MAX])
    {
        if first <= last {
            // SAFETY: closes numbers only; the caller gave up every owner of them.
            if unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) } != 0 {
                return Err(io::Error::last_os_error());
            }
        }
        first = last.saturating_add(2);
    }
    Ok(())
}

/// Lets the kernel end this process after so many seconds, whatever it is doing then.
pub(crate) fn die_after(seconds: u32) {
    // SAFETY: no memory is involved; SIGALRM has its default action, which ends the process.
    unsafe {
        libc::signal(libc::SIGALRM, libc::SIG_DFL);
        libc::alarm(seconds);
    }
}

/// Lets the kernel end this process when the one that forked it ends.
pub(crate) fn die_with_parent() {
    // No failure is possible but a signal that does not exist.
    let _ = rustix::process::set_parent_process_death_signal(Some(Signal::KILL));
}

/// Takes over a descriptor that this program was started with.
pub(crate) fn inherited(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: F_SETFD touches the descriptor's flags only, and tells whether it is open.
    if unsafe { libc::fcntl(number, libc::F_SETFD, libc::FD_CLOEXEC) } == -1 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: it is open, came from the program that started this one, and is asked for once.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Ends standard output and standard error for whoever reads them: both become /dev/null.
pub(crate) fn end_output() {
    // SAFETY: plain numbers; nobody owns 1 and 2 as values, and both stay open.
    unsafe {
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        if null >= 0 {
            libc::dup2(null, 1);
            libc::dup2(null, 2);
        }
    }
}

/// Standard input and output become /dev/null, standard error `log` where there is one: for a process that may have none
/// of them open.
pub(crate) fn set_streams(log: Option<BorrowedFd<'_>>) -> io::Result<()> {
    // SAFETY: plain numbers; nobody owns 0, 1 and 2 as values. The lowest free number is taken, so none is left out.
    unsafe {
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR | libc::O_CLOEXEC);
        if null < 0 {
            return Err(io::Error::last_os_error());
        }
        let log = log.map_or(null, |log| log.as_raw_fd());
        for (number, source) in [(0, null), (1, null), (2, log)] {
            // A number put on itself would stay CLOEXEC.
            if source != number && libc::dup2(source, number) < 0
                || source == number && libc::fcntl(number, libc::F_SETFD, 0) < 0
            {
                return Err(io::Error::last_os_error());
            }
        }
        if null > 2 {
            libc::close(null);
        }
    }
    Ok(())
}

/// `struct mount_attr` of mount_setattr(2).
#[repr(C)]
struct MountAttr {
    attr_set: u64,
    attr_clr: u64,
    propagation: u64,
    userns_fd: u64,
}

/// Sets mount attributes (`MOUNT_ATTR_*`) on `tree` and every mount below it.
pub(crate) fn mount_set_attributes(tree: BorrowedFd<'_>, set: u64) -> Result<(), Errno> {
    let attr = MountAttr {
        attr_set: set,
        attr_clr: 0,
        propagation: 0,
        userns_fd: 0,
    };
    mount_setattr(tree, libc::AT_RECURSIVE, &attr)
}

/// Shows the owners of files on `mount` as the maps of a user namespace have them.
pub(crate) fn mount_map_owners(mount: BorrowedFd<'_>, namespace: &OwnedFd) -> Result<(), Errno> {
    let attr = MountAttr {
        attr_set: libc::MOUNT_ATTR_IDMAP,
        attr_clr: 0,
        propagation: 0,
        userns_fd: u64::try_from(namespace.as_raw_fd()).map_err(|_| Errno::BADF)?,
    };
    mount_setattr(mount, 0, &attr)
}

fn mount_setattr(mount: BorrowedFd<'_>, flags: i32, attr: &MountAttr) -> Result<(), Errno> {
    // SAFETY: the path is an empty C string and the structure has the size that is given.
    let done = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_raw_fd(),
            c"".as_ptr(),
            libc::AT_EMPTY_PATH | flags,
            std::ptr::from_ref(attr),
            size_of::<MountAttr>(),
        )
    };
    match done {
        0 => Ok(()),
        _ => Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL)),
    }
}
