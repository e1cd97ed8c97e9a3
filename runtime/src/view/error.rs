//! Why a view could not be built.

use std::io;
use std::path::PathBuf;

use rustix::io::Errno;
use thiserror::Error;

use crate::opener::OpenError;
use crate::text::{plain, shown};

/// Why there is no view. The text is one line for the user.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ViewError {
    /// The child that opens users' paths could not be started.
    #[error("cannot start the process that opens files as the user: {}", plain(.0))]
    Opener(#[source] io::Error),
    /// What was to be bound could not be opened.
    #[error("cannot bind {what} `{}`: {source}", shown(path))]
    Source {
        what: &'static str,
        path: PathBuf,
        #[source]
        source: OpenError,
    },
    /// A mount point that must not be one.
    #[error("cannot bind {what} at `{}`: {why}", shown(target))]
    Target {
        what: &'static str,
        target: PathBuf,
        why: &'static str,
    },
    /// The mount point would have to be made in a folder that is not the container's.
    #[error(
        "cannot bind {what} at `{}`: it does not exist in the folder bound at `{}`, and nothing is made in there",
        shown(target),
        shown(bound)
    )]
    Foreign {
        what: &'static str,
        target: PathBuf,
        bound: PathBuf,
    },
    /// The image has something of another kind there.
    #[error("the image has {found} at `{}`, where {what} belongs", shown(target))]
    Unfit {
        what: &'static str,
        target: PathBuf,
        found: &'static str,
    },
    /// `--container-workdir` leads nowhere.
    #[error(
        "cannot use `{}` as the working directory in the container: {source}",
        shown(path)
    )]
    Workdir {
        path: PathBuf,
        #[source]
        source: OpenError,
    },
    /// The kernel refused one step for one bind.
    #[error("cannot {step} `{}`: {}", shown(target), plain(source))]
    At {
        step: &'static str,
        target: PathBuf,
        #[source]
        source: io::Error,
    },
    /// The kernel refused a step.
    #[error("cannot {step}: {}", plain(source))]
    Step {
        step: &'static str,
        #[source]
        source: io::Error,
    },
}

impl ViewError {
    pub(super) fn step(step: &'static str, source: io::Error) -> ViewError {
        ViewError::Step { step, source }
    }
}

/// For `map_err`: names the step that failed.
pub(super) fn step(step: &'static str) -> impl FnOnce(Errno) -> ViewError {
    move |errno| ViewError::step(step, errno.into())
}

/// For `map_err`: names the step that failed, and where.
pub(super) fn at(
    step: &'static str,
    target: impl Into<PathBuf>,
) -> impl FnOnce(Errno) -> ViewError {
    move |errno| ViewError::At {
        step,
        target: target.into(),
        source: errno.into(),
    }
}
