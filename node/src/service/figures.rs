//! How the service stands: for people, for collectors, and after letting go of what it can.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::time::Instant;

use berth_mount::keeper::{Answer, MountStatus, Status};

use super::Service;
use crate::den::Berth;

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
        self.let_go(&mut state);
        drop(state);
        Answer::Status(self.status())
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
        }
    }
}
