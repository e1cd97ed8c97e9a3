//! Bytes as a script of layers over few names, so that they meet: the image holds what a naive unpacker in memory
//! would have made of them. The model knows nothing of interning, of reading from the top or of spilled contents.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use berth_convert::job::FailureKind;
use berth_image::Digest;

use super::Target;
use super::build::{Tar, head};
use crate::image::{Names, assert_sound, convert_blobs, names, options};

pub const TARGET: Target = Target {
    name: "merge",
    run,
    seeds,
};

const MOST_ENTRIES: usize = 48;
const NAMES: [&str; 4] = ["a", "b", "c", "dd"];
const TARGETS: [&str; 8] = ["a", "b/c", "../a", "/c", "/b/dd", "..", "../../b", "."];

type Path = Vec<&'static str>;

/// What an entry does at its path.
#[derive(Debug, Clone)]
enum Does {
    Dir,
    File,
    Symlink(&'static str),
    Link(Path),
    Whiteout,
    Opaque,
}

#[derive(Debug, Clone)]
struct Entry {
    path: Path,
    does: Does,
}

/// Two bytes a path: its depth and three names.
fn path(bytes: [u8; 2]) -> Path {
    let bits = u16::from_le_bytes(bytes);
    let depth = 1 + usize::from(bits & 3).min(2);
    (0..depth)
        .map(|i| NAMES[usize::from(bits >> (2 + 2 * i)) & 3])
        .collect()
}

/// Five bytes an entry; the first ends the layer or says what it does.
fn script(data: &[u8]) -> Vec<Vec<Entry>> {
    let mut layers = vec![Vec::new()];
    for chunk in data.chunks_exact(5).take(MOST_ENTRIES) {
        let at = path([chunk[1], chunk[2]]);
        let does = match chunk[0] % 16 {
            0 if layers.len() < 4 => {
                layers.push(Vec::new());
                continue;
            }
            0..=3 => Does::Dir,
            4..=7 => Does::File,
            8 | 9 => Does::Symlink(TARGETS[usize::from(chunk[3]) % TARGETS.len()]),
            10..=12 => Does::Link(path([chunk[3], chunk[4]])),
            13 | 14 => Does::Whiteout,
            _ => Does::Opaque,
        };
        layers
            .last_mut()
            .expect("one at least")
            .push(Entry { path: at, does });
    }
    layers
}

/// The layers as tar streams. An entry's time is its number, its contents too.
fn streams(layers: &[Vec<Entry>]) -> Vec<Vec<u8>> {
    let mut number = 0;
    let mut out = Vec::new();
    for layer in layers {
        let mut tar = Tar::new();
        for entry in layer {
            number += 1;
            let name = entry.path.join("/");
            let (above, last) = name
                .rsplit_once('/')
                .map_or(("", &name[..]), |(a, l)| (a, l));
            let slash = if above.is_empty() { "" } else { "/" };
            let at = |name: &str| format!("{above}{slash}{name}");
            let (head, contents) = match &entry.does {
                Does::Dir => (head(b'5', &name), String::new()),
                Does::File => (head(b'0', &name), contents(number)),
                Does::Symlink(target) => (head(b'2', &name).link(target), String::new()),
                Does::Link(target) => (head(b'1', &name).link(target.join("/")), String::new()),
                Does::Whiteout => (head(b'0', at(&format!(".wh.{last}"))), String::new()),
                Does::Opaque => (head(b'0', format!("{name}/.wh..wh..opq")), String::new()),
            };
            tar.push(head.mtime(&number.to_string()), contents.as_bytes());
        }
        out.push(tar.end());
    }
    out
}

/// Every third file is empty, every fourth longer than a block.
fn contents(number: u32) -> String {
    match number {
        n if n % 3 == 0 => String::new(),
        n if n % 4 == 0 => format!("{n} ").repeat(3000),
        n => format!("file {n}"),
    }
}

/// What lies at a path: a folder that no entry made, or the entry of that number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Made {
    Implied,
    Entry(u32),
}

/// The entry's own error; the conversion then has one too.
#[derive(Debug)]
struct Refused;

/// The tree as an unpacker would see it, path by path.
#[derive(Default)]
struct Model {
    tree: BTreeMap<Path, Made>,
    entries: HashMap<u32, Does>,
    /// What this layer has removed so far, for its hard links.
    removed: BTreeMap<Path, u32>,
    /// Folders of this layer.
    folders: BTreeSet<Path>,
    /// Paths that any layer names: a hard link may join a removed file only by such a one.
    named: BTreeSet<Path>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Missing {
    Make,
    Stop,
    /// As `Stop`, and no symlink is followed that this layer replaces by a folder.
    StopAtNew,
}

impl Model {
    fn is_dir(&self, path: &Path) -> bool {
        path.is_empty()
            || match self.tree.get(path) {
                Some(Made::Implied) => true,
                Some(Made::Entry(n)) => matches!(self.entries[n], Does::Dir),
                None => false,
            }
    }

    fn remove(&mut self, path: &Path) {
        let below: Vec<Path> = (self.tree.keys())
            .filter(|p| p.starts_with(path))
            .cloned()
            .collect();
        for gone in below {
            if let Some(Made::Entry(n)) = self.tree.remove(&gone) {
                self.removed.insert(gone, n);
            }
        }
    }

    fn resolve(
        &mut self,
        path: &[&'static str],
        missing: Missing,
    ) -> Result<Option<Path>, Refused> {
        let mut ahead: Vec<&'static str> = path.iter().rev().copied().collect();
        let (mut at, mut links) = (Path::new(), 0);
        while let Some(name) = ahead.pop() {
            match name {
                "" | "." => continue,
                ".." => {
                    at.pop();
                    continue;
                }
                _ => at.push(name),
            }
            self.named
                .extend((missing == Missing::Make).then(|| at.clone()));
            let symlink = match self.tree.get(&at) {
                Some(Made::Entry(n)) => match self.entries[n] {
                    Does::Symlink(target) => Some(target),
                    _ => None,
                },
                _ => None,
            };
            if let Some(target) = symlink {
                if missing == Missing::StopAtNew && self.folders.contains(&at) {
                    return Ok(None);
                }
                links += 1;
                if links > 40 {
                    return Err(Refused);
                }
                at.pop();
                if target.starts_with('/') {
                    at.clear();
                }
                ahead.extend(target.rsplit('/'));
            } else if !self.is_dir(&at) {
                if missing != Missing::Make {
                    return Ok(None);
                }
                self.remove(&at);
                self.tree.insert(at.clone(), Made::Implied);
            }
        }
        Ok(Some(at))
    }

    fn split(path: &Path) -> (Path, &'static str) {
        let (last, above) = path.split_last().expect("paths have a name");
        (above.to_vec(), last)
    }

    fn hide(&mut self, entry: &Entry) -> Result<(), Refused> {
        match entry.does {
            Does::Whiteout => {
                let (above, name) = Self::split(&entry.path);
                let above = match self.is_dir(&above) {
                    true => Some(above),
                    false => self.resolve(&above, Missing::StopAtNew)?,
                };
                if let Some(mut path) = above {
                    path.push(name);
                    self.remove(&path);
                }
            }
            Does::Opaque => {
                let dir = match self.is_dir(&entry.path) {
                    true => Some(entry.path.clone()),
                    false => self.resolve(&entry.path, Missing::StopAtNew)?,
                };
                if let Some(dir) = dir {
                    let children: Vec<Path> = (self.tree.keys())
                        .filter(|p| p.len() == dir.len() + 1 && p.starts_with(&dir))
                        .cloned()
                        .collect();
                    children.iter().for_each(|child| self.remove(child));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn link_target(&mut self, target: &Path) -> Result<u32, Refused> {
        let mut place = target.clone();
        if !self.tree.contains_key(target) {
            let (above, name) = Self::split(target);
            if let Some(mut path) = self.resolve(&above, Missing::Stop)? {
                path.push(name);
                if self.named.contains(&path) {
                    place = path;
                }
            }
        }
        let number = match self.tree.get(&place) {
            Some(Made::Entry(n)) => *n,
            Some(Made::Implied) => return Err(Refused),
            None => *self.removed.get(&place).ok_or(Refused)?,
        };
        match self.entries[&number] {
            Does::Dir => Err(Refused),
            _ => Ok(number),
        }
    }

    fn apply(&mut self, number: u32, entry: &Entry) -> Result<(), Refused> {
        let made = match &entry.does {
            Does::Whiteout | Does::Opaque => return Ok(()),
            Does::Link(target) => Made::Entry(self.link_target(target)?),
            _ => Made::Entry(number),
        };
        let (above, name) = Self::split(&entry.path);
        let mut path = match self.is_dir(&above) {
            true => above,
            false => self.resolve(&above, Missing::Make)?.unwrap_or_default(),
        };
        path.push(name);
        self.named.insert(path.clone());
        if self.tree.get(&path) == Some(&made) {
            return Ok(());
        }
        if !(matches!(entry.does, Does::Dir) && self.is_dir(&path)) {
            self.remove(&path);
        }
        self.tree.insert(path, made);
        Ok(())
    }

    fn layer(&mut self, first: u32, layer: &[Entry]) -> Result<(), Refused> {
        self.removed.clear();
        self.folders = (layer.iter())
            .filter(|e| matches!(e.does, Does::Dir))
            .map(|e| e.path.clone())
            .collect();
        for entry in layer {
            self.hide(entry)?;
        }
        for (number, entry) in (first..).zip(layer) {
            self.apply(number, entry)?;
        }
        Ok(())
    }

    /// As [`names`] gives it, with the entry's number for the inode's.
    fn names(&self) -> Names {
        let line = |(path, made): (&Path, &Made)| {
            let (number, what) = match made {
                Made::Implied => (0, "folder".to_owned()),
                Made::Entry(n) => (
                    *n,
                    match &self.entries[n] {
                        Does::Dir => "folder".to_owned(),
                        Does::Symlink(target) => format!("link {target}"),
                        _ => format!("file {}", contents(*n)),
                    },
                ),
            };
            (
                path.join("/").into_bytes(),
                (number, i64::from(number), what),
            )
        };
        self.tree.iter().map(line).collect()
    }
}

fn model(layers: &[Vec<Entry>]) -> Result<Names, Refused> {
    let mut model = Model::default();
    let mut number = 0;
    for entry in layers.iter().flatten() {
        number += 1;
        model.entries.insert(number, entry.does.clone());
        let targets = match &entry.does {
            Does::Link(target) => vec![&entry.path, target],
            _ => vec![&entry.path],
        };
        for path in targets {
            model
                .named
                .extend((1..=path.len()).map(|n| path[..n].to_vec()));
        }
    }
    let mut first = 1;
    for layer in layers {
        model.layer(first, layer)?;
        first += layer.len() as u32;
    }
    Ok(model.names())
}

/// Which names are one file, by the numbers that stand for files.
fn groups(names: &Names) -> BTreeSet<Vec<&[u8]>> {
    let mut by_number: BTreeMap<u32, Vec<&[u8]>> = BTreeMap::new();
    for (name, (number, _, what)) in names.iter().filter(|(_, n)| n.2 != "folder") {
        let _ = what;
        by_number.entry(*number).or_default().push(name);
    }
    by_number.into_values().collect()
}

fn run(data: &[u8]) {
    let layers = script(data);
    let blobs: Vec<_> = (streams(&layers).into_iter())
        .map(|s| {
            let digest = Digest::of(&s);
            (s, digest)
        })
        .collect();
    match (convert_blobs(&blobs, &options()), model(&layers)) {
        (Ok((image, done)), Ok(expected)) => {
            assert_sound(&image, &done);
            let found = names(&image);
            let plain = |names: &Names| -> Vec<_> {
                names
                    .iter()
                    .map(|(name, (_, time, what))| (name.clone(), *time, what.clone()))
                    .collect()
            };
            assert_eq!(plain(&found), plain(&expected), "{layers:?}");
            assert_eq!(groups(&found), groups(&expected), "{layers:?}");
        }
        (Err(failure), Err(Refused)) => {
            assert_eq!(failure.kind, FailureKind::CorruptLayer, "{failure:?}");
        }
        (ours, expected) => panic!(
            "{:?}, but the model says {:?}: {layers:?}",
            ours.map(|(_, done)| done),
            expected.map(|_| ())
        ),
    }
}

fn seeds() -> Vec<Vec<u8>> {
    // Kind, path (two bytes), target (two bytes).
    let seed = |entries: &[[u8; 5]]| entries.concat();
    vec![
        seed(&[
            [1, 0, 0, 0, 0],
            [4, 1, 0, 0, 0],
            [0; 5],
            [13, 1, 0, 0, 0],
            [4, 1, 0, 0, 0],
        ]),
        seed(&[
            [4, 1, 0, 0, 0],
            [10, 4, 0, 1, 0],
            [0; 5],
            [4, 1, 0, 0, 0],
            [15, 0, 0, 0, 0],
        ]),
        seed(&[
            [8, 0, 0, 1, 0],
            [4, 1, 0, 0, 0],
            [0; 5],
            [1, 0, 0, 0, 0],
            [4, 5, 0, 0, 0],
        ]),
    ]
}
