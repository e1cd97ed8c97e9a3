//! Finding an image for a user: a process of its own, `berth-runtime attach`, which opens the record and the file with
//! the user's rights, verifies the record, and asks this service, as root, to attach what it found. So no byte of the
//! store is looked at here.

use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::peer::Peer;
use crate::setup::Failure;

/// The program and its configuration.
#[derive(Debug)]
pub(crate) struct Finder {
    program: PathBuf,
    config: PathBuf,
}

impl Finder {
    pub(crate) fn new(config: &Path) -> Result<Self, Failure> {
        let own = std::env::current_exe().map_err(|e| Failure::system("own path", e))?;
        Ok(Self {
            program: crate::setup::program(&own, "berth-runtime"),
            config: config.to_owned(),
        })
    }

    /// The folder at which the user finds the image. The program ends by itself in good time.
    pub(crate) fn find(
        &self,
        digest: &str,
        platform: &str,
        peer: &Peer,
    ) -> Result<PathBuf, Failure> {
        let groups: Vec<String> = peer.groups.iter().map(u32::to_string).collect();
        let output = Command::new(&self.program)
            .arg("attach")
            .arg("--config")
            .arg(&self.config)
            .args([
                format!("--uid={}", peer.uid),
                format!("--gid={}", peer.gid),
                format!("--platform={platform}"),
            ])
            .args((!groups.is_empty()).then(|| format!("--groups={}", groups.join(","))))
            .args(["--", digest])
            .env_clear()
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::null())
            .output()
            .map_err(|e| Failure::system(&format!("cannot run {}", self.program.display()), e))?;
        let text = String::from_utf8_lossy;
        if output.status.success() {
            return Ok(PathBuf::from(text(&output.stdout).trim_end()));
        }
        let said = text(&output.stderr).into_owned();
        let mut lines = said.lines();
        let why = lines.next().unwrap_or_default();
        let why = why.strip_prefix("berth: ").unwrap_or(why);
        let code = output
            .status
            .code()
            .and_then(|code| u8::try_from(code).ok());
        let failure = match why.is_empty() {
            true => Failure::new(
                Failure::INTERNAL,
                format!("looking for the image failed ({})", output.status),
            ),
            false => Failure::new(code.unwrap_or(Failure::INTERNAL), why),
        };
        Err(match lines.find_map(|line| line.strip_prefix("hint: ")) {
            Some(hint) => failure.hint(hint),
            None => failure,
        })
    }
}
