//! `--container-mounts=SRC[:DST[:FLAGS]]`, and the other binds a job gets.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use berth_config::{Node, SiteBind};
use thiserror::Error;

use crate::text::one_line;
use crate::view::{Bind, IfAbsent, Kind};

/// Most entries of `--container-mounts`.
const MOST: usize = 64;

/// Most names in a path: each one that the image lacks is a folder that root makes.
const DEEPEST: usize = 64;

/// Why `--container-mounts` is refused.
#[derive(Debug, Error, PartialEq, Eq)]
pub(crate) enum MountsError {
    #[error("--container-mounts: `{}` is not SRC[:DST[:ro|rw]] with absolute paths", one_line(.0))]
    Form(String),
    #[error("--container-mounts: more than {MOST} entries")]
    Many,
    #[error("--container-mounts: `{}` is deeper than {DEEPEST} folders", one_line(.0))]
    Deep(String),
    #[error("--container-mounts is not allowed on this site")]
    Forbidden,
}

/// The user's binds, in the order given.
pub(crate) fn of_user(entries: &[OsString], allowed: bool) -> Result<Vec<Bind>, MountsError> {
    if !allowed && !entries.is_empty() {
        return Err(MountsError::Forbidden);
    }
    if entries.len() > MOST {
        return Err(MountsError::Many);
    }
    entries.iter().map(|entry| of_entry(entry)).collect()
}

fn of_entry(entry: &OsStr) -> Result<Bind, MountsError> {
    let wrong = || MountsError::Form(entry.to_string_lossy().into_owned());
    let parts: Vec<&[u8]> = entry.as_bytes().split(|b| *b == b':').collect();
    let (source, target, flags) = match parts.as_slice() {
        [source] => (*source, *source, &b""[..]),
        [source, target] => (*source, *target, &b""[..]),
        [source, target, flags] => (*source, *target, *flags),
        _ => return Err(wrong()),
    };
    let read_only = match flags {
        b"" | b"rw" => false,
        b"ro" => true,
        _ => return Err(wrong()),
    };
    // `SRC::ro` binds at the same path.
    let target = if target.is_empty() { source } else { target };
    let (source, target) = (path(source), path(target));
    if !source.is_absolute() || !target.is_absolute() {
        return Err(wrong());
    }
    if target.components().count() > DEEPEST {
        return Err(MountsError::Deep(entry.to_string_lossy().into_owned()));
    }
    Ok(Bind {
        what: "--container-mounts",
        source,
        target,
        read_only,
        kind: Kind::Users,
        if_absent: IfAbsent::Fail,
    })
}

fn path(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(bytes))
}

/// A bind of the site's.
fn of_site(bind: &SiteBind) -> Bind {
    let target = bind.target.clone().unwrap_or_else(|| bind.source.clone());
    Bind {
        what: "the site's bind",
        source: bind.source.clone(),
        target,
        read_only: bind.read_only,
        kind: Kind::Ordinary,
        if_absent: match bind.optional {
            true => IfAbsent::SkipAny,
            false => IfAbsent::Fail,
        },
    }
}

/// All binds of a view, in order: the node's own folders, Slurm's client, the home folder, the site's, the folder `cwd`
/// where the image has none, the user's.
pub(crate) fn of_view(
    node: &Node,
    slurm: &[Bind],
    home: &Path,
    cwd: &Path,
    users: &[Bind],
) -> Vec<Bind> {
    let names_one = |path: &Path| path.is_absolute() && path != Path::new("/");
    let mut binds: Vec<Bind> = of_system().into();
    binds.extend(slurm.iter().cloned());
    if node.home && names_one(home) {
        let what = "the home folder";
        binds.push(own_path(what, home, Kind::Ordinary, IfAbsent::SkipAny));
    }
    binds.extend(node.binds.iter().map(of_site));
    if names_one(cwd) {
        let what = "the job's folder";
        binds.push(own_path(what, cwd, Kind::Fallback, IfAbsent::SkipAny));
    }
    binds.extend(users.iter().cloned());
    binds
}

/// The node's own folders that every container gets.
fn of_system() -> [Bind; 4] {
    let bind = |path: &'static str, kind| Bind {
        what: path,
        ..own_path(path, Path::new(path), kind, IfAbsent::Fail)
    };
    [
        bind("/proc", Kind::System),
        bind("/sys", Kind::System),
        bind("/dev", Kind::Devices),
        bind("/tmp", Kind::Ordinary),
    ]
}

/// A bind of `path` at `path`.
pub(crate) fn own_path(what: &'static str, path: &Path, kind: Kind, if_absent: IfAbsent) -> Bind {
    Bind {
        what,
        source: path.to_owned(),
        target: path.to_owned(),
        read_only: false,
        kind,
        if_absent,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(entry: &str) -> Result<(String, String, bool), MountsError> {
        let bind = of_user(&[entry.into()], true)?.remove(0);
        let text = |p: PathBuf| p.to_str().unwrap().to_owned();
        Ok((text(bind.source), text(bind.target), bind.read_only))
    }

    #[test]
    fn entries_read_as_documented() {
        let expect = |s: &str, t: &str, ro| Ok((s.to_owned(), t.to_owned(), ro));
        assert_eq!(one("/a"), expect("/a", "/a", false));
        assert_eq!(one("/a:/b"), expect("/a", "/b", false));
        assert_eq!(one("/a:/b:ro"), expect("/a", "/b", true));
        assert_eq!(one("/a:/b:rw"), expect("/a", "/b", false));
        assert_eq!(one("/a::ro"), expect("/a", "/a", true));
        let deep = format!("/a:{}", "/x".repeat(65));
        assert!(matches!(one(&deep), Err(MountsError::Deep(_))));
        for wrong in ["", "a", "/a:b", "/a:/b:rx", "/a:/b:ro:", ":/b"] {
            assert!(one(wrong).is_err(), "{wrong}");
        }
        assert_eq!(of_user(&["/a".into()], false), Err(MountsError::Forbidden));
        assert_eq!(
            of_user(&vec!["/a".into(); 65], true),
            Err(MountsError::Many)
        );
    }
}
