//! The services of a node.

use std::io;
use std::time::{Duration, Instant};

use berth_config::Config;
use berth_mount::keeper::{self, Answer, KeeperError, Request};
use berth_mount::packets::Packets;

use super::Check;

const NAME: &str = "node service";
const STANDBY: &str = "steps' helper on standby";
const PATIENCE: Duration = Duration::from_secs(3);

/// Whether they answer; jobs run without them.
pub fn checks(config: &Config) -> [Check; 2] {
    [service(config), standby(config)]
}

fn standby(config: &Config) -> Check {
    let socket = config.node.step_socket();
    match Packets::connect(&socket, Instant::now() + PATIENCE) {
        Ok(_) => Check::ok(STANDBY, format!("listens at {}", socket.display())),
        // It is there, and listens to root only.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            Check::ok(STANDBY, format!("listens at {}", socket.display()))
        }
        Err(error) => Check::warn(STANDBY, format!("nobody listens at {}: {error}", socket.display())).hint(
            "on compute nodes: systemctl enable --now berth-step; without it each step of a container job starts a program",
        ),
    }
}

fn service(config: &Config) -> Check {
    let socket = &config.node.service.socket;
    let deadline = Instant::now() + PATIENCE;
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
