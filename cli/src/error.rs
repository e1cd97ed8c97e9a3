//! What went wrong, as a person and a script see it: one line, an optional hint, an exit code.

use berth_client::ClientError;
use berth_config::ConfigError;
use berth_image::store::StoreError;

/// Exit codes (README, "Exit codes"): those of sysexits.h that scripts tell apart.
pub const OTHER: u8 = 1;
pub const USAGE: u8 = 2;
pub const UNAVAILABLE: u8 = 69;
pub const PERMISSION: u8 = 77;
pub const CONFIG: u8 = 78;
/// 128 + SIGINT, what a shell says of a program that Ctrl-C ended.
pub const INTERRUPTED: u8 = 130;

/// The end of a command that failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub code: u8,
    /// One line, lower case, no full stop; empty when everything was said already.
    pub message: String,
    /// One line that says what to do.
    pub hint: Option<String>,
}

impl Failure {
    pub fn new(code: u8, message: impl Into<String>) -> Self {
        Self {
            code,
            message: crate::output::plain(message.into()),
            hint: None,
        }
    }

    /// A failure whose lines are printed already.
    pub fn silent(code: u8) -> Self {
        Self::new(code, "")
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Writes the lines to stderr and returns the exit code.
    pub fn report(&self) -> u8 {
        if !self.message.is_empty() {
            crate::output::note(&format!("berth: {}", self.message));
        }
        if let Some(hint) = &self.hint {
            crate::output::note(&format!("hint: {hint}"));
        }
        self.code
    }
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self {
            hint: error.hint(),
            ..Self::new(error.exit_code(), error.to_string())
        }
    }
}

impl From<ConfigError> for Failure {
    fn from(error: ConfigError) -> Self {
        let failure = Self::new(CONFIG, error.to_string());
        match &error {
            ConfigError::Read { source, .. } if source.kind() == std::io::ErrorKind::NotFound => {
                failure.hint("name another file with --config FILE or in BERTH_CONFIG")
            }
            ConfigError::Read { .. } => failure,
            _ => failure.hint("`berth config check` lists everything that is wrong"),
        }
    }
}

impl From<StoreError> for Failure {
    fn from(error: StoreError) -> Self {
        let code = match &error {
            StoreError::NoFormat { .. } => UNAVAILABLE,
            StoreError::Io { source, .. } => match source.kind() {
                std::io::ErrorKind::PermissionDenied => PERMISSION,
                _ => UNAVAILABLE,
            },
            StoreError::Format { .. }
            | StoreError::Uuid { .. }
            | StoreError::Owner { .. }
            | StoreError::NotEmpty { .. } => CONFIG,
        };
        let failure = Self::new(code, error.to_string());
        match &error {
            StoreError::NoFormat { .. } => {
                failure.hint("mount it, or make a new store with `berth store init`")
            }
            StoreError::NotEmpty { .. } => {
                failure.hint("set `store.path` to a folder that is empty or does not exist")
            }
            _ => failure,
        }
    }
}
