//! On the login node, as the user: the form is checked at once, and the daemon starts on the image while the job
//! queues.
//!
//! A daemon that does not answer costs a submission two seconds once a minute, not at every submission: a file in the
//! user's run folder remembers. Nothing here decides anything; nodes check all of it.

use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use berth_client::api::PinRequest;
use berth_client::{Client, ClientError};
use berth_config::Config;

use crate::refusal::{Refusal, code};
use crate::wanted::Wanted;

/// How long nobody is asked after a failure.
const BACKOFF: Duration = Duration::from_secs(60);

/// Exit codes that end a submission: malformed, bad data, not permitted. The plugin knows the same ones.
pub(crate) const REFUSALS: [u8; 3] = [code::USAGE, 65, code::PERMISSION];

/// Why there is no pin.
pub(crate) enum Silent {
    /// The daemon failed a moment ago; that was said then.
    Backoff,
    Told(Refusal),
}

impl From<Refusal> for Silent {
    fn from(refusal: Refusal) -> Silent {
        Silent::Told(refusal)
    }
}

/// What starting this program and ending it may take of the time that the plugin gives.
const MARGIN: Duration = Duration::from_millis(400);

/// The lines to print: `pin REFERENCE DIGEST`.
pub(crate) fn run(config: &Path, text: &str) -> Result<String, Silent> {
    let config = Config::load(config).map_err(|e| Refusal::new(code::CONFIG, e.to_string()))?;
    let wanted = Wanted::new(text, "", &config)?;
    let Some(reference) = &wanted.reference else {
        // A path of the store: its digest is in it.
        return Ok(String::new());
    };
    let backoff = Backoff::of_user();
    if backoff.as_ref().is_some_and(Backoff::is_on) {
        return Err(Silent::Backoff);
    }
    let request = PinRequest {
        cluster: cluster(),
        references: vec![reference.to_string()],
        platform: Some(wanted.platform.to_string()),
    };
    // A little less than the plugin waits, so that a daemon that says nothing is noted before the plugin gives up.
    let limit = Duration::from_secs(config.node.submit_wait_s).saturating_sub(MARGIN);
    let pins = Client::from_config(&config).and_then(|c| c.within(limit).pin(&request));
    match pins {
        Ok(pins) => {
            let digest = pins.pins.get(&request.references[0]);
            Ok(digest.map_or_else(String::new, |d| format!("pin {text} {d}\n")))
        }
        Err(error) => {
            if !matches!(error, ClientError::Api(_))
                && let Some(backoff) = &backoff
            {
                // Without it the next submission asks again: slower, not wrong.
                let _ = backoff.start();
            }
            let refusal = Refusal::new(error.exit_code(), error.to_string());
            Err(Silent::Told(match error.hint() {
                Some(hint) => refusal.hint(hint),
                None => refusal,
            }))
        }
    }
}

/// `ClusterName` of the Slurm that the user submits to, or `linux`, Slurm's own default.
fn cluster() -> String {
    let conf = std::env::var_os("SLURM_CONF").map(PathBuf::from);
    let conf = conf.unwrap_or_else(|| "/etc/slurm/slurm.conf".into());
    let text = fs::read_to_string(conf).unwrap_or_default();
    let name = text.lines().find_map(|line| {
        let (key, value) = line.split('#').next()?.split_once('=')?;
        let is_name = key.trim().eq_ignore_ascii_case("ClusterName");
        is_name.then(|| value.trim().to_lowercase())
    });
    name.unwrap_or_else(|| "linux".into())
}

/// The file that remembers a failure.
struct Backoff(PathBuf);

impl Backoff {
    /// In `$XDG_RUNTIME_DIR`, else in a folder in `/tmp` that is the user's alone.
    fn of_user() -> Option<Backoff> {
        let uid = rustix::process::getuid().as_raw();
        let folder = match std::env::var_os("XDG_RUNTIME_DIR") {
            Some(folder) => PathBuf::from(folder),
            None => {
                let folder = PathBuf::from(format!("/tmp/berth-{uid}"));
                let made = fs::DirBuilder::new().mode(0o700).create(&folder);
                if made.is_err_and(|e| e.kind() != io::ErrorKind::AlreadyExists) {
                    return None;
                }
                folder
            }
        };
        let meta = fs::symlink_metadata(&folder).ok()?;
        let ours = meta.is_dir() && meta.uid() == uid && meta.mode() & 0o022 == 0;
        ours.then(|| Backoff(folder.join("berth-daemon-failed")))
    }

    fn is_on(&self) -> bool {
        let changed = fs::symlink_metadata(&self.0).and_then(|m| m.modified());
        // A time in the future is a clock that was set back: ask.
        changed.is_ok_and(|t| {
            SystemTime::now()
                .duration_since(t)
                .is_ok_and(|age| age < BACKOFF)
        })
    }

    fn start(&self) -> io::Result<()> {
        let _ = fs::remove_file(&self.0);
        let mut options = fs::OpenOptions::new();
        options.write(true).create_new(true).mode(0o600);
        options.open(&self.0).map(drop)
    }
}
