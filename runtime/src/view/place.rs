//! Where in the image a bind goes, decided on the image alone before anything is mounted.
//!
//! A target is walked by hand, name by name, inside the image: symbolic links are read, absolute ones start again at
//! the image's root, and `..` stops there. The outcome is a path without links, so that a mount point which the image
//! lacks can be made in the container's own layer at the right place.

use std::cell::RefCell;
use std::collections::{BTreeMap, VecDeque};
use std::ffi::{OsStr, OsString};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt;
use std::path::{Component, Path, PathBuf};

use rustix::fs::{AtFlags, FileType, OFlags, RawDir, readlinkat, statat};
use rustix::io::Errno;

use super::bind::{Kind, Link, NOT_IN_SYSTEM, OpenBind};
use super::error::at;
use super::{ViewError, inside};

/// As many links as the kernel follows.
const MOST_LINKS: usize = 40;
/// More names than any path has that the kernel accepts, links included.
const MOST_NAMES: usize = 4096;

/// Where a bind goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Spot {
    /// At this path without links, relative to the root.
    At(PathBuf),
    /// At or somewhere in what an earlier bind shows at `bound`; to be resolved when that is mounted.
    Below { bound: PathBuf },
}

/// What must be made because the image lacks it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Missing {
    Folder,
    File,
    Link(PathBuf),
}

/// The image and what is planned on it.
pub(super) struct Atlas<'a> {
    image: BorrowedFd<'a>,
    /// Paths without links, relative to the root, that are mount points of binds.
    planned: Vec<PathBuf>,
    missing: BTreeMap<PathBuf, Missing>,
    /// What lies at paths that were looked at: many binds share their first names.
    seen: RefCell<BTreeMap<PathBuf, Thing>>,
    /// The folder that was looked into last, and where it is: many names lie side by side.
    folder: RefCell<Option<(PathBuf, OwnedFd)>>,
}

/// What lies at a path of the image's.
#[derive(Debug, Clone)]
enum Thing {
    Nothing,
    Link(PathBuf),
    Other(FileType),
}

/// The end of a walk. Paths are without links, relative to the root.
pub(super) enum Walk {
    Found(PathBuf, FileType),
    Absent(PathBuf),
    /// The walk met the mount point of an earlier bind.
    Below(PathBuf),
}

impl<'a> Atlas<'a> {
    pub(super) fn new(image: BorrowedFd<'a>) -> Self {
        Atlas {
            image,
            planned: Vec::new(),
            missing: BTreeMap::new(),
            seen: RefCell::default(),
            folder: RefCell::default(),
        }
    }

    /// The mount points to make, parents first.
    pub(super) fn missing(&self) -> &BTreeMap<PathBuf, Missing> {
        &self.missing
    }

    /// Decides where a bind goes; `None` when it is not to be made.
    pub(super) fn place(&mut self, open: &OpenBind<'_>) -> Result<Option<Spot>, ViewError> {
        let bind = open.bind;
        let refuse = |why| ViewError::Target {
            what: bind.what,
            target: bind.target.clone(),
            why,
        };
        let strict = matches!(bind.kind, Kind::System | Kind::Devices);
        let path = match self.walk(&bind.target, !strict)? {
            Walk::Below(bound) => {
                let system = bound.starts_with("proc") || bound.starts_with("sys");
                return match bind.kind {
                    Kind::Fallback => Ok(None),
                    Kind::Users if system => Err(refuse(NOT_IN_SYSTEM)),
                    _ => Ok(Some(Spot::Below {
                        bound: Path::new("/").join(bound),
                    })),
                };
            }
            Walk::Found(path, kind) => {
                if bind.kind == Kind::Fallback && !self.is_empty_folder(&path, kind) {
                    return Ok(None);
                }
                if (kind == FileType::Directory) != open.is_dir {
                    return Err(ViewError::Unfit {
                        what: bind.what,
                        target: bind.target.clone(),
                        found: match kind {
                            FileType::Directory => "a folder",
                            FileType::Symlink => "a symbolic link",
                            _ => "a file",
                        },
                    });
                }
                path
            }
            Walk::Absent(path) => {
                let missing = match open.is_dir {
                    true => Missing::Folder,
                    false => Missing::File,
                };
                self.missing.insert(path.clone(), missing);
                path
            }
        };
        if path.as_os_str().is_empty() {
            return Err(refuse("that is the container's root"));
        }
        self.planned.push(path.clone());
        Ok(Some(Spot::At(path)))
    }

    /// Plans a link, unless it would lie at or below a bind, or the image has no folder for it, or has a thing of that
    /// name which is to stay.
    pub(super) fn link(&mut self, link: &Link) {
        let (Some(folder), Some(name)) = (link.path.parent(), link.path.file_name()) else {
            return;
        };
        let path = match self.walk(folder, true) {
            Ok(Walk::Found(path, FileType::Directory) | Walk::Absent(path)) => path.join(name),
            _ => return,
        };
        let stays = || !link.replace && !matches!(self.look(&path), Ok(Thing::Nothing));
        if !self.planned.contains(&path) && !stays() {
            self.missing.insert(path, Missing::Link(link.to.clone()));
        }
    }

    /// Follows `target` inside the image. With `follow` false a symbolic link anywhere is an end.
    pub(super) fn walk(&self, target: &Path, follow: bool) -> Result<Walk, ViewError> {
        let look = |errno| at("look in the image at", target)(errno);
        let mut todo = names(target);
        let mut path = PathBuf::new();
        let mut found = Some(FileType::Directory);
        let (mut links, mut steps) = (0, 0);
        while let Some(name) = todo.pop_front() {
            steps += 1;
            if steps > MOST_NAMES {
                return Err(look(Errno::NAMETOOLONG));
            }
            if name == ".." {
                path.pop();
                found = Some(FileType::Directory);
                continue;
            }
            path.push(&name);
            if self.planned.contains(&path) {
                return Ok(Walk::Below(path));
            }
            if found.is_none() {
                continue;
            }
            match self.look(&path).map_err(look)? {
                Thing::Nothing => found = None,
                Thing::Link(_) if !follow => return Ok(Walk::Found(path, FileType::Symlink)),
                Thing::Link(link) => {
                    links += 1;
                    if links > MOST_LINKS {
                        return Err(look(Errno::LOOP));
                    }
                    match link.is_absolute() {
                        true => path = PathBuf::new(),
                        false => drop(path.pop()),
                    }
                    found = Some(FileType::Directory);
                    for name in names(&link).into_iter().rev() {
                        todo.push_front(name);
                    }
                }
                Thing::Other(kind) if kind == FileType::Directory || todo.is_empty() => {
                    found = Some(kind);
                }
                Thing::Other(_) => return Err(look(Errno::NOTDIR)),
            }
        }
        Ok(match found {
            Some(kind) => Walk::Found(path, kind),
            None => Walk::Absent(path),
        })
    }

    /// What lies at `path`, of which every name but the last is known to be a folder.
    ///
    /// It may not be one any more: a served image may answer otherwise each time. So the kernel keeps within the image on
    /// the way to the folder, and below it is given one name, which it does not follow.
    fn look(&self, path: &Path) -> Result<Thing, Errno> {
        if let Some(thing) = self.seen.borrow().get(path) {
            return Ok(thing.clone());
        }
        let thing = match (path.parent(), path.file_name()) {
            (Some(folder), Some(name)) if !folder.as_os_str().is_empty() => {
                self.look_in(folder, name)?
            }
            _ => look_at(self.image, path.as_os_str())?,
        };
        let mut seen = self.seen.borrow_mut();
        seen.insert(path.to_owned(), thing.clone());
        Ok(thing)
    }

    fn look_in(&self, folder: &Path, name: &OsStr) -> Result<Thing, Errno> {
        let mut last = self.folder.borrow_mut();
        let known = last.take().filter(|(path, _)| path == folder);
        let (_, opened) = match known {
            Some(known) => last.insert(known),
            None => match inside(self.image, folder, OFlags::PATH | OFlags::DIRECTORY) {
                // Where `..` led out of what is not there.
                Err(Errno::NOENT) => return Ok(Thing::Nothing),
                opened => last.insert((folder.to_owned(), opened?)),
            },
        };
        look_at(opened.as_fd(), name)
    }

    fn is_empty_folder(&self, path: &Path, kind: FileType) -> bool {
        if kind != FileType::Directory || path.as_os_str().is_empty() {
            return false;
        }
        let Ok(folder) = inside(self.image, path, OFlags::RDONLY | OFlags::DIRECTORY) else {
            return false;
        };
        let mut space = [MaybeUninit::uninit(); 1024];
        let mut entries = RawDir::new(&folder, &mut space);
        while let Some(entry) = entries.next() {
            match entry {
                Ok(entry) if entry.file_name() == c"." || entry.file_name() == c".." => {}
                _ => return false,
            }
        }
        true
    }
}

/// What has this one name in a folder.
fn look_at(folder: BorrowedFd<'_>, name: &OsStr) -> Result<Thing, Errno> {
    let flags = AtFlags::SYMLINK_NOFOLLOW | AtFlags::NO_AUTOMOUNT;
    let kind = match statat(folder, name, flags) {
        Err(Errno::NOENT) => return Ok(Thing::Nothing),
        facts => FileType::from_raw_mode(facts?.st_mode),
    };
    if kind != FileType::Symlink {
        return Ok(Thing::Other(kind));
    }
    let link = readlinkat(folder, name, Vec::new())?;
    Ok(Thing::Link(OsString::from_vec(link.into_bytes()).into()))
}

/// The names of a path in order, `..` among them.
fn names(path: &Path) -> VecDeque<OsString> {
    path.components()
        .filter(|c| matches!(c, Component::Normal(_) | Component::ParentDir))
        .map(|c| c.as_os_str().to_owned())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// As a server that was taken over may answer.
    #[test]
    fn a_folder_that_turns_into_a_link_leads_nowhere_out_of_the_image() {
        let dir = tempfile::tempdir().unwrap();
        let (image, outside) = (dir.path().join("image"), dir.path().join("outside"));
        fs::create_dir_all(image.join("a/b")).unwrap();
        fs::create_dir_all(outside.join("b")).unwrap();
        fs::write(outside.join("secret"), "").unwrap();
        symlink("told", outside.join("link")).unwrap();
        symlink("told", outside.join("b/link")).unwrap();
        let root = fs::File::open(&image).unwrap();
        for to in [outside.clone(), "../outside".into()] {
            let atlas = Atlas::new(root.as_fd());
            let walked = atlas.walk(Path::new("/a/b"), true).unwrap();
            assert!(matches!(walked, Walk::Found(_, FileType::Directory)));
            *atlas.folder.borrow_mut() = None;
            fs::rename(image.join("a"), image.join("was")).unwrap();
            symlink(&to, image.join("a")).unwrap();
            for target in ["/a/secret", "/a/link", "/a/b/link"] {
                match atlas.walk(Path::new(target), true) {
                    Ok(Walk::Absent(path)) => {
                        assert_eq!(Path::new("/").join(path), Path::new(target))
                    }
                    Ok(_) => panic!("{target} was found"),
                    Err(_) => {}
                }
            }
            fs::remove_file(image.join("a")).unwrap();
            fs::rename(image.join("was"), image.join("a")).unwrap();
        }
    }

    #[test]
    fn names_side_by_side_and_elsewhere_are_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        for path in ["usr/bin", "etc"] {
            fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        fs::write(dir.path().join("usr/bin/tool"), "").unwrap();
        symlink("/usr/bin", dir.path().join("bin")).unwrap();
        symlink("../../etc", dir.path().join("usr/bin/out")).unwrap();
        let root = fs::File::open(dir.path()).unwrap();
        let atlas = Atlas::new(root.as_fd());
        let found = |target: &str| match atlas.walk(Path::new(target), true).unwrap() {
            Walk::Found(path, kind) => (path.to_str().unwrap().to_owned(), Some(kind)),
            Walk::Absent(path) => (path.to_str().unwrap().to_owned(), None),
            Walk::Below(_) => panic!("nothing is planned"),
        };
        assert_eq!(
            found("/bin/tool"),
            ("usr/bin/tool".into(), Some(FileType::RegularFile))
        );
        assert_eq!(found("/etc/tool"), ("etc/tool".into(), None));
        assert_eq!(found("/usr/bin/none"), ("usr/bin/none".into(), None));
        assert_eq!(found("/bin/out"), ("etc".into(), Some(FileType::Directory)));
        assert_eq!(found("/bin/out/tool/x"), ("etc/tool/x".into(), None));
        assert_eq!(found("/none/x/../tool"), ("none/tool".into(), None));
        assert_eq!(found("/../usr"), ("usr".into(), Some(FileType::Directory)));
    }
}
