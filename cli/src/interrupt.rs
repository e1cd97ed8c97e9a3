//! Ctrl-C while the daemon works for us: the terminal is left clean, and the user learns that the work goes on. And all
//! signals while a command of the user's runs.

use std::process::Child;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicUsize, Ordering};

use nix::sys::signal::{SigSet, Signal, kill};
use nix::unistd::Pid;

use crate::error::{Failure, INTERRUPTED};

/// Pulls that the daemon accepted and that have not ended.
static IN_DAEMON: AtomicUsize = AtomicUsize::new(0);
/// A command of the user's has the terminal.
static HANDED_OVER: AtomicBool = AtomicBool::new(false);
/// That command's process, once it runs.
static COMMAND: AtomicI32 = AtomicI32::new(0);

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
    let signals = blocked(&[Signal::SIGINT])?;
    std::thread::spawn(move || {
        while signals.wait().is_ok() {
            if HANDED_OVER.load(Ordering::Relaxed) {
                continue;
            }
            clean();
            std::process::exit(interrupted().report().into());
        }
    });
    Ok(())
}

/// For who will hand over to a command of the user's ([`hand_over`]): signals that would end this program do so by a
/// thread that knows of the command. To be called before any other thread starts, as [`watch`].
pub fn watch_all() -> Result<(), Failure> {
    let typed = [Signal::SIGINT, Signal::SIGQUIT];
    let signals = blocked(&[typed[0], typed[1], Signal::SIGTERM, Signal::SIGHUP])?;
    std::thread::spawn(move || {
        while let Ok(signal) = signals.wait() {
            let command = COMMAND.load(Ordering::Relaxed);
            match typed.contains(&signal) {
                // The command got it too.
                true if HANDED_OVER.load(Ordering::Relaxed) => {}
                true => std::process::exit(interrupted().report().into()),
                false if command != 0 => drop(kill(Pid::from_raw(command), signal)),
                false => std::process::exit(128 + signal as i32),
            }
        }
    });
    Ok(())
}

/// From now on a command of the user's has the terminal: what is typed there is for it, and this program goes on until
/// the command has ended. To be called before it is started.
pub fn hand_over() {
    HANDED_OVER.store(true, Ordering::Relaxed);
}

/// Which command that is: who ends this program ends it.
pub fn handed_to(command: &Child) {
    let pid = i32::try_from(command.id()).unwrap_or_default();
    COMMAND.store(pid, Ordering::Relaxed);
}

/// It has ended: its number may be another's soon.
pub fn ended() {
    COMMAND.store(0, Ordering::Relaxed);
}

/// Keeps signals for who waits for them. Programs that are started inherit that.
fn blocked(which: &[Signal]) -> Result<SigSet, Failure> {
    let signals: SigSet = which.iter().copied().collect();
    signals
        .thread_block()
        .map_err(|e| Failure::new(70, format!("cannot block signals: {e}")))?;
    Ok(signals)
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
