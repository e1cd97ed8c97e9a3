//! How the service stands: for people, for collectors, and after letting go of what it can.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_mount::keeper::{Answer, MountStatus, Status};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;

use super::{Lease, Service};
use crate::den::Berth;

/// How long helpers that wait for a next job may take to leave.
const FAREWELL: Duration = Duration::from_secs(1);

impl Service {
    pub(super) fn metrics(&self) -> Answer {
        let (mut text, takeovers) = self.server.metrics();
        let status = self.status();
        let mut add = |name: &str, kind: &str, help: &str, value: u64| {
            let _ = write!(
                text,
                "# HELP berth_node_{name} {help}\n# TYPE berth_node_{name} {kind}\nberth_node_{name} {value}\n"
            );
        };
        let used = status.mounts.iter().filter(|mount| mount.users > 0);
        let (used, all) = (used.count() as u64, status.mounts.len() as u64);
        let state = self.state();
        add("mounts", "gauge", "Mounts that are kept.", all);
        add("mounts_used", "gauge", "Mounts that jobs use.", used);
        let (made, given) = (state.made, state.given);
        drop(state);
        add(
            "mounts_made_total",
            "counter",
            "Mounts that were not there.",
            made,
        );
        add(
            "mounts_given_total",
            "counter",
            "Mounts given to steps.",
            given,
        );
        add(
            "takeovers_total",
            "counter",
            "Servers that went on where another died.",
            takeovers,
        );
        let (copies, counted) = (status.copies, self.copies.counted());
        add(
            "copies",
            "gauge",
            "Whole images on this node, root's own copies.",
            copies.count as u64,
        );
        add("copies_bytes", "gauge", "Bytes of them.", copies.bytes);
        add(
            "copies_limit_bytes",
            "gauge",
            "Most bytes of them.",
            copies.limit,
        );
        add(
            "copies_made_total",
            "counter",
            "Copies made and verified.",
            counted.made,
        );
        add(
            "copies_failed_total",
            "counter",
            "Copies that were not made, or thrown away because they were not what was sealed.",
            counted.failed,
        );
        Answer::Text { text }
    }

    pub(super) fn drain(&self) -> Answer {
        let mut state = self.state();
        state.draining = true;
        let now = Instant::now();
        for attached in state.attached.values_mut() {
            attached.until = now;
        }
        state.table.drain();
        let leases = state.leases.clone();
        drop(state);
        leases.iter().for_each(|lease| lease.hurry());
        self.see_off(leases);
        self.let_go(&mut self.state());
        self.copies.stop();
        Answer::Status(self.status())
    }

    /// Waits a moment for those to go who hold something for a next job only.
    fn see_off(&self, mut leases: Vec<Arc<Lease>>) {
        let until = Instant::now() + FAREWELL;
        while !leases.is_empty() {
            let left = until.saturating_duration_since(Instant::now());
            let fds = leases.iter();
            let fds = fds.map(|lease| PollFd::new(&lease.connection, PollFlags::IN));
            let mut fds: Vec<_> = fds.collect();
            let timeout = Timespec::try_from(left).ok();
            match poll(&mut fds, timeout.as_ref()) {
                Err(Errno::INTR) => continue,
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
            let ended: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
            let mut ended = ended.into_iter();
            let mut state = self.state();
            leases.retain(|lease| {
                let is_ended = ended.next() == Some(true);
                if is_ended {
                    state.end(lease);
                }
                !is_ended
            });
        }
    }

    pub(super) fn status(&self) -> Status {
        let any = (self.state().table.iter()).any(|(_, entry)| entry.mount.served.is_some());
        let fetched = match any {
            true => self.server.fetched(),
            false => BTreeMap::new(),
        };
        let state = self.state();
        let now = Instant::now();
        let paths = |berth: Berth| {
            let of = state.attached.values().filter(|a| a.of.berth == berth);
            of.map(|attached| attached.path.clone()).collect()
        };
        let mounts = state.table.iter().map(|(_, entry)| MountStatus {
            digest: entry.mount.digest.clone(),
            platform: entry.mount.platform.clone(),
            how: entry.mount.how,
            users: entry.users,
            idle_s: entry.idle(now).as_secs(),
            given: entry.given,
            fetched: (entry.mount.served).map(|id| fetched.get(&id).copied().unwrap_or_default()),
            paths: paths(entry.mount.berth),
        });
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            draining: state.draining,
            server: self.server.pid(),
            mounts: mounts.collect(),
            copies: self.copies.status(),
        }
    }
}
