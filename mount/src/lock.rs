//! The node-wide lock under which loop devices are made.
//!
//! It keeps 64 tasks that start at once from making 64 devices for one file. It is a courtesy, not a guard: the kernel
//! refuses a device that is taken, whoever holds the lock.

use std::io;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{FlockOperation, Mode, OFlags, flock, open};
use rustix::io::Errno;

use crate::MountError;

/// How long to wait for others, each of whom holds the lock for about a millisecond.
const PATIENCE: Duration = Duration::from_secs(10);

/// Held until dropped.
#[derive(Debug)]
pub(crate) struct LoopLock {
    _file: OwnedFd,
}

impl LoopLock {
    /// Takes the lock below `folder`, which must be root's alone to write. The file is 0600: who cannot open it cannot
    /// hold it against us.
    pub(crate) fn take(folder: &Path) -> Result<LoopLock, MountError> {
        let path: PathBuf = folder.join("loop.lock");
        let fail = |errno: Errno| MountError::Lock {
            path: path.clone(),
            source: io::Error::from(errno),
        };
        let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
        let file = open(&path, flags, Mode::RUSR | Mode::WUSR).map_err(fail)?;
        let deadline = Instant::now() + PATIENCE;
        let mut pause = Duration::from_micros(200);
        loop {
            match flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => return Ok(LoopLock { _file: file }),
                Err(Errno::WOULDBLOCK | Errno::INTR) if Instant::now() < deadline => {
                    std::thread::sleep(pause);
                    pause = (pause * 2).min(Duration::from_millis(10));
                }
                Err(errno) => return Err(fail(errno)),
            }
        }
    }
}
