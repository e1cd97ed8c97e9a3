//! Why a call to the daemon gave no answer.

use std::io;

use crate::api::ErrorBody;
use crate::munge::MungeError;

/// Why a call failed. The `Display` form is one line for the user; [`ClientError::hint`] says what to do.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers there.
    #[error("cannot reach the daemon at {place}: {why}")]
    Unreachable { place: String, why: String },
    /// The limit of the connection or of the whole call passed.
    #[error("the daemon at {place} did not answer in time")]
    Timeout { place: String },
    /// None of several did; what became of each.
    #[error("no daemon answers: {}", lines(.0))]
    NoneAnswers(Vec<ClientError>),
    /// The daemon answered with an error.
    #[error(transparent)]
    Api(ErrorBody),
    /// Something answered that is not the daemon, or not this version of it.
    #[error("{place} did not answer as Berth's daemon does: {why}")]
    Protocol { place: String, why: String },
    /// Nothing says where the daemon is.
    #[error("no daemon: there is no socket `{socket}` and the configuration names no `api.url`")]
    NoAddress { socket: String },
    #[error("cannot show the daemon who asks: {0}")]
    Munge(#[from] MungeError),
}

impl ClientError {
    /// Whether nobody answered, so that what the store holds is all there is.
    pub fn is_unavailable(&self) -> bool {
        matches!(
            self,
            Self::Unreachable { .. }
                | Self::Timeout { .. }
                | Self::NoneAnswers(_)
                | Self::NoAddress { .. }
        )
    }

    /// Whether one may be there, and was only slow.
    pub fn is_timeout(&self) -> bool {
        match self {
            Self::Timeout { .. } => true,
            Self::NoneAnswers(each) => each.iter().any(Self::is_timeout),
            _ => false,
        }
    }

    /// Of several daemons' silence one error, which an answer that makes no sense is by itself. `place` is where nobody
    /// could be asked.
    pub(crate) fn of_all(mut silent: Vec<Self>, place: &str) -> Self {
        let last = silent.pop().unwrap_or_else(|| Self::Timeout {
            place: place.to_owned(),
        });
        if silent.is_empty() || matches!(last, Self::Protocol { .. }) {
            return last;
        }
        silent.push(last);
        Self::NoneAnswers(silent)
    }

    /// One line that says what to do.
    pub fn hint(&self) -> Option<String> {
        match self {
            Self::Unreachable { .. } | Self::Timeout { .. } | Self::NoneAnswers(_) => {
                Some("is berthd running? `berth doctor` looks into it".into())
            }
            Self::NoAddress { .. } => {
                Some("start berthd, or set `api.url` to where it listens".into())
            }
            Self::Protocol { .. } => Some("check `api.socket` and `api.url`".into()),
            Self::Munge(_) => Some("is munged running on this machine?".into()),
            Self::Api(body) => body.hint.clone(),
        }
    }

    /// The exit code of a program that ends with this error (docs: README, "Exit codes").
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Unreachable { .. }
            | Self::Timeout { .. }
            | Self::NoneAnswers(_)
            | Self::NoAddress { .. }
            | Self::Munge(_) => 69,
            Self::Protocol { .. } => 70,
            Self::Api(body) => body.kind.exit_code(),
        }
    }

    /// Sorts ureq's errors; `place` is where the daemon was looked for.
    pub(crate) fn from_ureq(place: &str, error: ureq::Error) -> Self {
        use ureq::Error as U;
        let place = place.to_owned();
        match error {
            U::Timeout(_) => Self::Timeout { place },
            U::Io(e) if e.kind() == io::ErrorKind::TimedOut => Self::Timeout { place },
            U::Io(e) => Self::Unreachable {
                place,
                why: plain(&e),
            },
            U::HostNotFound => Self::Unreachable {
                place,
                why: "no such host".into(),
            },
            U::ConnectionFailed => Self::Unreachable {
                place,
                why: "the connection failed".into(),
            },
            U::TlsRequired => Self::Unreachable {
                place,
                why: "this build speaks no TLS".into(),
            },
            other => Self::Protocol {
                place,
                why: other.to_string(),
            },
        }
    }
}

fn lines(each: &[ClientError]) -> String {
    let each: Vec<String> = each.iter().map(ToString::to_string).collect();
    each.join("; ")
}

/// An I/O error without std's ` (os error 2)`.
fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((words, _)) => words.to_lowercase(),
        None => text,
    }
}
