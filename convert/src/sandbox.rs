//! The cage that the converter puts itself in before it looks at a byte that a stranger wrote.
//!
//! After [`enter`] the process has the descriptors it was given and can read, write and seek them, use memory and
//! start threads. It can open nothing, connect to nothing, run nothing and signal nobody: Landlock denies every file
//! and socket, seccomp every other system call, and limits bound its memory and its files.

#![allow(
    unsafe_code,
    reason = "descriptors arrive as numbers, and close_range, prctl and setrlimit have no safe form in std"
)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetStatus, Scope};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

/// Why the cage could not be closed.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    #[error("descriptor {0} is given twice, is a standard one or is not open")]
    Descriptor(RawFd),
    #[error("{0}: {1}")]
    System(&'static str, io::Error),
    #[error("seccomp: {0}")]
    Seccomp(String),
}

/// Takes the descriptors of a job as files, and closes every other one but the three standard ones.
///
/// To be called once, before anything else opens a descriptor.
pub fn take_descriptors(numbers: &[RawFd]) -> Result<Vec<File>, SandboxError> {
    let mut sorted = numbers.to_vec();
    sorted.sort_unstable();
    let mut from = 3;
    for &number in &sorted {
        // SAFETY: F_GETFD takes no pointer; on a number that is not open it fails.
        if number < from || unsafe { libc::fcntl(number, libc::F_GETFD) } < 0 {
            return Err(SandboxError::Descriptor(number));
        }
        close_range(from, number - 1)?;
        from = number + 1;
    }
    close_range(from, RawFd::MAX)?;
    // SAFETY: each number is open, named once, not a standard one, and nothing else in this process owns it: all
    // others were just closed, and the caller calls this once.
    let own = |&number: &RawFd| File::from(unsafe { OwnedFd::from_raw_fd(number) });
    Ok(numbers.iter().map(own).collect())
}

fn close_range(first: RawFd, last: RawFd) -> Result<(), SandboxError> {
    if first > last {
        return Ok(());
    }
    // SAFETY: takes no pointers; what it closes is owned by nobody (see `take_descriptors`).
    let rc = unsafe { libc::syscall(libc::SYS_close_range, first, last, 0) };
    check("close other descriptors", rc)
}

fn check(what: &'static str, rc: i64) -> Result<(), SandboxError> {
    match rc {
        0 => Ok(()),
        _ => Err(SandboxError::System(what, io::Error::last_os_error())),
    }
}

/// Closes the cage around this thread and all it will start; to be called before there are others. Gives warnings
/// about what the kernel does not have.
///
/// `memory` is the most bytes of private memory the process may ever have, `file` the most bytes that a file it writes
/// may have.
pub fn enter(memory: u64, file: u64) -> Result<Vec<String>, SandboxError> {
    // SAFETY: these prctls take numbers only.
    unsafe {
        check(
            "no_new_privs",
            libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0).into(),
        )?;
        check(
            "not dumpable",
            libc::prctl(libc::PR_SET_DUMPABLE, 0, 0, 0, 0).into(),
        )?;
    }
    limit("core size", libc::RLIMIT_CORE, 0)?;
    limit("memory", libc::RLIMIT_DATA, memory)?;
    limit("file size", libc::RLIMIT_FSIZE, file)?;
    let mut warnings = Vec::new();
    match landlock() {
        Ok(RulesetStatus::FullyEnforced | RulesetStatus::PartiallyEnforced) => {}
        Ok(RulesetStatus::NotEnforced) => {
            warnings.push("this kernel has no Landlock: seccomp alone keeps files shut".into());
        }
        Err(e) => warnings.push(format!(
            "Landlock cannot be used ({e}): seccomp alone keeps files shut"
        )),
    }
    for program in filters()? {
        seccompiler::apply_filter(&program).map_err(|e| SandboxError::Seccomp(e.to_string()))?;
    }
    Ok(warnings)
}

fn limit(
    what: &'static str,
    resource: libc::__rlimit_resource_t,
    value: u64,
) -> Result<(), SandboxError> {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: the pointer is to a live rlimit.
    check(
        what,
        unsafe { libc::getrlimit(resource, &mut limit) }.into(),
    )?;
    // A lower one that is there already stays: raising it takes a privilege.
    limit.rlim_max = limit.rlim_max.min(value);
    limit.rlim_cur = limit.rlim_max;
    // SAFETY: the pointer is to a live rlimit.
    check(what, unsafe { libc::setrlimit(resource, &limit) }.into())
}

/// Denies everything that Landlock knows: no rule allows anything.
fn landlock() -> Result<RulesetStatus, landlock::RulesetError> {
    let status = Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V5))?
        .scope(Scope::AbstractUnixSocket | Scope::Signal)?
        .create()?
        .restrict_self()?;
    Ok(status.ruleset)
}

/// Three filters; the strictest answer counts. Two refuse, without killing, what the C library tries for its own
/// comfort; the last, which also forbids filters, kills at anything that is not needed.
fn filters() -> Result<[BpfProgram; 3], SandboxError> {
    let seccomp = |e: seccompiler::BackendError| SandboxError::Seccomp(e.to_string());
    let arch = std::env::consts::ARCH.try_into().map_err(seccomp)?;
    let filter = |rules, otherwise, action| -> Result<BpfProgram, SandboxError> {
        SeccompFilter::new(rules, otherwise, action, arch)
            .and_then(TryInto::try_into)
            .map_err(seccomp)
    };
    let refuse = |call, errno: i32| {
        let rules = BTreeMap::from([(call, vec![])]);
        filter(
            rules,
            SeccompAction::Allow,
            SeccompAction::Errno(errno as u32),
        )
    };
    let when = |argument, operator, value: u64| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Qword, operator, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
            .map_err(seccomp)
    };
    let thread = libc::CLONE_THREAD as u64;
    let is_thread = when(0, SeccompCmpOp::MaskedEq(thread), thread)?;
    // A second number for the same file; and debug builds of the standard library look whether what they close is open.
    let is_copy = when(1, SeccompCmpOp::Eq, libc::F_DUPFD_CLOEXEC as u64)?;
    let is_look = when(1, SeccompCmpOp::Eq, libc::F_GETFD as u64)?;
    let mut allowed: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|&call| (call, vec![])).collect();
    allowed.insert(libc::SYS_clone, vec![is_thread]);
    allowed.insert(libc::SYS_fcntl, vec![is_copy, is_look]);
    Ok([
        // Its flags lie in memory, where a filter cannot look: without it the C library uses clone.
        refuse(libc::SYS_clone3, libc::ENOSYS)?,
        // The C library looks into /sys and /proc to count CPUs.
        refuse(libc::SYS_openat, libc::EACCES)?,
        filter(allowed, SeccompAction::KillProcess, SeccompAction::Allow)?,
    ])
}

/// What moving bytes, memory and threads need.
const ALLOWED: &[i64] = &[
    // Refused by filters of their own.
    libc::SYS_clone3,
    libc::SYS_openat,
    // Descriptors that are there.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_pwrite64,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_sync_file_range,
    libc::SYS_fadvise64,
    libc::SYS_close,
    // Memory.
    libc::SYS_brk,
    libc::SYS_mmap,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_mprotect,
    libc::SYS_madvise,
    // Threads.
    libc::SYS_futex,
    libc::SYS_set_robust_list,
    libc::SYS_rseq,
    libc::SYS_gettid,
    libc::SYS_getpid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_prctl,
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Abort after a panic in a panic.
    libc::SYS_tgkill,
    // Time and seeds of hash tables.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_getrandom,
];
