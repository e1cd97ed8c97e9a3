//! The cage of a server whose image nobody sealed: a job's `--container=/path/my.sqsh`.
//!
//! It is closed before the image's first byte is read. From then on the process has the descriptors it was given, memory
//! and threads: Landlock denies every file, socket and signal beyond itself as far as the kernel knows how to, and
//! seccomp answers ENOSYS to every system call that serving does not need. Nothing can be run in it, so there is no
//! server to start anew: when a file kills its server, the mount is dead, for the job whose file it is.

use std::collections::BTreeMap;

use landlock::{ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, Scope};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter,
    SeccompRule,
};

use crate::Failure;

/// Closes the cage around this thread and all it will start; to be called before there are others.
pub fn enter() -> Result<(), Failure> {
    rustix::thread::set_no_new_privs(true)?;
    // Seccomp alone keeps files shut where the kernel has no Landlock.
    if let Err(error) = landlock() {
        tracing::info!(%error, "no Landlock");
    }
    seccompiler::apply_filter(&filter()?)?;
    Ok(())
}

/// Denies everything that Landlock knows: no rule allows anything.
fn landlock() -> Result<(), landlock::RulesetError> {
    Ruleset::default()
        .handle_access(AccessFs::from_all(ABI::V5))?
        .handle_access(AccessNet::from_all(ABI::V5))?
        .scope(Scope::AbstractUnixSocket | Scope::Signal)?
        .create()?
        .restrict_self()?;
    Ok(())
}

fn filter() -> Result<BpfProgram, Failure> {
    let when = |argument, operator, value: u64| {
        SeccompCondition::new(argument, SeccompCmpArgLen::Qword, operator, value)
            .and_then(|condition| SeccompRule::new(vec![condition]))
    };
    let thread = libc::CLONE_THREAD as u64;
    let own = u64::from(std::process::id());
    let mut allowed: BTreeMap<i64, Vec<SeccompRule>> =
        ALLOWED.iter().map(|&call| (call, vec![])).collect();
    let of_thread = when(0, SeccompCmpOp::MaskedEq(thread), thread)?;
    allowed.insert(libc::SYS_clone, vec![of_thread]);
    // Abort after a panic in a panic.
    allowed.insert(libc::SYS_tgkill, vec![when(0, SeccompCmpOp::Eq, own)?]);
    let name = when(0, SeccompCmpOp::Eq, libc::PR_SET_NAME as u64)?;
    allowed.insert(libc::SYS_prctl, vec![name]);
    let second_number = when(1, SeccompCmpOp::Eq, libc::F_DUPFD_CLOEXEC as u64)?;
    let is_open = when(1, SeccompCmpOp::Eq, libc::F_GETFD as u64)?;
    allowed.insert(libc::SYS_fcntl, vec![second_number, is_open]);
    // The C library takes ENOSYS for an old kernel's answer, and goes on without clone3 and its looks into /sys.
    let otherwise = SeccompAction::Errno(libc::ENOSYS as u32);
    let arch = std::env::consts::ARCH.try_into()?;
    let filter = SeccompFilter::new(allowed, otherwise, SeccompAction::Allow, arch)?;
    Ok(filter.try_into()?)
}

/// What serving requests from memory and one file needs.
const ALLOWED: &[i64] = &[
    // Descriptors that are there.
    libc::SYS_read,
    libc::SYS_readv,
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_write,
    libc::SYS_writev,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_statx,
    libc::SYS_fadvise64,
    libc::SYS_close,
    // The way to who makes the mount.
    libc::SYS_sendmsg,
    libc::SYS_recvmsg,
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
    libc::SYS_sigaltstack,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigreturn,
    libc::SYS_restart_syscall,
    libc::SYS_exit,
    libc::SYS_exit_group,
    // Time and seeds of hash tables.
    libc::SYS_clock_gettime,
    libc::SYS_clock_nanosleep,
    libc::SYS_getrandom,
];

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read, Seek};
    use std::net::UdpSocket;
    use std::os::unix::net::UnixStream;
    use std::process::Command;
    use std::thread;

    use rustix::process::{getpid, getppid, test_kill_process};

    use super::*;

    #[test]
    fn nothing_is_left_but_descriptors_memory_and_threads() {
        let own = std::env::current_exe().unwrap();
        // The cage is around one thread here.
        let caged = thread::spawn(move || {
            let mut file = File::open(&own).unwrap();
            let others = [Some(getpid()), getppid()].into_iter().flatten();
            let others: Vec<_> = others.collect();
            enter().unwrap();
            assert!(File::open(&own).is_err());
            assert!(Command::new("/bin/true").spawn().is_err());
            assert!(UdpSocket::bind("127.0.0.1:0").is_err());
            assert!(UnixStream::pair().is_err());
            for other in others {
                assert!(test_kill_process(other).is_err());
            }
            // And what serving needs works.
            let read = move || {
                file.rewind().unwrap();
                let mut start = [0; 4];
                file.try_clone().unwrap().read_exact(&mut start).unwrap();
                (start, file.metadata().unwrap().len() > 0)
            };
            thread::spawn(read).join().unwrap()
        });
        assert_eq!(caged.join().unwrap(), (*b"\x7fELF", true));
    }
}
