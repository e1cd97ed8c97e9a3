//! The merged tree that an image is finished with: inodes, names and xattr sets in flat arrays
//! (about 50 bytes an entry and its name).
//!
//! Invariant: node 0 is the root; every other folder has exactly one name, in a folder that was there
//! before it, so the tree has no cycles and everything can be reached. Order of insertion does not
//! matter to the image.

use super::error::TreeError;
use super::xattr::XattrSets;
use super::{FileHandle, XattrSet};
use crate::format::{InodeType, MAX_SYMLINK, check_name};

/// A node of one [`Tree`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct NodeId(pub(super) u32);

/// What every kind of node has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Meta {
    /// Permission, set-id and sticky bits; others are dropped.
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Seconds since 1970; see [`clamp_mtime`].
    pub mtime: u32,
    /// From [`Tree::xattrs`].
    pub xattrs: XattrSet,
}

/// The nearest time the format can hold (1970 to 2106).
pub fn clamp_mtime(seconds: i64) -> u32 {
    seconds.clamp(0, i64::from(u32::MAX)) as u32
}

/// What a node is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names say it")]
pub enum Kind<'a> {
    Dir,
    File(FileHandle),
    /// Any file of no bytes.
    EmptyFile,
    Symlink(&'a [u8]),
    BlockDevice {
        major: u32,
        minor: u32,
    },
    CharDevice {
        major: u32,
        minor: u32,
    },
    Fifo,
    Socket,
}

/// The tree.
#[derive(Debug)]
pub struct Tree {
    pub(super) nodes: Vec<Node>,
    pub(super) entries: Vec<Entry>,
    /// Names and symlink targets.
    text: Vec<u8>,
    pub(super) xattrs: XattrSets,
}

#[derive(Debug)]
pub(super) struct Node {
    /// File: handle; symlink: offset and length in `text`; device: number.
    payload: u64,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: u32,
    pub(super) xattrs: XattrSet,
    /// Names; of a folder: folders in it.
    pub(super) links: u32,
    pub(super) mode: u16,
    pub(super) kind: InodeType,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) parent: u32,
    pub(super) node: u32,
    name_at: u32,
    name_len: u8,
}

impl Tree {
    /// A tree with a root folder.
    pub fn new(root: Meta) -> Self {
        let mut tree = Self {
            nodes: Vec::new(),
            entries: Vec::new(),
            text: Vec::new(),
            xattrs: XattrSets::default(),
        };
        tree.push(InodeType::Dir, 0, root);
        tree
    }

    /// The root folder.
    pub fn root(&self) -> NodeId {
        NodeId(0)
    }

    /// Nodes, hard links counted once.
    pub fn len(&self) -> usize {
        self.nodes.len()
    }

    /// Never: there is a root.
    pub fn is_empty(&self) -> bool {
        false
    }

    /// Interns a set of xattrs by full name (`user.…`) and value; the order does not matter.
    pub fn xattrs(&mut self, set: &[(&[u8], &[u8])]) -> Result<XattrSet, TreeError> {
        self.xattrs.intern(set)
    }

    /// Replaces what a node has: the root's xattrs can only be interned once there is a tree.
    pub fn set_meta(&mut self, node: NodeId, meta: Meta) {
        let Meta {
            mode,
            uid,
            gid,
            mtime,
            xattrs,
        } = meta;
        if let Some(node) = self.nodes.get_mut(node.0 as usize) {
            (node.mode, node.uid, node.gid, node.mtime, node.xattrs) =
                (mode & 0o7777, uid, gid, mtime, xattrs);
        }
    }

    /// Adds a new node under a name.
    pub fn add(
        &mut self,
        parent: NodeId,
        name: &[u8],
        kind: Kind<'_>,
        meta: Meta,
    ) -> Result<NodeId, TreeError> {
        if u32::try_from(self.nodes.len()).is_ok_and(|n| n == u32::MAX - 1) {
            return Err(TreeError::TooMany("nodes"));
        }
        self.check(parent, name)?;
        let (kind, payload) = match kind {
            Kind::Dir => (InodeType::Dir, 0),
            Kind::File(handle) => (InodeType::File, handle.to_raw()),
            Kind::EmptyFile => (InodeType::File, FileHandle::EMPTY.to_raw()),
            Kind::Symlink(target) => {
                if target.is_empty() || target.len() > MAX_SYMLINK || target.contains(&0) {
                    return Err(TreeError::Symlink(target.len()));
                }
                (
                    InodeType::Symlink,
                    u64::from(self.store(target)?) << 16 | target.len() as u64,
                )
            }
            Kind::BlockDevice { major, minor } => (InodeType::BlockDevice, device(major, minor)?),
            Kind::CharDevice { major, minor } => (InodeType::CharDevice, device(major, minor)?),
            Kind::Fifo => (InodeType::Fifo, 0),
            Kind::Socket => (InodeType::Socket, 0),
        };
        let node = self.push(kind, payload, meta);
        if kind == InodeType::Dir {
            self.nodes[parent.0 as usize].links += 1;
        }
        self.enter(parent, name, node)?;
        Ok(node)
    }

    /// Gives a node that is not a folder one more name.
    pub fn link(&mut self, parent: NodeId, name: &[u8], node: NodeId) -> Result<(), TreeError> {
        self.check(parent, name)?;
        match self.nodes.get(node.0 as usize) {
            Some(node) if node.kind != InodeType::Dir => {}
            _ => {
                return Err(TreeError::Kind(
                    "only a node that is not a folder can have a second name",
                ));
            }
        }
        self.enter(parent, name, node)
    }

    fn check(&self, parent: NodeId, name: &[u8]) -> Result<(), TreeError> {
        if !check_name(name) {
            return Err(TreeError::Name(name[..name.len().min(300)].to_vec()));
        }
        match self.nodes.get(parent.0 as usize) {
            Some(node) if node.kind == InodeType::Dir => Ok(()),
            _ => Err(TreeError::Kind("the parent is not a folder")),
        }
    }

    fn push(&mut self, kind: InodeType, payload: u64, meta: Meta) -> NodeId {
        let id = NodeId(self.nodes.len() as u32);
        let Meta {
            mode,
            uid,
            gid,
            mtime,
            xattrs,
        } = meta;
        self.nodes.push(Node {
            payload,
            uid,
            gid,
            mtime,
            xattrs,
            links: 0,
            mode: mode & 0o7777,
            kind,
        });
        id
    }

    fn enter(&mut self, parent: NodeId, name: &[u8], node: NodeId) -> Result<(), TreeError> {
        let name_at = self.store(name)?;
        if self.nodes[node.0 as usize].kind != InodeType::Dir {
            self.nodes[node.0 as usize].links += 1;
        }
        self.entries.push(Entry {
            parent: parent.0,
            node: node.0,
            name_at,
            name_len: name.len() as u8,
        });
        Ok(())
    }

    fn store(&mut self, text: &[u8]) -> Result<u32, TreeError> {
        let at =
            u32::try_from(self.text.len()).map_err(|_| TreeError::TooMany("bytes of names"))?;
        self.text.extend_from_slice(text);
        Ok(at)
    }

    pub(super) fn name(&self, entry: &Entry) -> &[u8] {
        let at = entry.name_at as usize;
        &self.text[at..at + usize::from(entry.name_len)]
    }

    /// Sorts entries by folder and name, so that each folder's are one range.
    pub(super) fn sort(&mut self) {
        let text = &self.text;
        let name =
            |e: &Entry| &text[e.name_at as usize..e.name_at as usize + usize::from(e.name_len)];
        self.entries
            .sort_unstable_by(|a, b| a.parent.cmp(&b.parent).then_with(|| name(a).cmp(name(b))));
    }
}

impl Node {
    pub(super) fn target<'t>(&self, tree: &'t Tree) -> &'t [u8] {
        let (at, len) = (
            (self.payload >> 16) as usize,
            (self.payload & 0xffff) as usize,
        );
        &tree.text[at..at + len]
    }

    pub(super) fn handle(&self) -> FileHandle {
        FileHandle::from_raw(self.payload)
    }

    pub(super) fn rdev(&self) -> u32 {
        self.payload as u32
    }
}

/// As the kernel's `new_encode_dev`.
fn device(major: u32, minor: u32) -> Result<u64, TreeError> {
    if major >= 1 << 12 || minor >= 1 << 20 {
        return Err(TreeError::Device(major, minor));
    }
    Ok(u64::from(minor & 0xff | major << 8 | (minor & !0xff) << 12))
}
