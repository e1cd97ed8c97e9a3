//! Files that decide what root believes: the configuration and the keys.

use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use berth_config::Config;
use berth_image::PublicKey;
use berth_image::key::KeyError;
use rustix::fs::{Mode, OFlags, Stat, fstat, open, stat};
use thiserror::Error;

use crate::text::plain;

/// Largest file of this kind, in bytes.
const LARGEST: u64 = 1 << 20;

/// Why such a file is not believed.
#[derive(Debug, Error)]
pub(crate) enum TrustError {
    #[error("cannot read `{}`: {}", path.display(), plain(source))]
    Read {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    #[error("`{}` can be changed by others than root: its owner must be root, and nobody else may write", .0.display())]
    Writable(PathBuf),
    #[error("`{}`: {why}", path.display())]
    Config { path: PathBuf, why: String },
    #[error("`{}`: {source}", path.display())]
    Key {
        path: PathBuf,
        #[source]
        source: KeyError,
    },
}

/// What root believes.
#[derive(Debug)]
pub(crate) struct Site {
    pub(crate) config: Config,
    /// Whose records are believed.
    pub(crate) keys: Vec<PublicKey>,
    pub(crate) files: Files,
}

/// The files that a site was read from, the configuration first.
#[derive(Debug)]
pub(crate) struct Files(Vec<Known>);

/// A file as it was when it was read.
#[derive(Debug, PartialEq, Eq)]
struct Known {
    path: PathBuf,
    place: (u64, u64),
    size: i64,
    /// Seconds and nanoseconds of the last change of content, and of owner, mode or content.
    times: [(i64, i64); 2],
}

impl Site {
    /// Reads the configuration at `path`, and the keys it names.
    pub(crate) fn load(path: &Path) -> Result<Site, TrustError> {
        let (text, file) = read(path)?;
        let wrong = |why| TrustError::Config {
            path: path.to_owned(),
            why,
        };
        let config = Config::parse(&text).map_err(wrong)?;
        if let Some(problem) = config.problems().first() {
            return Err(wrong(problem.to_string()));
        }
        let mut files = vec![file];
        let mut keys = Vec::with_capacity(config.node.keys.len());
        for path in &config.node.keys {
            let (text, file) = read(path)?;
            let key = PublicKey::from_pem(&text).map_err(|source| TrustError::Key {
                path: path.clone(),
                source,
            })?;
            keys.push(key);
            files.push(file);
        }
        Ok(Site {
            config,
            keys,
            files: Files(files),
        })
    }
}

impl Files {
    /// Whether they are what [`Site::load`] would read at `path` now, as far as files' facts tell.
    pub(crate) fn are_of(&self, path: &Path) -> bool {
        let same = |file: &Known| {
            stat(&file.path).is_ok_and(|facts| *file == Known::new(&file.path, &facts))
        };
        self.0.first().is_some_and(|file| file.path == path) && self.0.iter().all(same)
    }
}

impl Known {
    fn new(path: &Path, facts: &Stat) -> Known {
        let nanoseconds = |n| i64::try_from(n).unwrap_or_default();
        Known {
            path: path.to_owned(),
            place: (facts.st_dev, facts.st_ino),
            size: facts.st_size,
            times: [
                (facts.st_mtime, nanoseconds(facts.st_mtime_nsec)),
                (facts.st_ctime, nanoseconds(facts.st_ctime_nsec)),
            ],
        }
    }
}

/// A folder that only root can change, made if it is not there; nor may others be able to put another in its place.
pub(crate) fn own_folder(path: &Path) -> Result<(), TrustError> {
    let fail = |source: io::Error| TrustError::Read {
        path: path.to_owned(),
        source,
    };
    match rustix::fs::mkdir(path, Mode::from(0o755)) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(errno) => return Err(fail(errno.into())),
    }
    let facts = stat(path).map_err(|e| fail(e.into()))?;
    check(path, &facts, false)?;
    check_above(path)
}

/// Reads a file that nobody but root can change: it and every folder above it are root's, and not writable by others
/// (above it, a sticky folder like `/tmp` may be).
fn read(path: &Path) -> Result<(String, Known), TrustError> {
    let fail = |source: io::Error| TrustError::Read {
        path: path.to_owned(),
        source,
    };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = open(path, flags, Mode::empty()).map_err(|e| fail(e.into()))?;
    let facts = fstat(&file).map_err(|e| fail(e.into()))?;
    check(path, &facts, false)?;
    check_above(path)?;
    let mut text = String::new();
    let mut file = File::from(file).take(LARGEST);
    file.read_to_string(&mut text).map_err(fail)?;
    Ok((text, Known::new(path, &facts)))
}

/// Every folder above `path` is root's, and not writable by others but where the sticky bit keeps names.
fn check_above(path: &Path) -> Result<(), TrustError> {
    let fail = |path: &Path, source: io::Error| TrustError::Read {
        path: path.to_owned(),
        source,
    };
    let real = path.canonicalize().map_err(|e| fail(path, e))?;
    for folder in real.ancestors().skip(1) {
        let stat = stat(folder).map_err(|e| fail(folder, e.into()))?;
        check(folder, &stat, true)?;
    }
    Ok(())
}

fn check(path: &Path, stat: &Stat, sticky_is_fine: bool) -> Result<(), TrustError> {
    let open_to_others = stat.st_mode & 0o022 != 0;
    let sticky = sticky_is_fine && stat.st_mode & 0o1000 != 0;
    if stat.st_uid != 0 || (open_to_others && !sticky) {
        return Err(TrustError::Writable(path.to_owned()));
    }
    Ok(())
}
