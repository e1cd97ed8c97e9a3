//! The one form in which a step learns why it gets no container.

use crate::opener::OpenError;
use crate::text::one_line;
use crate::view::ViewError;
use crate::wire::{Body, Fields};

/// Exit codes (docs: README, "Exit codes").
pub(crate) mod code {
    pub(crate) const OTHER: u8 = 1;
    pub(crate) const USAGE: u8 = 2;
    pub(crate) const UNAVAILABLE: u8 = 69;
    pub(crate) const INTERNAL: u8 = 70;
    pub(crate) const PERMISSION: u8 = 77;
    pub(crate) const CONFIG: u8 = 78;
}

/// What a user reads, and the exit code of the task.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Refusal {
    pub(crate) code: u8,
    /// One line: what and why.
    pub(crate) line: String,
    /// One line: what next.
    pub(crate) hint: Option<String>,
}

impl Refusal {
    pub(crate) fn new(code: u8, line: impl Into<String>) -> Refusal {
        Refusal {
            code,
            line: line.into(),
            hint: None,
        }
    }

    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Refusal {
        self.hint = Some(hint.into());
        self
    }

    /// `berth: …`, and `hint: …` on a second line where there is one.
    pub(crate) fn text(&self) -> String {
        let mut text = format!("berth: {}", one_line(&self.line));
        if let Some(hint) = &self.hint {
            text.push_str("\nhint: ");
            text.push_str(&one_line(hint));
        }
        text
    }

    /// For a message between processes of ours.
    pub(crate) fn body(&self) -> Body {
        let body = Body::default()
            .field("code", self.code.to_string().as_bytes())
            .field("line", self.line.as_bytes());
        match &self.hint {
            Some(hint) => body.field("hint", hint.as_bytes()),
            None => body,
        }
    }

    /// The other end of [`Refusal::body`].
    pub(crate) fn from_body(body: &[u8]) -> Refusal {
        let fields = Fields(body);
        let text = |key| {
            fields
                .get(key)
                .map(|v| String::from_utf8_lossy(v).into_owned())
        };
        Refusal {
            code: text("code")
                .and_then(|c| c.parse().ok())
                .unwrap_or(code::INTERNAL),
            line: text("line").unwrap_or_else(|| "no reason was given".into()),
            hint: text("hint"),
        }
    }
}

impl From<ViewError> for Refusal {
    fn from(error: ViewError) -> Refusal {
        let code = match &error {
            ViewError::Source { source, .. } | ViewError::Workdir { source, .. } => match source {
                OpenError::Refused(e) if e.kind() == std::io::ErrorKind::PermissionDenied => {
                    code::PERMISSION
                }
                OpenError::Refused(_) => code::USAGE,
                OpenError::Slow => code::UNAVAILABLE,
                OpenError::Ended(_) => code::INTERNAL,
            },
            ViewError::Target { .. } | ViewError::Foreign { .. } | ViewError::Unfit { .. } => {
                code::USAGE
            }
            ViewError::Opener(_) | ViewError::At { .. } | ViewError::Step { .. } => code::INTERNAL,
        };
        let hint = match &error {
            ViewError::Source { .. } => Some("the path is opened on the node, with your rights"),
            ViewError::Foreign { .. } => Some("make it yourself, or bind it somewhere else"),
            ViewError::Unfit { .. } => Some("choose another image, or another place for it"),
            ViewError::Workdir { .. } => {
                Some("--container-workdir names a folder as the container sees it")
            }
            ViewError::Target { .. } => None,
            _ => Some("this is the node's fault: tell its admins, `berth doctor` may know more"),
        };
        let refusal = Refusal::new(code, error.to_string());
        match hint {
            Some(hint) => refusal.hint(hint),
            None => refusal,
        }
    }
}
