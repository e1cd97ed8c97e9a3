//! The daemons, their clocks, and munge.

use std::thread::ScopedJoinHandle;
use std::time::Duration;

use berth_client::{Client, ClientError, Munge, Probe};
use berth_config::Config;
use jiff::Timestamp;
use jiff::fmt::rfc2822::DateTimeParser;

use super::Check;

const LIMIT: Duration = Duration::from_secs(5);
/// munge refuses credentials older or newer than five minutes; long before that something is wrong.
const SKEW_WARN: i64 = 30;
const SKEW_FAIL: i64 = 240;
const NAME: &str = "daemon";
const OTHERS: &str = "the others are asked instead";
const COLD: &str = "images that are in the store start all the same, others do not";

pub fn checks(config: &Config) -> Vec<Check> {
    let mut checks = daemons(config);
    checks.push(munge(config));
    checks
}

/// Each of the site's daemons, asked side by side.
fn daemons(config: &Config) -> Vec<Check> {
    let each = match Client::each_from_config(config) {
        Ok(each) => each,
        Err(e) => return vec![Check::warn(NAME, format!("{e}: {COLD}")).hint(hint(&e))],
    };
    let asked: Vec<Result<Vec<Check>, ClientError>> = std::thread::scope(|scope| {
        let ask = |client: Client| scope.spawn(move || daemon(&client.within(LIMIT), config));
        let asked: Vec<_> = each.into_iter().map(ask).collect();
        let asked = asked.into_iter().map(ScopedJoinHandle::join);
        asked.flatten().collect()
    });
    let lost = match asked.iter().all(Result::is_err) {
        true => COLD,
        false => OTHERS,
    };
    let checks = asked.into_iter().map(|asked| match asked {
        Ok(checks) => checks,
        Err(e) => vec![
            Check::warn(NAME, format!("{e}: {lost}"))
                .hint("start it where it lives: systemctl status berthd"),
        ],
    });
    checks.flatten().collect()
}

/// What one daemon says, and its clock; an error where it does not answer.
fn daemon(client: &Client, config: &Config) -> Result<Vec<Check>, ClientError> {
    let probe = client.probe()?;
    let mut checks = vec![match client.status() {
        _ if probe.status != 200 => Check::warn(
            NAME,
            format!(
                "{} answers that it is not well (HTTP {})",
                client.place(),
                probe.status
            ),
        )
        .hint("its log says why: journalctl -u berthd"),
        Ok(status) if status.store != config.store.path.display().to_string() => Check::warn(
            NAME,
            format!(
                "{} publishes into `{}`, this machine reads `{}`",
                client.place(),
                status.store,
                config.store.path.display()
            ),
        )
        .hint("give both the same configuration"),
        Ok(status) if status.sealer.starts_with("down") => Check::warn(
            NAME,
            format!(
                "the sealer of {} is {}: no new image can be made",
                client.place(),
                status.sealer
            ),
        )
        .hint("systemctl status berth-seal, or set `seal.spawn` where berthd is to start it"),
        Ok(status) => Check::ok(
            NAME,
            format!("berthd {} at {}", status.version, client.place()),
        ),
        Err(e) => Check::warn(NAME, e.to_string()).hint(hint(&e)),
    }];
    checks.extend(clock(&probe));
    Ok(checks)
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
    let urls = &config.api.url;
    match (round_trip(), urls.is_empty()) {
        (Ok(who), _) => Check::ok(
            name,
            format!("makes and takes credentials, as uid {}", who.uid),
        ),
        (Err(e), false) => Check::fail(
            name,
            format!("{e}: the daemon at {urls} would not know who asks"),
        )
        .hint("install libmunge2, start munged, and see that its key is the cluster's"),
        (Err(e), true) => Check::warn(name, format!("{e}; needed only where `api.url` is set")),
    }
}
