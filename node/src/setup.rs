//! Start: who runs this, what the site's file says, and whether another keeper has the folder.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use berth_config::{Config, NodeService};
use rustix::fs::{FlockOperation, Mode, OFlags, Stat, flock, fstat, open, stat};

/// Why the service, or a request, comes to nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    /// Exit code (docs: USER.md, "Exit codes").
    pub(crate) code: u8,
    /// One line.
    pub(crate) why: String,
    /// One line.
    pub(crate) hint: Option<String>,
}

impl Failure {
    pub(crate) const UNAVAILABLE: u8 = 69;
    pub(crate) const INTERNAL: u8 = 70;
    pub(crate) const PERMISSION: u8 = 77;
    pub(crate) const CONFIG: u8 = 78;

    pub(crate) fn new(code: u8, why: impl Into<String>) -> Self {
        Self {
            code,
            why: why.into(),
            hint: None,
        }
    }

    #[must_use]
    pub(crate) fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// A system call that should not fail.
    pub(crate) fn system(what: &str, error: impl Into<io::Error>) -> Self {
        Self::new(Self::INTERNAL, format!("{what}: {}", error.into()))
    }
}

/// A node's service, about to start.
#[derive(Debug)]
pub(crate) struct Prepared {
    pub(crate) config: Config,
    /// Where it was read.
    pub(crate) path: PathBuf,
    /// Held as long as the process lives: one keeper a folder.
    _lock: OwnedFd,
}

impl Prepared {
    pub(crate) fn service(&self) -> &NodeService {
        &self.config.node.service
    }
}

/// Reads the configuration and takes the node's folder.
pub(crate) fn prepare(path: &Path) -> Result<Prepared, Failure> {
    if !rustix::process::geteuid().is_root() {
        return Err(Failure::new(
            Failure::PERMISSION,
            "the node service mounts images: it needs root",
        ));
    }
    // Nobody traces it, and no user of a group of its starter's is let in.
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable)
        .map_err(|e| Failure::system("prctl", e))?;
    let config = load(path)?;
    let folder = &config.node.run_dir;
    match rustix::fs::mkdir(folder, Mode::from(0o755)) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => {}
        Err(errno) => return Err(cannot("make", folder, errno.into())),
    }
    let facts = stat(folder).map_err(|e| cannot("look at", folder, e.into()))?;
    roots_alone(folder, &facts)?;
    roots_above(folder)?;
    let lock = folder.join("node.lock");
    let flags = OFlags::RDWR | OFlags::CREATE | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    let file =
        open(&lock, flags, Mode::from(0o600)).map_err(|e| cannot("open", &lock, e.into()))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        let line = format!("another node service runs in {}", folder.display());
        Failure::new(Failure::UNAVAILABLE, line)
    })?;
    Ok(Prepared {
        config,
        path: path.to_owned(),
        _lock: file,
    })
}

fn load(path: &Path) -> Result<Config, Failure> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let file = open(path, flags, Mode::empty()).map_err(|e| cannot("open", path, e.into()))?;
    let facts = fstat(&file).map_err(|e| cannot("look at", path, e.into()))?;
    roots_alone(path, &facts)?;
    roots_above(path)?;
    let mut text = String::new();
    let read = File::from(file).take(1 << 20).read_to_string(&mut text);
    read.map_err(|e| cannot("read", path, e))?;
    let wrong = |why: String| {
        Failure::new(Failure::CONFIG, format!("`{}`: {why}", path.display()))
            .hint("`berth config check` says everything that is wrong with it")
    };
    let config = Config::parse(&text).map_err(wrong)?;
    match config.problems().first() {
        Some(problem) => Err(wrong(problem.to_string())),
        None => Ok(config),
    }
}

/// Another program of the same installation: beside us, or with those that nobody types.
pub(crate) fn program(own: &Path, name: &str) -> PathBuf {
    let beside = own.with_file_name(name);
    match beside.exists() {
        true => beside,
        false => Path::new("/usr/libexec/berth").join(name),
    }
}

/// What decides what root does, only root may change.
pub(crate) fn roots_alone(path: &Path, facts: &Stat) -> Result<(), Failure> {
    match facts.st_uid == 0 && facts.st_mode & 0o022 == 0 {
        true => Ok(()),
        false => Err(open_to_others(path)),
    }
}

/// Nor may others put something else in its place: every folder above is root's, and not writable by others but where
/// the sticky bit keeps names. As `runtime/src/trusted.rs` has it.
pub(crate) fn roots_above(path: &Path) -> Result<(), Failure> {
    let real = (path.canonicalize()).map_err(|e| cannot("look at", path, e))?;
    for folder in real.ancestors().skip(1) {
        let facts = stat(folder).map_err(|e| cannot("look at", folder, e.into()))?;
        let kept = facts.st_mode & 0o022 == 0 || facts.st_mode & 0o1000 != 0;
        if facts.st_uid != 0 || !kept {
            return Err(open_to_others(folder));
        }
    }
    Ok(())
}

fn open_to_others(path: &Path) -> Failure {
    let line = format!(
        "`{}` can be changed by others than root: its owner must be root, and nobody else may write",
        path.display()
    );
    Failure::new(Failure::CONFIG, line)
}

fn cannot(what: &str, path: &Path, error: io::Error) -> Failure {
    let line = format!("cannot {what} `{}`: {error}", path.display());
    Failure::new(Failure::CONFIG, line)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn a_folder_above_that_others_can_write_is_refused() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("berth.toml");
        std::fs::write(&file, "").unwrap();
        let with = |mode| {
            let mode = std::fs::Permissions::from_mode(mode);
            std::fs::set_permissions(dir.path(), mode).unwrap();
            roots_above(&file)
        };
        assert_eq!(with(0o755), Ok(()));
        assert_eq!(with(0o1777), Ok(()));
        assert_eq!(with(0o777), Err(open_to_others(dir.path())));
    }
}
