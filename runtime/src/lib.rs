//! A job's view of an image on a compute node: found, checked, mounted, and handed to the tasks that asked.
//!
//! Runs as root, one process a step, with one thread. Everything that a user named is opened by a child that is wholly
//! that user ([`opener`]); everything that could hang (the parallel filesystem, the daemon) happens in children that
//! can be left behind.

pub mod attach;
mod awaited;
mod builder;
mod channel;
mod environment;
mod finder;
mod grant;
mod mounted;
mod mounts;
mod opener;
mod own_image;
mod prepared;
mod preread;
mod refusal;
mod sealed;
mod serials;
mod slurm;
mod standby;
mod step;
#[doc(hidden)]
pub mod strangers;
mod submit;
mod sys;
mod text;
mod trusted;
mod user;
pub mod user_view;
pub mod view;
mod wanted;
mod wire;

use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

pub use grant::granted;
pub use opener::OpenError;
pub use user::{Account, User};

/// `berth-runtime step`: serves the step whose plugin holds the other end of descriptor 3.
pub fn step() -> ExitCode {
    let served = sys::inherited(3).and_then(|socket| {
        user::be_root_alone()?;
        step::run(channel::Channel::from_fd(socket), None, None)
    });
    match served {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let why = text::plain(&error);
            let refusal = refusal::Refusal::new(
                refusal::code::INTERNAL,
                format!("cannot serve the step of Slurm's plugin at descriptor 3: {why}"),
            );
            let text = refusal
                .hint("the plugin starts this; people use `berth`")
                .text();
            let _ = writeln!(io::stderr(), "{text}");
            ExitCode::from(refusal::code::INTERNAL)
        }
    }
}

/// `berth-runtime standby`: see [`standby`].
pub fn standby(config: &Path) -> ExitCode {
    match standby::run(config) {
        Ok(()) => ExitCode::SUCCESS,
        Err(refusal) => {
            let _ = writeln!(io::stderr(), "{}", refusal.text());
            ExitCode::from(refusal.code)
        }
    }
}

/// `berth-runtime submit`: prints `pin REFERENCE DIGEST` when the daemon has pinned the image. `waiting` is the srun
/// that fetches the answer later: one that is refused and still waits for nodes is ended ([`awaited`]).
pub fn submit(config: &Path, reference: &str, waiting: Option<u32>) -> ExitCode {
    let (code, text) = match submit::run(config, reference) {
        Ok(lines) => {
            let _ = io::stdout().write_all(lines.as_bytes());
            return ExitCode::SUCCESS;
        }
        Err(submit::Silent::Backoff) => return ExitCode::from(refusal::code::UNAVAILABLE),
        Err(submit::Silent::Told(refusal)) => (refusal.code, refusal.text() + "\n"),
    };
    let _ = io::stderr().write_all(text.as_bytes());
    if let Some(client) = waiting
        && submit::REFUSALS.contains(&code)
    {
        awaited::end_unless_heard(client, &text);
    }
    ExitCode::from(code)
}
