//! The process that keeps a connection alive while servers come and go.
//!
//! It holds `/dev/fuse`, the image and the memory with requests in work, starts a server with copies of them, and starts
//! another one when that dies. While none runs, readers wait. It does nothing else, so that there is little it could
//! die of; it gives up on servers that die at once, again and again: then its descriptors close and readers get ENOTCONN.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::io::FdFlags;

/// What servers inherit.
#[derive(Debug)]
pub struct Held {
    /// The connection to the kernel.
    pub device: OwnedFd,
    /// Memory made by [`crate::slots::create`].
    pub slots: OwnedFd,
    /// The image's file, where there is one.
    pub image: Option<OwnedFd>,
}

/// So many deaths within [`WINDOW`] are too many.
const MOST_DEATHS: usize = 60;
const WINDOW: Duration = Duration::from_secs(60);

impl Held {
    /// Lets children inherit the descriptors, and names them as the arguments of `berth-fuse serve`.
    pub fn arguments(&self) -> io::Result<Vec<String>> {
        let mut arguments = Vec::new();
        let held = [
            ("--device", Some(&self.device)),
            ("--slots", Some(&self.slots)),
            ("--image", self.image.as_ref()),
        ];
        for (name, fd) in held {
            let Some(fd) = fd else { continue };
            rustix::io::fcntl_setfd(fd, FdFlags::empty())?;
            arguments.extend([name.to_owned(), fd.as_raw_fd().to_string()]);
        }
        Ok(arguments)
    }
}

/// Runs servers made by `command` one after another until one ends by itself, which is when the mount is gone.
/// `started` hears of each.
pub fn hold(
    mut command: impl FnMut() -> Command,
    mut started: impl FnMut(&Child),
) -> io::Result<ExitStatus> {
    let mut deaths = VecDeque::new();
    loop {
        let mut server = command().spawn()?;
        started(&server);
        let status = server.wait()?;
        if status.code().is_some() {
            return Ok(status);
        }
        let now = Instant::now();
        deaths.push_back(now);
        while deaths.front().is_some_and(|death| now - *death > WINDOW) {
            deaths.pop_front();
        }
        tracing::warn!(%status, "the server died");
        if deaths.len() > MOST_DEATHS {
            return Ok(status);
        }
    }
}
