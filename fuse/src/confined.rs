//! The cages of servers, closed before an image's first byte is read.
//!
//! - [`enter`]: of one that serves a file of this machine: a job's `--container=/path/my.sqsh`, what `berth exec` and
//!   `berth mount` open. From then on the process has the descriptors it was given, memory and threads: Landlock denies
//!   every file, socket and signal beyond itself as far as the kernel knows how to, and seccomp answers ENOSYS to every
//!   system call that serving does not need.
//! - [`stay_in`]: of one that fetches its image, and looks at nothing that was not checked against a sealed root. It
//!   needs names, certificates and connections, which libraries look for in many places, so it may read and connect;
//!   Landlock leaves it nothing to write but its cache, nothing to run, and nobody to signal or trace.
//!
//! Nothing can be run in either, so a server that dies is started anew by who is outside; a job's file has nobody there:
//! when it kills its server, the mount is dead, for the job whose file it is.

use std::collections::BTreeMap;
use std::path::Path;

use landlock::{
    ABI, Access, AccessFs, AccessNet, Ruleset, RulesetAttr, RulesetCreatedAttr, Scope,
    path_beneath_rules,
};
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

/// Keeps this thread and all it will start from writing anywhere but below `folders`, from running programs, and from
/// other processes; to be called before there are others.
pub fn stay_in<'a>(folders: impl Iterator<Item = &'a Path>) -> Result<(), Failure> {
    rustix::thread::set_no_new_privs(true)?;
    let writing = AccessFs::from_write(ABI::V5);
    let kept = Ruleset::default()
        .handle_access(writing | AccessFs::Execute)
        .and_then(|rules| rules.handle_access(AccessNet::BindTcp))
        .and_then(|rules| rules.scope(Scope::AbstractUnixSocket | Scope::Signal))
        .and_then(Ruleset::create)
        .and_then(|rules| rules.add_rules(path_beneath_rules(folders, writing)))
        .and_then(|rules| rules.restrict_self());
    if let Err(error) = kept {
        tracing::info!(%error, "no Landlock");
    }
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
    // A thread's own CPUs.
    let own_thread = when(0, SeccompCmpOp::Eq, 0)?;
    allowed.insert(libc::SYS_sched_setaffinity, vec![own_thread]);
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
    // The image's tables, decoded once.
    libc::SYS_memfd_create,
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

    use landlock::{CompatLevel, Compatible};
    use rustix::process::{getpid, getppid, test_kill_process};
    use rustix::thread::{sched_getaffinity, sched_setaffinity};

    use super::*;

    #[test]
    fn nothing_is_left_but_descriptors_memory_and_threads() {
        let own = std::env::current_exe().unwrap();
        // The cage is around one thread here.
        let caged = thread::spawn(move || {
            let mut file = File::open(&own).unwrap();
            let others = [Some(getpid()), getppid()].into_iter().flatten();
            let others: Vec<_> = others.collect();
            let cpus = sched_getaffinity(None).unwrap();
            enter().unwrap();
            assert!(File::open(&own).is_err());
            assert!(Command::new("/bin/true").spawn().is_err());
            assert!(UdpSocket::bind("127.0.0.1:0").is_err());
            assert!(UnixStream::pair().is_err());
            for other in others {
                assert!(test_kill_process(other).is_err());
                assert!(sched_setaffinity(Some(other), &cpus).is_err());
            }
            // And what serving needs works.
            sched_setaffinity(None, &cpus).unwrap();
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

    #[test]
    fn who_fetches_writes_to_its_cache_only_and_runs_and_signals_nothing() {
        let (cache, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let (inside, outside) = (cache.path().join("x"), other.path().join("x"));
        std::fs::write(&outside, "kept").unwrap();
        let caged = thread::spawn(move || {
            stay_in([cache.path()].into_iter()).unwrap();
            std::fs::write(&inside, "fetched").unwrap();
            assert_eq!(std::fs::read(&outside).unwrap(), b"kept");
            UdpSocket::bind("127.0.0.1:0").unwrap();
            // What the kernel's Landlock knows of it.
            let written = std::fs::write(&outside, "changed");
            let run = Command::new("/bin/true").spawn();
            (
                written.is_err(),
                run.is_err(),
                std::fs::read(&outside).unwrap(),
            )
        });
        let (not_written, not_run, content) = caged.join().unwrap();
        let required = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
        let asked = required.handle_access(AccessFs::from_all(ABI::V1));
        if asked.and_then(Ruleset::create).is_err() {
            assert!(std::env::var_os("CI").is_none(), "CI has Landlock");
            eprintln!("left out: this kernel has no Landlock");
            return;
        }
        assert!(not_written && not_run);
        assert_eq!(content, b"kept");
    }
}
