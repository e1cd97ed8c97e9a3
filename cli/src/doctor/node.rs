//! The node service.

use std::time::{Duration, Instant};

use berth_config::Config;
use berth_mount::keeper::{self, Answer, KeeperError, Request};

use super::Check;

const NAME: &str = "node service";

/// Whether it answers; jobs run without it.
pub fn check(config: &Config) -> Check {
    let socket = &config.node.service.socket;
    let deadline = Instant::now() + Duration::from_secs(3);
    match keeper::ask(socket, &Request::Status, None, deadline) {
        Ok(Answer::Status(status)) if status.draining => {
            Check::warn(NAME, "drained: it keeps no mounts").hint("systemctl restart berth-node")
        }
        Ok(Answer::Status(status)) => Check::ok(
            NAME,
            format!("berth-node {}, {} mounts", status.version, status.mounts.len()),
        ),
        // It is there, and tells more to root only.
        Err(KeeperError::Refused { code: 77, .. }) => {
            Check::ok(NAME, format!("answers at {}", socket.display()))
        }
        Ok(_) => Check::warn(NAME, "it speaks another language")
            .hint("berth and berth-node must be of one release"),
        Err(error) => Check::warn(NAME, error.to_string()).hint(
            "on compute nodes: systemctl enable --now berth-node; without it each job mounts its image anew",
        ),
    }
}
