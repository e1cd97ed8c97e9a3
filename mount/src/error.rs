//! What can go wrong between a descriptor and a mount.

use std::io;
use std::path::PathBuf;

use thiserror::Error;

/// Why an image file could not be mounted.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum MountError {
    /// The descriptor is not a regular file.
    #[error("the image is not a regular file")]
    NotAFile,
    /// The file ends before the SquashFS part does.
    #[error("the image file is truncated: {found} bytes where at least {expected} belong")]
    Truncated {
        /// Bytes the SquashFS part needs.
        expected: u64,
        /// Bytes the file has.
        found: u64,
    },
    /// The SquashFS part is not a whole number of 512-byte sectors, or empty.
    #[error("the size of the image's data, {size} bytes, is not a whole number of sectors")]
    BadSize {
        /// The size that was asked for.
        size: u64,
    },
    /// A name for the loop device that the kernel cannot keep.
    #[error("the label {0:?} does not fit a loop device (1 to 63 bytes, no NUL)")]
    BadLabel(String),
    /// The image file could not be looked at.
    #[error("cannot stat the image: {}", plain(.0))]
    Stat(#[source] io::Error),
    /// The lock that serialises the making of loop devices could not be had.
    #[error("cannot lock {}: {}", path.display(), plain(source))]
    Lock {
        /// The lock file.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// A step with a loop device failed.
    #[error("cannot {step} {}: {}", device.display(), plain(source))]
    Loop {
        /// What was tried ("open", "configure").
        step: &'static str,
        /// The device.
        device: PathBuf,
        /// What the system said.
        #[source]
        source: io::Error,
    },
    /// Others took every free loop device before it could be used.
    #[error("no free loop device after {tries} tries")]
    NoFreeLoop {
        /// How many were tried.
        tries: u32,
    },
    /// The kernel refused to mount.
    #[error("the kernel refused the image at {step}: {}{log}", plain(source))]
    Kernel {
        /// The step of the mount call that failed.
        step: &'static str,
        /// What the system said.
        #[source]
        source: io::Error,
        /// The kernel's own words, with a leading ": ", or nothing.
        log: String,
    },
}

/// A system error in the system's words, without its number.
pub(crate) fn plain(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error") {
        Some((words, _)) => words.to_lowercase(),
        None => text,
    }
}
