//! Every path that a layer names, as a tree of interned names: about 35 bytes and the name for each.
//!
//! A node is a place, not a file: what lies there at which time is [`crate::merge`]'s matter. Node 0 is the root, a
//! node's parent has a smaller number, and two nodes of one parent have different names.

use std::hash::BuildHasher;

use hashbrown::{DefaultHashBuilder, HashTable};

/// A place in the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PathId(u32);

/// Longest path, without the leading slash, in bytes: the kernel's PATH_MAX.
const MAX_PATH: usize = 4095;
/// Longest name in a folder, in bytes.
pub const MAX_NAME: usize = 255;
/// How deep folders may be nested: what fits [`MAX_PATH`].
pub const MAX_DEPTH: usize = 2048;

/// Why a name leads nowhere.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum PathError {
    #[error("its name contains `..`")]
    DotDot,
    #[error("its path is longer than {MAX_PATH} bytes")]
    PathLength,
    #[error("a name in it is longer than {MAX_NAME} bytes")]
    NameLength,
    #[error("there are more names than can be kept")]
    Full,
}

struct Node {
    parent: u32,
    /// Where the name lies in `names`: a length byte and the bytes.
    name: u32,
}

/// The tree.
pub struct Paths {
    nodes: Vec<Node>,
    names: Vec<u8>,
    index: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

impl std::fmt::Debug for Paths {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Paths")
            .field("nodes", &self.nodes.len())
            .finish_non_exhaustive()
    }
}

impl PathId {
    pub const ROOT: Self = Self(0);

    pub fn index(self) -> usize {
        self.0 as usize
    }

    pub(crate) fn from_index(index: u32) -> Self {
        Self(index)
    }

    pub(crate) fn raw(self) -> u32 {
        self.0
    }
}

impl Paths {
    pub fn new() -> Self {
        Self {
            nodes: vec![Node { parent: 0, name: 0 }],
            names: vec![0],
            index: HashTable::new(),
            hasher: DefaultHashBuilder::default(),
        }
    }

    /// Nodes, the root included.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// The root's parent is the root.
    pub fn parent(&self, path: PathId) -> PathId {
        PathId(self.nodes[path.index()].parent)
    }

    /// The root's name is empty.
    pub fn name(&self, path: PathId) -> &[u8] {
        name_at(&self.names, self.nodes[path.index()].name)
    }

    /// The place of a name as it stands in a header: absolute or not, with `.` and doubled slashes.
    pub fn intern(&mut self, raw: &[u8]) -> Result<PathId, PathError> {
        let mut at = PathId::ROOT;
        let mut length = 0;
        for name in raw.split(|b| *b == b'/') {
            match name {
                b"" | b"." => continue,
                b".." => return Err(PathError::DotDot),
                _ => {}
            }
            length += name.len() + 1;
            if length > MAX_PATH + 1 {
                return Err(PathError::PathLength);
            }
            at = self.intern_child(at, name)?;
        }
        Ok(at)
    }

    /// The place `name` in `parent`.
    pub fn intern_child(&mut self, parent: PathId, name: &[u8]) -> Result<PathId, PathError> {
        if name.len() > MAX_NAME {
            return Err(PathError::NameLength);
        }
        let hash = self.hasher.hash_one((parent.0, name));
        if let Some(found) = self.lookup(hash, parent, name) {
            return Ok(found);
        }
        let id = u32::try_from(self.nodes.len()).map_err(|_| PathError::Full)?;
        // Two numbers are taken: 0 and the largest mean "nothing" and "implied" elsewhere.
        if id >= u32::MAX - 2 {
            return Err(PathError::Full);
        }
        let at = u32::try_from(self.names.len()).map_err(|_| PathError::Full)?;
        self.names.push(name.len() as u8);
        self.names.extend_from_slice(name);
        self.nodes.push(Node {
            parent: parent.0,
            name: at,
        });
        let (nodes, names, hasher) = (&self.nodes, &self.names, &self.hasher);
        self.index.insert_unique(hash, id, |&other| {
            let node = &nodes[other as usize];
            hasher.hash_one((node.parent, name_at(names, node.name)))
        });
        Ok(PathId(id))
    }

    /// The place `name` in `parent`, if any layer names it.
    pub fn child(&self, parent: PathId, name: &[u8]) -> Option<PathId> {
        self.lookup(self.hasher.hash_one((parent.0, name)), parent, name)
    }

    fn lookup(&self, hash: u64, parent: PathId, name: &[u8]) -> Option<PathId> {
        let same = |&id: &u32| {
            let node = &self.nodes[id as usize];
            node.parent == parent.0 && name_at(&self.names, node.name) == name
        };
        self.index.find(hash, same).map(|&id| PathId(id))
    }

    /// The names from the root down to `path`.
    pub fn names_to(&self, path: PathId) -> Vec<Vec<u8>> {
        let mut names = Vec::new();
        let mut at = path;
        while at != PathId::ROOT {
            names.push(self.name(at).to_vec());
            at = self.parent(at);
        }
        names.reverse();
        names
    }
}

fn name_at(names: &[u8], at: u32) -> &[u8] {
    let at = at as usize;
    &names[at + 1..at + 1 + usize::from(names[at])]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ways_to_write_a_place_are_one_place() {
        let mut paths = Paths::new();
        let a = paths.intern(b"a/b\xff").unwrap();
        for same in [&b"./a/b\xff"[..], b"/a//b\xff/", b"a/./b\xff"] {
            assert_eq!(paths.intern(same), Ok(a));
        }
        assert_eq!(paths.len(), 3);
        assert_eq!(paths.names_to(a), [b"a".to_vec(), b"b\xff".to_vec()]);
        assert_eq!(paths.intern(b"././/"), Ok(PathId::ROOT));
        assert_eq!(paths.child(PathId::ROOT, b"b"), None);
    }

    #[test]
    fn what_leads_out_or_is_too_long_is_refused() {
        let mut paths = Paths::new();
        for bad in [&b".."[..], b"a/../b", b"/..", b"a/.."] {
            assert_eq!(paths.intern(bad), Err(PathError::DotDot));
        }
        let name = |n| vec![b'x'; n];
        assert_eq!(paths.intern(&name(256)), Err(PathError::NameLength));
        assert!(paths.intern(&name(255)).is_ok());
        assert!(paths.intern(&b"a/".repeat(2048)).is_ok());
        assert_eq!(
            paths.intern(&b"a/".repeat(2049)),
            Err(PathError::PathLength)
        );
    }
}
