//! Starts a helper: fork, a clean slate, exec. Nothing is waited for.
//!
//! Invariant: between fork and exec only async-signal-safe calls are made, on memory that was prepared before: the
//! caller may have threads (slurmstepd does). The helper sees default signals, an empty mask, the four descriptors it
//! was given and no others, `/` as its folder and exactly the environment given here.
#![allow(unsafe_code, reason = "fork and what must be done before exec")]

use crate::ffi::{errno, errno_text};
use crate::sockets::{self, Error};
use std::ffi::{CString, c_char, c_int};
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};

/// What is to be run, and with what.
#[derive(Debug)]
pub struct Program<'a> {
    pub path: CString,
    pub arguments: Vec<CString>,
    /// The whole environment: `NAME=VALUE`.
    pub env: Vec<CString>,
    /// Descriptors 0 to 3; `None` is /dev/null, for 3 closed.
    pub fds: [Option<BorrowedFd<'a>>; 4],
    /// Leaves the caller's session and its tree of processes: a signal that Slurm sends to all of a step's processes
    /// is not for the helper. The process id is then not the helper's.
    pub detached: bool,
    /// When exec fails, this and the reason go to that descriptor (a number of the child's).
    pub on_failure: (RawFd, Vec<u8>),
}

impl Program<'_> {
    /// The process id. The caller may lose the child to another `waitpid`: learn its end by a descriptor.
    pub fn start(&self) -> Result<libc::pid_t, Error> {
        let null = sockets::open(c"/dev/null", libc::O_RDWR)?;
        // High numbers, so that placing one descriptor cannot overwrite another.
        let mut high: Vec<OwnedFd> = Vec::new();
        for (number, fd) in self.fds.iter().enumerate() {
            match fd {
                Some(fd) => high.push(duplicate(fd.as_raw_fd())?),
                None if number < 3 => high.push(duplicate(null.as_raw_fd())?),
                None => {}
            }
        }
        let numbers: Vec<RawFd> = high.iter().map(|fd| fd.as_raw_fd()).collect();
        let mut argv: Vec<*const c_char> = vec![self.path.as_ptr()];
        argv.extend(self.arguments.iter().map(|word| word.as_ptr()));
        argv.push(std::ptr::null());
        let mut envp: Vec<*const c_char> = self.env.iter().map(|pair| pair.as_ptr()).collect();
        envp.push(std::ptr::null());

        // SAFETY: plain signal-set calls on local memory; the mask is put back in the parent whatever happens.
        let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { std::mem::zeroed() };
        // SAFETY: as above. Blocked signals keep slurmstepd's handlers from running in the child.
        unsafe {
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        }
        // SAFETY: the child calls nothing but async-signal-safe functions until exec.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            // SAFETY: in the fresh child; pointers are to memory made before the fork.
            unsafe { self.become_helper(&numbers, &argv, &envp) }
        }
        let failed = errno();
        // SAFETY: puts the caller's mask back.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut())
        };
        if pid < 0 {
            return Err(failed);
        }
        if self.detached {
            // The one in between ends at once. Where slurmstepd reaps it first this says ECHILD.
            // SAFETY: a child of ours; no status is asked for.
            while unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) } < 0
                && errno() == libc::EINTR
            {}
        }
        Ok(pid)
    }

    /// # Safety
    /// Only in a freshly forked child; `argv` and `envp` end with null.
    unsafe fn become_helper(
        &self,
        numbers: &[RawFd],
        argv: &[*const c_char],
        envp: &[*const c_char],
    ) -> ! {
        // SAFETY: async-signal-safe calls on prepared memory; see above.
        unsafe {
            let mut default: libc::sigaction = std::mem::zeroed();
            default.sa_sigaction = libc::SIG_DFL;
            for signal in 1..=64 {
                libc::sigaction(signal, &raw const default, std::ptr::null_mut());
            }
            for (target, source) in numbers.iter().enumerate() {
                libc::dup2(*source, target as c_int);
            }
            libc::syscall(
                libc::SYS_close_range,
                numbers.len() as libc::c_uint,
                libc::c_uint::MAX,
                0,
            );
            if self.detached {
                libc::setsid();
                // A raw fork: this process is a copy with one thread, and libc's fork takes locks.
                match libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) {
                    0 => {}
                    -1 => self.report(errno()),
                    _ => libc::_exit(0),
                }
            }
            let root = c"/";
            libc::chdir(root.as_ptr());
            libc::umask(0o022);
            let mut none: libc::sigset_t = std::mem::zeroed();
            libc::sigemptyset(&raw mut none);
            libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
            libc::execve(self.path.as_ptr(), argv.as_ptr(), envp.as_ptr());
            self.report(errno())
        }
    }

    /// # Safety
    /// Only in a freshly forked child whose descriptors are placed.
    unsafe fn report(&self, number: c_int) -> ! {
        let reason = errno_text(number);
        let (target, prefix) = &self.on_failure;
        let parts = [prefix.as_slice(), reason.as_bytes()].map(|part| libc::iovec {
            iov_base: part.as_ptr().cast_mut().cast(),
            iov_len: part.len(),
        });
        // SAFETY: two live slices; async-signal-safe.
        unsafe {
            libc::writev(*target, parts.as_ptr(), 2);
            libc::_exit(127)
        }
    }
}

fn duplicate(fd: RawFd) -> Result<OwnedFd, Error> {
    // SAFETY: duplicates a live descriptor to 10 or above.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 10) };
    if copy < 0 {
        return Err(errno());
    }
    // SAFETY: fresh and ours.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}
