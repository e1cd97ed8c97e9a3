//! What `berth` tells `berth-runtime user`: JSON in a file that it inherits.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// A command in an image, for the user who asks.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UserJob {
    /// The site's configuration; `None` for the defaults.
    pub config: Option<PathBuf>,
    /// The image, for messages.
    pub name: String,
    /// Number of the descriptor of the image's SquashFS file, where this machine has it.
    pub image: Option<i32>,
    /// Options of `berth-fuse hold`, which say where else the image's bytes are.
    pub serve: Vec<OsString>,
    /// What lets its bearer read there.
    pub grant: Option<String>,
    /// A folder of this machine's where the image is mounted already.
    pub mounted: Option<PathBuf>,
    /// The image's variables, `NAME=VALUE`.
    pub env: Vec<String>,
    /// The image's own working directory.
    pub image_cwd: Option<PathBuf>,
    /// `SRC[:DST[:FLAGS]]` each.
    pub mounts: Vec<OsString>,
    pub workdir: Option<PathBuf>,
    pub writable: bool,
    /// The command and its arguments; never empty.
    pub command: Vec<OsString>,
}

/// Without the grant, which is a secret.
impl fmt::Debug for UserJob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("UserJob")
            .field("name", &self.name)
            .field("command", &self.command)
            .finish_non_exhaustive()
    }
}
