//! Signals as bytes of a pipe, so that one loop waits for them and for requests alike.
//!
//! Handlers, not a mask: what this process starts must not inherit blocked signals.
#![allow(
    unsafe_code,
    reason = "a signal's action can only be set by an unsafe call"
)]

use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};
use rustix::pipe::{PipeFlags, pipe_with};

use crate::setup::Failure;

static PIPE: AtomicI32 = AtomicI32::new(-1);

/// A byte in the pipe.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Told {
    /// End.
    Stop,
    /// Look at the table again: something changed.
    Look,
}

/// The reading end of the pipe.
#[derive(Debug)]
pub(crate) struct Bell {
    pub(crate) read: OwnedFd,
    write: OwnedFd,
}

extern "C" fn ring(signal: i32) {
    let byte = signal as u8;
    // SAFETY: write(2) may be called from a handler; the pipe is never closed, and a full one wants nothing more.
    unsafe { nix::libc::write(PIPE.load(Ordering::Relaxed), (&raw const byte).cast(), 1) };
}

impl Bell {
    /// Once a process.
    pub(crate) fn new() -> Result<Self, Failure> {
        let system = |e: rustix::io::Errno| Failure::system("pipe", e);
        let (read, write) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(system)?;
        PIPE.store(write.as_raw_fd(), Ordering::Relaxed);
        let action = SigAction::new(
            SigHandler::Handler(ring),
            SaFlags::SA_RESTART,
            SigSet::empty(),
        );
        for signal in [Signal::SIGTERM, Signal::SIGINT] {
            // SAFETY: the handler only writes to a pipe.
            unsafe { sigaction(signal, &action) }.map_err(|e| Failure::system("sigaction", e))?;
        }
        Ok(Self { read, write })
    }

    /// Has the loop look again.
    pub(crate) fn look(&self) {
        // Full means that it will look anyway.
        let _ = rustix::io::write(&self.write, &[0]);
    }

    /// Everything told since the last time.
    pub(crate) fn drain(&self) -> Vec<Told> {
        let mut bytes = [0; 64];
        let mut told = Vec::new();
        while let Ok(count @ 1..) = rustix::io::read(&self.read, &mut bytes) {
            told.extend(bytes[..count].iter().map(|byte| match byte {
                0 => Told::Look,
                _ => Told::Stop,
            }));
        }
        told
    }
}
