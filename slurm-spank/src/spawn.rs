//! Starts a helper: a child on this process's memory, a clean slate, exec. Nothing is waited for but the exec itself.
//!
//! The child shares the caller's memory until it execs, as posix_spawn's does (`CLONE_VM | CLONE_VFORK`): a fork would
//! copy slurmstepd's page tables and make it pay a fault for each page it writes to afterwards, some 3 ms of every start.
//!
//! Invariant: between clone and exec only async-signal-safe calls are made, on memory that was prepared before, with
//! every signal blocked; the calling thread sleeps meanwhile, and the caller's other threads see nothing of it. The
//! helper sees default signals, an empty mask, the four descriptors it was given and no others, `/` as its folder and
//! exactly the environment given here.
#![allow(unsafe_code, reason = "clone and what must be done before exec")]

use crate::ffi::{errno, errno_text};
use crate::sockets::{self, Error};
use std::ffi::{CString, c_char, c_int, c_void};
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

        let job = Job {
            program: self,
            numbers: &numbers,
            argv: &argv,
            envp: &envp,
        };
        // SAFETY: plain signal-set calls on local memory; the mask is put back in the parent whatever happens.
        let (mut all, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { std::mem::zeroed() };
        // SAFETY: as above. Blocked signals keep slurmstepd's handlers from running in the child.
        unsafe {
            libc::sigfillset(&raw mut all);
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const all, &raw mut before);
        }
        // SAFETY: `prepare` makes nothing but async-signal-safe calls, and does not return.
        let started = unsafe { child(prepare, &job) };
        // SAFETY: puts the caller's mask back.
        unsafe {
            libc::pthread_sigmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut())
        };
        let pid = started?;
        if self.detached {
            // The one in between has ended. Where slurmstepd reaps it first this says ECHILD.
            // SAFETY: a child of ours; no status is asked for.
            while unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) } < 0
                && errno() == libc::EINTR
            {}
        }
        Ok(pid)
    }

    /// # Safety
    /// Only in a child whose descriptors are placed.
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

/// What the child works on; all of it lives in the parent, which sleeps until the child has exec'd or ended.
struct Job<'a> {
    program: &'a Program<'a>,
    numbers: &'a [RawFd],
    argv: &'a [*const c_char],
    envp: &'a [*const c_char],
}

/// Bytes of a child's stack, far more than its few calls take.
const STACK: usize = 64 << 10;

/// Runs `body` in a child that shares this process's memory, and sleeps until that child execs or ends.
///
/// # Safety
/// `body` must only make async-signal-safe calls, and never return. All signals must be blocked.
unsafe fn child(
    body: extern "C" fn(*mut c_void) -> c_int,
    job: &Job<'_>,
) -> Result<libc::pid_t, Error> {
    // SAFETY: fresh anonymous memory, unmapped below when the child no longer uses it.
    let stack = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            STACK,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_STACK,
            -1,
            0,
        )
    };
    if stack == libc::MAP_FAILED {
        return Err(errno());
    }
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    let argument = std::ptr::from_ref(job).cast_mut().cast::<c_void>();
    // SAFETY: the stack grows down from its end, which is aligned; `job` outlives the child's use of it, since this
    // thread goes on only when the child has left this memory.
    let pid = unsafe { libc::clone(body, stack.cast::<u8>().add(STACK).cast(), flags, argument) };
    let failed = errno();
    // SAFETY: mapped above; nobody runs on it any more.
    unsafe { libc::munmap(stack, STACK) };
    if pid < 0 { Err(failed) } else { Ok(pid) }
}

/// The first child: default signals and the right descriptors, and then the program, or the parent of the program.
extern "C" fn prepare(job: *mut c_void) -> c_int {
    // SAFETY: `child` passed a live job; async-signal-safe calls on prepared memory.
    unsafe {
        let job = &*job.cast::<Job<'_>>();
        let mut default: libc::sigaction = std::mem::zeroed();
        default.sa_sigaction = libc::SIG_DFL;
        for signal in 1..=64 {
            libc::sigaction(signal, &raw const default, std::ptr::null_mut());
        }
        for (target, source) in job.numbers.iter().enumerate() {
            libc::dup2(*source, target as c_int);
        }
        libc::syscall(
            libc::SYS_close_range,
            job.numbers.len() as libc::c_uint,
            libc::c_uint::MAX,
            0,
        );
        if job.program.detached {
            libc::setsid();
            // Out of the tree of the caller's processes: this one ends when that one has become the program.
            if let Err(number) = child(become_program, job) {
                job.program.report(number);
            }
            libc::_exit(0)
        }
    }
    become_program(job)
}

/// The last steps to the program.
extern "C" fn become_program(job: *mut c_void) -> c_int {
    // SAFETY: as above.
    unsafe {
        let job = &*job.cast::<Job<'_>>();
        libc::chdir(c"/".as_ptr());
        libc::umask(0o022);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        libc::execve(
            job.program.path.as_ptr(),
            job.argv.as_ptr(),
            job.envp.as_ptr(),
        );
        job.program.report(errno())
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read as _;
    use std::os::fd::AsFd as _;

    /// What the program writes to its standard output, until it ends.
    fn said(path: &CString, script: &CString, detached: bool, fds: usize) -> String {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let mut all = [None; 4];
        all[1] = Some(writer.as_fd());
        if fds == 4 {
            all[3] = Some(writer.as_fd());
        }
        let program = Program {
            path: path.clone(),
            arguments: vec![c"-c".to_owned(), script.clone()],
            env: vec![c"A=b".to_owned(), c"PATH=/usr/bin:/bin".to_owned()],
            fds: all,
            detached,
            on_failure: (1, b"cannot: ".to_vec()),
        };
        let pid = program.start().unwrap();
        drop(program);
        drop(writer);
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        if !detached {
            // SAFETY: a child of this test's.
            unsafe { libc::waitpid(pid, std::ptr::null_mut(), 0) };
        }
        text
    }

    #[test]
    fn the_program_finds_a_clean_slate() {
        let sh = c"/bin/sh".to_owned();
        let script = c"pwd; umask; echo $A; for n in 0 1 2 3 4 5 6 7 8 9; do test -e /proc/$$/fd/$n && echo $n; done; \
            grep -E 'SigBlk|SigIgn' /proc/self/status"
            .to_owned();
        let clean = "SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n";
        let expected = format!("/\n0022\nb\n0\n1\n2\n{clean}");
        // Signal 32 is libc's own, and left as it is. SIGPIPE is ignored in this process.
        let said = |detached, fds| {
            let text = said(&sh, &script, detached, fds);
            text.replace("SigIgn:\t0000000080000000", "SigIgn:\t0000000000000000")
        };
        assert_eq!(said(false, 3), expected);
        let expected = format!("/\n0022\nb\n0\n1\n2\n3\n{clean}");
        assert_eq!(said(true, 4), expected);
    }

    #[test]
    fn a_detached_program_is_not_in_the_callers_tree() {
        let (sh, script) = (c"/bin/sh".to_owned(), c"echo $PPID".to_owned());
        let own = format!("{}\n", std::process::id());
        assert_eq!(said(&sh, &script, false, 3), own);
        assert_ne!(said(&sh, &script, true, 3), own);
    }

    #[test]
    fn a_program_that_is_not_there_says_so() {
        let (no, script) = (c"/no/such".to_owned(), c"".to_owned());
        for detached in [false, true] {
            assert_eq!(said(&no, &script, detached, 3), "cannot: no such file");
        }
    }
}
