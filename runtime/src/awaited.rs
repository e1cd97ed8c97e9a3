//! A refusal that nobody fetches: srun asks about its image before it has nodes and fetches the answer when it has them.
//! One that queues for an image which it cannot have is told so, and ended as `scancel` would.
//!
//! Descriptors, from the plugin: 0 is a socket on which srun says that it has the answer, 1 and 2 are pipes to srun (their
//! end is the answer's end), 3 is srun's own standard error.

use std::io::Write;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, getppid, kill_process};

use crate::channel::Channel;
use crate::sys;

/// How long srun may take to fetch an answer when there are free nodes.
const PATIENCE: Duration = Duration::from_secs(1);

/// Lets the answer end, and ends process `client`, which must be this one's parent, with `text` if it does not say within
/// [`PATIENCE`] that it has heard.
pub(crate) fn end_unless_heard(client: u32, text: &str) {
    let Ok(socket) = sys::inherited(0) else {
        return;
    };
    let messages = sys::inherited(3);
    sys::end_output();
    let heard = Channel::from_fd(socket).receive_until(Instant::now() + PATIENCE);
    // A client that has gone closed its end: that is an answer too, or an end without a packet.
    if heard.is_ok() {
        return;
    }
    let parent = i32::try_from(client).ok().and_then(Pid::from_raw);
    if parent.is_none() || getppid() != parent {
        return;
    }
    if let (Ok(messages), Some(client)) = (messages, parent) {
        let _ = std::fs::File::from(messages).write_all(text.as_bytes());
        let _ = kill_process(client, Signal::TERM);
    }
}
