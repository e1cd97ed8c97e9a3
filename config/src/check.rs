//! What the types cannot say: values that would only fail later, in front of a user.

use std::fmt;
use std::path::Path;

use crate::sections::Config;

/// A value that cannot work.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// The key, `section.name`.
    pub key: &'static str,
    pub why: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.key, self.why)
    }
}

/// The longest path that fits `sockaddr_un` (unix(7)), in bytes.
const MAX_SOCKET_PATH: usize = 107;

impl Config {
    /// Everything wrong with the values, in the file's order; empty for a good configuration.
    pub fn problems(&self) -> Vec<Problem> {
        let mut found = Vec::new();
        let mut wrong = |bad: bool, key, why: &str| {
            if bad {
                found.push(Problem {
                    key,
                    why: why.to_owned(),
                });
            }
        };
        let relative = |p: &Path| !p.is_absolute();
        wrong(
            relative(&self.store.path),
            "store.path",
            "must be an absolute path",
        );
        wrong(
            self.store.owner.is_empty() || self.store.owner.contains(char::is_control),
            "store.owner",
            "must be a name on one line",
        );
        wrong(
            relative(&self.daemon.state_dir),
            "daemon.state_dir",
            "must be an absolute path",
        );
        wrong(
            self.daemon.parallel_fetches == 0,
            "daemon.parallel_fetches",
            "must be at least 1",
        );
        wrong(
            self.daemon.parallel_conversions == 0,
            "daemon.parallel_conversions",
            "must be at least 1",
        );
        wrong(
            self.daemon.fetch_attempts == 0,
            "daemon.fetch_attempts",
            "must be at least 1",
        );
        wrong(
            self.daemon.stall_timeout_s == 0,
            "daemon.stall_timeout_s",
            "must be at least 1",
        );
        wrong(
            !(60..=366 * 24 * 3600).contains(&self.daemon.grant_s),
            "daemon.grant_s",
            "must be from 60 to 31622400 (366 days)",
        );
        for (key, socket) in [
            ("api.socket", &self.api.socket),
            ("seal.socket", &self.seal.socket),
            ("node.service.socket", &self.node.service.socket),
        ] {
            wrong(relative(socket), key, "must be an absolute path");
            wrong(
                socket.as_os_str().len() > MAX_SOCKET_PATH,
                key,
                "is longer than a Unix socket's path may be (107 bytes)",
            );
        }
        let listen = self.api.listen.as_deref();
        wrong(
            listen.is_some_and(|l| l.parse::<std::net::SocketAddr>().is_err()),
            "api.listen",
            "must be ADDRESS:PORT, as in 0.0.0.0:7480",
        );
        if let Some(why) = self.api.url.problem() {
            wrong(true, "api.url", &why);
        }
        let block = self.convert.block_size;
        wrong(
            !block.is_power_of_two() || !(4096..=1 << 20).contains(&block),
            "convert.block_size",
            "must be a power of two from 4096 to 1048576",
        );
        wrong(
            self.convert.memory < 32 << 20,
            "convert.memory",
            "must be at least 33554432 (32 MiB)",
        );
        wrong(
            !(1..=22).contains(&self.convert.level),
            "convert.level",
            "must be from 1 to 22",
        );
        let mut registries = self.policy.registries.iter().flatten();
        wrong(
            registries.any(|r| {
                r.is_empty()
                    || r.contains(char::is_whitespace)
                    || r.contains("://")
                    || r.contains('*')
            }),
            "policy.registries",
            "must be HOST[:PORT] or HOST[:PORT]/REPOSITORY, without scheme and without `*`",
        );
        wrong(
            self.node.keys.is_empty(),
            "node.keys",
            "must name at least one public key",
        );
        wrong(
            self.node.submit_wait_s == 0,
            "node.submit_wait_s",
            "must be at least 1",
        );
        wrong(self.node.wait_s == 0, "node.wait_s", "must be at least 1");
        let service = &self.node.service;
        wrong(
            relative(&service.cache_dir),
            "node.service.cache_dir",
            "must be an absolute path",
        );
        wrong(
            service.user.is_empty()
                || service.user == "root"
                || service.user.parse::<u32>() == Ok(0),
            "node.service.user",
            "must be a user of its own, not root",
        );
        wrong(
            service
                .proxy
                .as_deref()
                .is_some_and(|p| !p.starts_with("http://")),
            "node.service.proxy",
            "must start with http://",
        );
        wrong(
            self.node
                .binds
                .iter()
                .any(|b| relative(&b.source) || b.target.as_deref().is_some_and(relative)),
            "node.binds",
            "source and target must be absolute paths",
        );
        found
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_has_no_problem() {
        assert_eq!(Config::default().problems(), []);
    }

    #[test]
    fn each_wrong_value_is_named() {
        let config =
            Config::parse("[convert]\nblock_size = 5000\n[api]\nlisten = 'here'\n").unwrap();
        let keys: Vec<&str> = config.problems().iter().map(|p| p.key).collect();
        assert_eq!(keys, ["api.listen", "convert.block_size"]);
    }
}
