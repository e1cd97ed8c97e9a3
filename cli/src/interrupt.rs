//! Ctrl-C while the daemon works for us: the terminal is left clean, and the user learns that the work goes on.

use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::signal::{SigSet, Signal};

use crate::error::{Failure, INTERRUPTED};

/// Pulls that the daemon accepted and that have not ended.
static IN_DAEMON: AtomicUsize = AtomicUsize::new(0);

/// Counts one pull as the daemon's, as long as it lives.
#[derive(Debug)]
pub struct InDaemon(());

impl InDaemon {
    pub fn new() -> Self {
        IN_DAEMON.fetch_add(1, Ordering::Relaxed);
        Self(())
    }
}

impl Drop for InDaemon {
    fn drop(&mut self) {
        IN_DAEMON.fetch_sub(1, Ordering::Relaxed);
    }
}

/// From now on SIGINT ends the program by way of `clean`. To be called before any other thread starts: they inherit
/// the blocked signal, so that it reaches the thread that waits for it.
pub fn watch(clean: impl Fn() + Send + 'static) -> Result<(), Failure> {
    let mut signals = SigSet::empty();
    signals.add(Signal::SIGINT);
    signals
        .thread_block()
        .map_err(|e| Failure::new(70, format!("cannot block signals: {e}")))?;
    std::thread::spawn(move || {
        if signals.wait().is_ok() {
            clean();
            std::process::exit(interrupted().report().into());
        }
    });
    Ok(())
}

fn interrupted() -> Failure {
    match IN_DAEMON.load(Ordering::Relaxed) {
        0 => Failure::new(INTERRUPTED, "interrupted"),
        n => Failure::new(
            INTERRUPTED,
            format!(
                "interrupted; the daemon goes on with {}",
                if n == 1 {
                    "the pull".into()
                } else {
                    format!("{n} pulls")
                }
            ),
        )
        .hint("the same command waits for it again, `berth pulls --watch` follows it"),
    }
}
