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

/// The site's configuration.
pub(crate) fn load_config(path: &Path) -> Result<Config, TrustError> {
    let text = read(path)?;
    let wrong = |why| TrustError::Config {
        path: path.to_owned(),
        why,
    };
    let config = Config::parse(&text).map_err(wrong)?;
    match config.problems().first() {
        Some(problem) => Err(wrong(problem.to_string())),
        None => Ok(config),
    }
}

/// The keys whose records are believed.
pub(crate) fn load_keys(config: &Config) -> Result<Vec<PublicKey>, TrustError> {
    let mut keys = Vec::with_capacity(config.node.keys.len());
    for path in &config.node.keys {
        let key = PublicKey::from_pem(&read(path)?).map_err(|source| TrustError::Key {
            path: path.clone(),
            source,
        })?;
        keys.push(key);
    }
    Ok(keys)
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
fn read(path: &Path) -> Result<String, TrustError> {
    let fail = |source: io::Error| TrustError::Read {
        path: path.to_owned(),
        source,
    };
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = open(path, flags, Mode::empty()).map_err(|e| fail(e.into()))?;
    check(path, &fstat(&file).map_err(|e| fail(e.into()))?, false)?;
    check_above(path)?;
    let mut text = String::new();
    let mut file = File::from(file).take(LARGEST);
    file.read_to_string(&mut text).map_err(fail)?;
    Ok(text)
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
