//! What every command starts from: the configuration and how to speak.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use berth_client::Client;
use berth_config::{Config, ConfigError, DEFAULT_PATH};
use berth_image::{ImageRef, Platform};

use crate::args::Global;
use crate::error::{Failure, USAGE};

#[derive(Debug)]
pub struct Context {
    pub config: Config,
    pub config_path: PathBuf,
    pub json: bool,
    pub quiet: bool,
}

impl Context {
    pub fn load(global: &Global) -> Result<Self, Failure> {
        Ok(Self {
            config: load(&global.config)?,
            config_path: global.config.clone(),
            json: global.json,
            quiet: global.quiet,
        })
    }

    pub fn client(&self) -> Result<Client, Failure> {
        Ok(Client::from_config(&self.config)?)
    }

    /// Reads what a user typed as a reference, before anybody is asked about it.
    pub fn reference(&self, text: &str) -> Result<ImageRef, Failure> {
        ImageRef::parse(text, self.config.default_registry.as_deref())
            .map_err(|e| Failure::new(USAGE, e.to_string()).hint(REFERENCE_HINT))
    }

    /// Says something to a person, unless only results are wanted.
    pub fn say(&self, text: &str) {
        if !self.quiet {
            crate::output::note(text);
        }
    }
}

const REFERENCE_HINT: &str = "write HOST/REPOSITORY:TAG, as in docker://ghcr.io/group/app:2.1";

/// The configuration in `path`. Where the default file does not exist, the defaults apply.
pub fn load(path: &Path) -> Result<Config, ConfigError> {
    match Config::load(path) {
        Err(ConfigError::Read { source, .. })
            if source.kind() == ErrorKind::NotFound && path == Path::new(DEFAULT_PATH) =>
        {
            Ok(Config::default())
        }
        result => result,
    }
}

/// The platform that a command is about.
pub fn platform(given: Option<Platform>) -> Platform {
    given.unwrap_or_else(Platform::host)
}
