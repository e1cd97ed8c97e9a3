//! The layers applied one after another, base first, as an unpacker would, on a tree in memory.
//!
//! Rules, where the image-spec ("layer.md", "Applying Changesets") leaves room as umoci and containerd do:
//! - whiteouts and opaque markers of a layer act before its other entries, wherever they stand in it;
//! - a folder over a folder changes metadata only; everything else replaces what was there, with all below it;
//! - parents that are symlinks are followed, within the image; missing ones are made, root's, 0755, of time 0; one that
//!   is a file is replaced;
//! - a hard link joins what lies at its target at that point of its layer, or lay there before the layer's whiteouts;
//! - the last of several entries for one place wins.
//!
//! Invariant: what lives has living folders all the way up, so a living place is reached by its literal path. Every
//! step is bounded: removing costs what making did, and following symlinks has a budget.

use std::collections::HashMap;

use crate::entries::{Entries, What};
use crate::paths::{MAX_DEPTH, PathError, PathId, Paths};

/// Most symlinks followed for one path: the kernel's limit.
const MAX_LINKS: usize = 40;
/// Names met while following symlinks, looked up or not, for the whole image: this, and so many more for each header.
const STEPS: u64 = 10_000_000;
const STEPS_A_HEADER: u64 = 64;

/// What is wrong with an entry, now that those below it are known.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    #[error(transparent)]
    Path(#[from] PathError),
    #[error("more than {MAX_LINKS} symlinks on its way")]
    Loop,
    #[error("following symlinks takes too long")]
    Work,
    #[error("it would be nested deeper than {MAX_DEPTH} folders")]
    Depth,
    #[error("its hard link's target does not exist")]
    NoTarget,
    #[error("its hard link's target is a folder")]
    FolderTarget,
}

/// An error and the header it belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{error}")]
pub struct Misfit {
    pub header: u32,
    pub error: MergeError,
}

/// What lies at a place: the number of the header that made it, plus one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
struct Made(u32);

/// Nothing.
const NOTHING: Made = Made(0);
/// A folder that no header made.
const IMPLIED: Made = Made(u32::MAX);

#[derive(Debug, Clone, Copy, Default)]
struct Place {
    made: Made,
    /// Living children as a doubly linked list; 0 is none, since the root is nobody's child.
    first: u32,
    next: u32,
    previous: u32,
    /// The layer, plus one, that has an entry for a folder here.
    folder_of: u16,
}

/// The merged tree.
#[derive(Debug)]
pub struct Merged {
    places: Vec<Place>,
    /// By header: whether it was the target of a hard link.
    linked: Vec<bool>,
}

/// A name in the merged tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Living {
    pub path: PathId,
    /// `None`: a folder that no header made.
    pub header: Option<u32>,
    /// Other names may stand for the same file.
    pub linked: bool,
}

impl Merged {
    /// Whether anything but the root lives, and what: children of `path`, in an order that depends on the layers
    /// alone.
    pub fn children<'m>(&'m self, path: PathId) -> impl Iterator<Item = Living> + use<'m> {
        let mut next = self.places[path.index()].first;
        std::iter::from_fn(move || {
            let path = PathId::from_index(std::num::NonZeroU32::new(next)?.get());
            next = self.places[path.index()].next;
            Some(self.living(path))
        })
    }

    pub fn living(&self, path: PathId) -> Living {
        let made = self.places[path.index()].made;
        let header = (made != IMPLIED).then(|| made.0 - 1);
        Living {
            path,
            header,
            linked: header.is_some_and(|h| self.linked[h as usize]),
        }
    }
}

/// Applies all layers. New places may be named on the way, because symlinks lead there.
pub fn merge(entries: &mut Entries) -> Result<Merged, Misfit> {
    let steps = STEPS + STEPS_A_HEADER * entries.headers.len() as u64;
    merge_within(entries, steps)
}

fn merge_within(entries: &mut Entries, steps: u64) -> Result<Merged, Misfit> {
    let headers = entries.headers.len();
    let mut merger = Merger {
        places: vec![Place::default(); entries.paths.len()],
        linked: vec![false; headers],
        removed: HashMap::new(),
        keep_removed: false,
        steps,
        entries,
    };
    merger.places[0].made = IMPLIED;
    for layer in 0..merger.entries.layers.len() {
        merger.layer(layer)?;
    }
    Ok(Merged {
        places: merger.places,
        linked: merger.linked,
    })
}

struct Merger<'e> {
    entries: &'e mut Entries,
    places: Vec<Place>,
    linked: Vec<bool>,
    /// What this layer's whiteouts removed, for its hard links.
    removed: HashMap<PathId, Made>,
    keep_removed: bool,
    steps: u64,
}

impl Merger<'_> {
    fn layer(&mut self, layer: usize) -> Result<(), Misfit> {
        let range = self.entries.layers[layer].clone();
        let mark = layer as u16 + 1;
        self.removed.clear();
        self.keep_removed = false;
        for header in &self.entries.headers[range.start as usize..range.end as usize] {
            match header.what {
                What::Dir => self.places[header.path.index()].folder_of = mark,
                What::Link(_) => self.keep_removed = true,
                _ => {}
            }
        }
        for index in range.clone() {
            let header = self.entries.headers[index as usize];
            let done = match header.what {
                What::Whiteout => self.whiteout(header.path, mark),
                What::Opaque => self.opaque(header.path, mark),
                _ => continue,
            };
            done.map_err(|error| Misfit {
                header: index,
                error,
            })?;
        }
        for index in range {
            self.apply(index).map_err(|error| Misfit {
                header: index,
                error,
            })?;
        }
        Ok(())
    }

    fn whiteout(&mut self, path: PathId, mark: u16) -> Result<(), MergeError> {
        let parent = self.entries.paths.parent(path);
        let target = match self.is_dir(parent) {
            true => Some(path),
            false => {
                let parent = self.resolve(parent, Missing::Stop { mark })?;
                let name = self.entries.paths.name(path);
                parent.and_then(|parent| self.entries.paths.child(parent, name))
            }
        };
        if let Some(target) = target.filter(|t| *t != PathId::ROOT) {
            self.remove(target);
        }
        Ok(())
    }

    fn opaque(&mut self, path: PathId, mark: u16) -> Result<(), MergeError> {
        let dir = match self.is_dir(path) {
            true => Some(path),
            false => self.resolve(path, Missing::Stop { mark })?,
        };
        while let Some(child) = dir.and_then(|dir| self.first_child(dir)) {
            self.remove(child);
        }
        Ok(())
    }

    fn apply(&mut self, index: u32) -> Result<(), MergeError> {
        let header = self.entries.headers[index as usize];
        if matches!(header.what, What::Whiteout | What::Opaque) {
            return Ok(());
        }
        if header.path == PathId::ROOT {
            // Reading refused everything but folders here.
            self.places[0].made = Made(index + 1);
            return Ok(());
        }
        let made = match header.what {
            What::Link(target) => self.link_target(target)?,
            _ => Made(index + 1),
        };
        let path = self.ensure_parent(header.path)?;
        let place = &mut self.places[path.index()];
        if place.made == made {
            return Ok(());
        }
        if header.what == What::Dir && self.is_dir(path) {
            self.places[path.index()].made = made;
            return Ok(());
        }
        if let What::Link(_) = header.what {
            self.linked[made.0 as usize - 1] = true;
        }
        self.remove(path);
        self.attach(path, made);
        Ok(())
    }

    /// What a hard link to `target` joins.
    fn link_target(&mut self, target: PathId) -> Result<Made, MergeError> {
        let mut place = target;
        if self.places[target.index()].made == NOTHING && target != PathId::ROOT {
            let parent = self.entries.paths.parent(target);
            let parent = self.resolve(parent, Missing::Stop { mark: 0 })?;
            let name = self.entries.paths.name(target);
            if let Some(found) = parent.and_then(|p| self.entries.paths.child(p, name)) {
                place = found;
            }
        }
        let mut made = self.places[place.index()].made;
        if made == NOTHING {
            made = (self.removed.get(&place).copied()).ok_or(MergeError::NoTarget)?;
        }
        if made == IMPLIED || self.what(made) == Some(What::Dir) {
            return Err(MergeError::FolderTarget);
        }
        Ok(made)
    }

    /// Makes the folders above `path`, and gives the place that `path` really is.
    fn ensure_parent(&mut self, path: PathId) -> Result<PathId, MergeError> {
        let parent = self.entries.paths.parent(path);
        if self.is_dir(parent) {
            return Ok(path);
        }
        let resolved = self.resolve(parent, Missing::Make)?.unwrap_or(PathId::ROOT);
        if resolved == parent {
            return Ok(path);
        }
        let name = self.entries.paths.name(path).to_vec();
        self.place_of(resolved, &name)
    }

    fn place_of(&mut self, parent: PathId, name: &[u8]) -> Result<PathId, MergeError> {
        let place = self.entries.paths.intern_child(parent, name)?;
        if self.places.len() < self.entries.paths.len() {
            self.places
                .resize(self.entries.paths.len(), Place::default());
        }
        Ok(place)
    }

    /// Follows the names down to `path`, through symlinks, never out of the root.
    fn resolve(&mut self, path: PathId, missing: Missing) -> Result<Option<PathId>, MergeError> {
        let mut ahead = self.entries.paths.names_to(path);
        spend(&mut self.steps, ahead.len())?;
        ahead.reverse();
        let (mut at, mut depth, mut links) = (PathId::ROOT, 0, 0);
        while let Some(name) = ahead.pop() {
            match &name[..] {
                b"" | b"." => continue,
                b".." => {
                    at = self.entries.paths.parent(at);
                    depth -= usize::from(depth > 0);
                    continue;
                }
                _ => {}
            }
            let Some(place) = self.step(at, &name, missing)? else {
                return Ok(None);
            };
            match self.what(self.places[place.index()].made) {
                Some(What::Symlink { at: start, length }) => {
                    if let Missing::Stop { mark } = missing
                        && mark != 0
                        && self.places[place.index()].folder_of == mark
                    {
                        // This layer puts a folder here: there is nothing below it to hide.
                        return Ok(None);
                    }
                    links += 1;
                    if links > MAX_LINKS {
                        return Err(MergeError::Loop);
                    }
                    let target = self.entries.target(start, length);
                    if target.starts_with(b"/") {
                        (at, depth) = (PathId::ROOT, 0);
                    }
                    // Counted here and not where they are taken: the way may end before it comes to them.
                    let slashes = target.iter().filter(|b| **b == b'/').count();
                    spend(&mut self.steps, slashes + 1)?;
                    ahead.extend(target.rsplit(|b| *b == b'/').map(<[u8]>::to_vec));
                }
                _ if self.is_dir(place) => {
                    depth += 1;
                    if depth > MAX_DEPTH {
                        return Err(MergeError::Depth);
                    }
                    at = place;
                }
                _ if missing == Missing::Make => {
                    self.remove(place);
                    self.attach(place, IMPLIED);
                    depth += 1;
                    if depth > MAX_DEPTH {
                        return Err(MergeError::Depth);
                    }
                    at = place;
                }
                _ => return Ok(None),
            }
        }
        Ok(Some(at))
    }

    fn step(
        &mut self,
        at: PathId,
        name: &[u8],
        missing: Missing,
    ) -> Result<Option<PathId>, MergeError> {
        match missing {
            Missing::Make => self.place_of(at, name).map(Some),
            Missing::Stop { .. } => Ok(self.entries.paths.child(at, name)),
        }
    }

    fn what(&self, made: Made) -> Option<What> {
        if made == NOTHING || made == IMPLIED {
            return None;
        }
        Some(self.entries.headers[made.0 as usize - 1].what)
    }

    fn is_dir(&self, path: PathId) -> bool {
        let made = self.places[path.index()].made;
        made == IMPLIED || self.what(made) == Some(What::Dir)
    }

    fn first_child(&self, path: PathId) -> Option<PathId> {
        let first = self.places[path.index()].first;
        (first != 0).then(|| PathId::from_index(first))
    }

    /// Puts something at an empty place in a living folder.
    fn attach(&mut self, path: PathId, made: Made) {
        let parent = self.entries.paths.parent(path).index();
        let next = self.places[parent].first;
        self.places[parent].first = path.raw();
        if next != 0 {
            self.places[next as usize].previous = path.raw();
        }
        let place = &mut self.places[path.index()];
        (place.made, place.first, place.next, place.previous) = (made, 0, next, 0);
    }

    /// Empties a place and everything below it.
    fn remove(&mut self, path: PathId) {
        let Place {
            made,
            next,
            previous,
            ..
        } = self.places[path.index()];
        if made == NOTHING {
            return;
        }
        if previous == 0 {
            let parent = self.entries.paths.parent(path).index();
            self.places[parent].first = next;
        } else {
            self.places[previous as usize].next = next;
        }
        if next != 0 {
            self.places[next as usize].previous = previous;
        }
        let mut doomed = vec![path];
        while let Some(path) = doomed.pop() {
            let place = &mut self.places[path.index()];
            let (made, mut child) = (place.made, place.first);
            (place.made, place.first) = (NOTHING, 0);
            if self.keep_removed && made != IMPLIED {
                self.removed.insert(path, made);
            }
            while child != 0 {
                let id = PathId::from_index(child);
                doomed.push(id);
                child = self.places[id.index()].next;
            }
        }
    }
}

/// Takes `names` off the budget.
fn spend(steps: &mut u64, names: usize) -> Result<(), MergeError> {
    *steps = steps.checked_sub(names as u64).ok_or(MergeError::Work)?;
    Ok(())
}

/// What to do where the way does not go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Missing {
    /// Make folders.
    Make,
    /// There is no such place. With a mark: nor behind a symlink that this layer replaces by a folder.
    Stop { mark: u16 },
}

/// The name of a place, for error lines.
pub fn full_name(paths: &Paths, path: PathId) -> Vec<u8> {
    paths.names_to(path).join(&b'/')
}

#[cfg(test)]
mod tests;
