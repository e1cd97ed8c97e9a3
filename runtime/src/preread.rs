//! Reads what the start of a command will need from a fresh mount, while Slurm still runs the site's task prolog.
//!
//! A fresh SquashFS mount decompresses everything anew, on the first reader's time. What any program needs is known: its
//! own file, the dynamic loader, the C library. It is only read: by a child that is wholly the user, holds the mount and
//! nothing else, and ends after [`SECONDS`] at the latest. Whether it finds anything changes nothing but the time.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use rustix::fs::{FileType, Mode, OFlags, ResolveFlags, fstat, openat2};
use rustix::io::Errno;

use crate::sys::{self, Child};
use crate::user::User;

/// How long the child may live.
const SECONDS: u32 = 5;
/// Most bytes read of one file.
const LARGEST: usize = 8 << 20;
/// Read at a time, in bytes: a SquashFS block of the usual size.
const BLOCK: usize = 128 << 10;
/// Files of the dynamic loader's and the C library's, in the order in which a start asks for them.
const USUAL: [&str; 8] = [
    "lib64/ld-linux-x86-64.so.2",
    "lib/ld-linux-aarch64.so.1",
    "lib/ld-musl-x86_64.so.1",
    "lib/ld-musl-aarch64.so.1",
    "etc/ld.so.cache",
    "lib/x86_64-linux-gnu/libc.so.6",
    "lib/aarch64-linux-gnu/libc.so.6",
    "lib64/libc.so.6",
];

/// Starts reading for `command`, as the user typed it, which is looked up in `environment`'s PATH as the task will do.
pub(crate) fn start(
    user: &User,
    mount: BorrowedFd<'_>,
    command: &Path,
    environment: &[String],
) -> io::Result<Child> {
    let candidates = candidates(command, environment);
    sys::fork(|| i32::from(read(user, mount, &candidates).is_err()))
}

fn read(user: &User, mount: BorrowedFd<'_>, candidates: &[PathBuf]) -> io::Result<()> {
    let mount = sys::close_all_but(mount)?;
    sys::die_after(SECONDS);
    user.become_for_good()?;
    let mut block = vec![0; BLOCK];
    let command = candidates.iter().find_map(|path| open(&mount, path).ok());
    if let Some(file) = command {
        swallow(&file, &mut block);
    }
    for path in USUAL {
        if let Ok(file) = open(&mount, Path::new(path)) {
            swallow(&file, &mut block);
        }
    }
    Ok(())
}

/// Where the command may be, relative to the image's root.
fn candidates(command: &Path, environment: &[String]) -> Vec<PathBuf> {
    let below = |path: &Path| path.strip_prefix("/").map(Path::to_owned).ok();
    if command.components().count() > 1 {
        return below(command).into_iter().collect();
    }
    if !matches!(command.components().next(), Some(Component::Normal(_))) {
        return Vec::new();
    }
    let path = environment.iter().find_map(|v| v.strip_prefix("PATH="));
    let folders = path.unwrap_or_default().split(':').map(Path::new);
    folders
        .filter_map(|folder| below(&folder.join(command)))
        .collect()
}

fn open(mount: &OwnedFd, path: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = openat2(mount.as_fd(), path, flags, Mode::empty(), resolve)?;
    match FileType::from_raw_mode(fstat(&file)?.st_mode) {
        FileType::RegularFile => Ok(file),
        _ => Err(Errno::INVAL),
    }
}

fn swallow(file: &OwnedFd, block: &mut [u8]) {
    let mut left = LARGEST;
    while left > 0 {
        match rustix::io::read(file, &mut *block) {
            Ok(0) => return,
            Ok(more) => left = left.saturating_sub(more),
            Err(Errno::INTR) => {}
            Err(_) => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_is_looked_for_where_the_task_will_look() {
        let environment = ["A=b".to_owned(), "PATH=/usr/bin:rel:/bin".to_owned()];
        let of = |command: &str| candidates(Path::new(command), &environment);
        assert_eq!(of("true"), ["usr/bin/true", "bin/true"].map(PathBuf::from));
        assert_eq!(of("/opt/x/run"), [PathBuf::from("opt/x/run")]);
        assert!(of("./run").is_empty() && of("").is_empty() && of("/").is_empty());
        assert!(of("..").is_empty());
    }
}
