//! The cage from inside: a copy of this test program enters it and tries what hostile code would try.

#![allow(
    unsafe_code,
    reason = "what is tried are system calls, with arguments as bad as may be"
)]

use std::os::unix::process::ExitStatusExt as _;
use std::process::{Command, Stdio};

use berth_convert::sandbox;

use crate::build::Tar;
use crate::image::options;
use crate::program;

/// What to try, as a word in the copy's environment.
const TRY: &str = "BERTH_TEST_TRY";

/// Attempts that must end the process.
const DEADLY: &[(&str, libc::c_long)] = &[
    ("open", libc::SYS_open),
    ("openat2", libc::SYS_openat2),
    ("open_by_handle_at", libc::SYS_open_by_handle_at),
    ("memfd_create", libc::SYS_memfd_create),
    ("socket", libc::SYS_socket),
    ("socketpair", libc::SYS_socketpair),
    ("connect", libc::SYS_connect),
    ("bind", libc::SYS_bind),
    ("sendmsg", libc::SYS_sendmsg),
    ("io_uring_setup", libc::SYS_io_uring_setup),
    ("execve", libc::SYS_execve),
    ("execveat", libc::SYS_execveat),
    ("fork", libc::SYS_fork),
    ("vfork", libc::SYS_vfork),
    ("ptrace", libc::SYS_ptrace),
    ("process_vm_readv", libc::SYS_process_vm_readv),
    ("process_vm_writev", libc::SYS_process_vm_writev),
    ("pidfd_open", libc::SYS_pidfd_open),
    ("pidfd_getfd", libc::SYS_pidfd_getfd),
    ("kill", libc::SYS_kill),
    ("unlink", libc::SYS_unlink),
    ("rename", libc::SYS_rename),
    ("chmod", libc::SYS_chmod),
    ("mount", libc::SYS_mount),
    ("unshare", libc::SYS_unshare),
    ("setns", libc::SYS_setns),
    ("bpf", libc::SYS_bpf),
    ("keyctl", libc::SYS_keyctl),
    ("userfaultfd", libc::SYS_userfaultfd),
    ("perf_event_open", libc::SYS_perf_event_open),
    ("setuid", libc::SYS_setuid),
    ("setrlimit", libc::SYS_setrlimit),
    ("prlimit64", libc::SYS_prlimit64),
    ("ioctl", libc::SYS_ioctl),
    ("shmget", libc::SYS_shmget),
    ("mknodat", libc::SYS_mknodat),
    ("linkat", libc::SYS_linkat),
    ("symlinkat", libc::SYS_symlinkat),
];

/// Attempts that the kernel refuses, and the process goes on: exit codes of the copy.
const REFUSED: i32 = 42;
const SUCCEEDED: i32 = 43;

/// Runs in the copy, on the one thread that is in the cage.
fn attempt(word: &str) -> ! {
    let warnings = sandbox::enter(1 << 30, 1 << 20).unwrap();
    // SAFETY: numbers, and pointers to static strings or none; each call is meant to fail.
    let rc = unsafe {
        match word {
            "nothing" => -1,
            "landlock" => -libc::c_long::from(warnings.is_empty()),
            "openat" => libc::syscall(libc::SYS_openat, libc::AT_FDCWD, c"/etc/passwd".as_ptr(), 0),
            "clone3" => libc::syscall(libc::SYS_clone3, 0, 0),
            "process" => libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0),
            "setfl" => libc::syscall(libc::SYS_fcntl, 1, libc::F_SETFL, libc::O_NONBLOCK),
            "setown" => libc::syscall(libc::SYS_fcntl, 1, libc::F_SETOWN, 1),
            "memory" => libc::syscall(
                libc::SYS_mmap,
                0,
                2u64 << 30,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            ),
            deadly => {
                let (_, number) = DEADLY.iter().find(|(name, _)| *name == deadly).unwrap();
                libc::syscall(*number, c"/etc/passwd".as_ptr(), 0, 0, 0, 0)
            }
        }
    };
    // SAFETY: ends the process, cage and test harness and all.
    unsafe {
        libc::syscall(
            libc::SYS_exit_group,
            if rc == -1 { REFUSED } else { SUCCEEDED },
        );
    }
    unreachable!("exit_group does not return");
}

/// The copy's own test: nothing unless it is told what to try.
#[test]
fn probe() {
    if let Ok(word) = std::env::var(TRY) {
        attempt(&word);
    }
}

fn copy(word: &str) -> std::process::ExitStatus {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "cage::probe", "--test-threads=1"])
        .env(TRY, word)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .unwrap()
}

#[test]
fn what_hostile_code_would_try_ends_it() {
    // What the copy does besides trying is allowed.
    assert_eq!(copy("nothing").code(), Some(REFUSED));
    for (word, _) in DEADLY {
        let status = copy(word);
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{word}: {status}");
    }
    for word in ["process", "setfl", "setown"] {
        let status = copy(word);
        assert_eq!(status.signal(), Some(libc::SIGSYS), "{word}: {status}");
    }
    for word in ["openat", "clone3", "memory"] {
        assert_eq!(copy(word).code(), Some(REFUSED), "{word}");
    }
}

#[test]
fn landlock_is_closed_where_the_kernel_has_it() {
    let modules = std::fs::read_to_string("/sys/kernel/security/lsm").unwrap_or_default();
    if !modules.split(',').any(|module| module.trim() == "landlock") {
        eprintln!("left out: this kernel has no Landlock, or does not say so");
        return;
    }
    assert_eq!(copy("landlock").code(), Some(REFUSED));
}

/// The program itself, while it waits for a layer that does not come.
#[test]
fn the_converter_is_in_it_before_it_reads_a_byte() {
    let (release, held) = std::sync::mpsc::channel::<()>();
    let layer = Tar::new().file("x", b"x").end();
    let mut running = program::start(
        vec![program::fed(move |out| {
            // Until the test has seen enough.
            let _ = held.recv();
            out.write_all(&layer)
        })],
        &options(),
    );
    let folder = format!("/proc/{}", running.child.id());
    let status = || std::fs::read_to_string(format!("{folder}/status")).unwrap();
    let line = |name: &str| {
        let status = status();
        let line = status.lines().find(|l| l.starts_with(name)).unwrap();
        line.split_whitespace().nth(1).unwrap().to_owned()
    };
    // It closes the cage, then starts threads: there is nothing else to wait for.
    while line("Threads:") == "1" {
        assert!(running.child.try_wait().unwrap().is_none());
        std::thread::yield_now();
    }
    assert_eq!(line("Seccomp:"), "2");
    assert_eq!(line("NoNewPrivs:"), "1");
    let limits = std::fs::read_to_string(format!("{folder}/limits")).unwrap();
    for limit in ["Max data size", "Max file size"] {
        let line = limits.lines().find(|l| l.starts_with(limit)).unwrap();
        assert!(!line.contains("unlimited"), "{line}");
    }
    // Standard ones, image, spill file, one layer; nothing that this process or the harness has open besides.
    let open = std::fs::read_dir(format!("{folder}/fd")).unwrap().count();
    assert_eq!(open, 6);
    release.send(()).unwrap();
    let ran = program::finish(running);
    assert_eq!(ran.status.code(), Some(1), "{ran:?}");
}
