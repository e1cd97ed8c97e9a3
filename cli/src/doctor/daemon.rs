//! The daemon, the clock, and munge.

use std::time::Duration;

use berth_client::{Client, Munge, Probe};
use berth_config::Config;
use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimeParser;

use super::Check;

const LIMIT: Duration = Duration::from_secs(5);
/// munge refuses credentials older or newer than five minutes; long before that something is wrong.
const SKEW_WARN: i64 = 30;
const SKEW_FAIL: i64 = 240;
const COLD: &str = "images that are in the store start all the same, others do not";

pub fn checks(config: &Config) -> Vec<Check> {
    let mut checks = daemon(config);
    checks.push(munge(config));
    checks
}

fn daemon(config: &Config) -> Vec<Check> {
    let name = "daemon";
    let client = match Client::from_config(config) {
        Ok(client) => client.within(LIMIT),
        Err(e) => return vec![Check::warn(name, format!("{e}: {COLD}")).hint(hint(&e))],
    };
    let probe = match client.probe() {
        Ok(probe) => probe,
        Err(e) => {
            return vec![
                Check::warn(name, format!("{e}: {COLD}"))
                    .hint("start it where it lives: systemctl status berthd"),
            ];
        }
    };
    let mut checks = vec![match client.status() {
        _ if probe.status != 200 => Check::warn(
            name,
            format!(
                "{} answers that it is not well (HTTP {})",
                client.place(),
                probe.status
            ),
        )
        .hint("its log says why: journalctl -u berthd"),
        Ok(status) if status.store != config.store.path.display().to_string() => Check::warn(
            name,
            format!(
                "{} publishes into `{}`, this machine reads `{}`",
                client.place(),
                status.store,
                config.store.path.display()
            ),
        )
        .hint("give both the same configuration"),
        Ok(status) if status.sealer.starts_with("down") => Check::warn(
            name,
            format!("its sealer is {}: no new image can be made", status.sealer),
        )
        .hint("systemctl status berth-seal, or set `seal.spawn` where berthd is to start it"),
        Ok(status) => Check::ok(
            name,
            format!("berthd {} at {}", status.version, client.place()),
        ),
        Err(e) => Check::warn(name, e.to_string()).hint(hint(&e)),
    }];
    checks.extend(clock(&probe));
    checks
}

fn hint(error: &berth_client::ClientError) -> String {
    error
        .hint()
        .unwrap_or_else(|| "start berthd, or set `api.url`".into())
}

fn clock(probe: &Probe) -> Option<Check> {
    let name = "clock";
    let theirs = DateTimeParser::new()
        .parse_timestamp(probe.date.as_deref()?)
        .ok()?;
    let apart = (Timestamp::now().as_second() - theirs.as_second()).abs();
    let detail = format!("{apart} s from the daemon's");
    Some(match apart {
        SKEW_FAIL.. => {
            Check::fail(name, detail).hint("munge refuses us: set the clocks, with chrony or ntpd")
        }
        SKEW_WARN.. => Check::warn(name, detail).hint("set the clocks, with chrony or ntpd"),
        _ => Check::ok(name, detail),
    })
}

/// A credential made here is taken here. Needed where the daemon is reached over TCP.
fn munge(config: &Config) -> Check {
    let name = "munge";
    let round_trip = || {
        let munge = Munge::load(config.api.munge_socket.as_deref())?;
        munge.decode(&munge.encode(b"doctor")?)
    };
    match (round_trip(), &config.api.url) {
        (Ok(who), _) => Check::ok(
            name,
            format!("makes and takes credentials, as uid {}", who.uid),
        ),
        (Err(e), Some(url)) => Check::fail(
            name,
            format!("{e}: the daemon at {url} would not know who asks"),
        )
        .hint("install libmunge2, start munged, and see that its key is the cluster's"),
        (Err(e), None) => Check::warn(name, format!("{e}; needed only where `api.url` is set")),
    }
}
