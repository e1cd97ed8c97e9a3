//! What all layers say, in the order they were read (top layer first), 40 bytes a header.

use std::hash::BuildHasher as _;
use std::ops::Range;

use berth_squashfs::write::FileHandle;
use hashbrown::{DefaultHashBuilder, HashTable};

use crate::paths::{PathId, Paths};
use crate::spill::Run;

/// Most bytes of different xattr sets in one image: this, and so many more for each header.
const XATTR_BYTES: usize = 32 << 20;
const XATTR_BYTES_A_HEADER: usize = 192;
/// Bytes of symlink targets: this, and so many more for each header. Below 4 GiB in any case, since places are `u32`.
const TARGET_BYTES: usize = 32 << 20;
const TARGET_BYTES_A_HEADER: usize = 192;

/// What a header does to its place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum What {
    Dir,
    /// An empty file.
    Empty,
    /// A file whose contents are in the image already.
    File(FileHandle),
    /// A file whose contents are not in the image: index into [`Entries::spilled`].
    Spilled(u32),
    /// Where its target lies in [`Entries::targets`].
    Symlink {
        at: u32,
        length: u16,
    },
    Fifo,
    /// Takes its place, as for every unpacker, and is then left out.
    Device,
    /// A hard link to what lies there at this point of this layer.
    Link(PathId),
    /// Removes what lower layers have there.
    Whiteout,
    /// Removes what lower layers have in this folder.
    Opaque,
}

/// A header. Metadata as it will be in the image.
#[derive(Debug, Clone, Copy)]
pub struct Header {
    pub path: PathId,
    pub what: What,
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: u32,
    pub xattrs: XattrId,
}

/// Contents that an upper layer seems to hide.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spilled {
    /// In the spill file, as they were.
    Run(Run),
    /// Compressed before it was known that they are hidden; the image's writer has put them aside.
    Aside(FileHandle),
}

/// A set of xattrs; the default is the empty one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct XattrId(u32);

/// One set: names and values, sorted by name.
pub type XattrPairs = Vec<(Vec<u8>, Vec<u8>)>;

/// Everything known about all layers.
#[derive(Debug)]
pub struct Entries {
    pub paths: Paths,
    pub headers: Vec<Header>,
    /// The headers of each layer, by the layer's index (0 = base).
    pub layers: Vec<Range<u32>>,
    pub spilled: Vec<Spilled>,
    targets: Vec<u8>,
    xattrs: XattrSets,
}

/// Sets of xattrs, each once.
#[derive(Default)]
struct XattrSets {
    /// For each part of a set, names and values by turns: its length as `u32`, its bytes.
    bytes: Vec<u8>,
    /// Start and length of each set in `bytes`.
    runs: Vec<(u32, u32)>,
    index: HashTable<u32>,
    hasher: DefaultHashBuilder,
}

impl std::fmt::Debug for XattrSets {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("XattrSets")
            .field("sets", &self.runs.len())
            .finish_non_exhaustive()
    }
}

/// More of something than one image may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the image has more {what} than allowed ({limit} bytes)")]
pub struct Flood {
    pub what: &'static str,
    pub limit: usize,
}

impl Entries {
    pub fn new(layers: usize) -> Self {
        Self {
            paths: Paths::new(),
            headers: Vec::new(),
            layers: vec![0..0; layers],
            spilled: Vec::new(),
            targets: Vec::new(),
            xattrs: XattrSets::default(),
        }
    }

    /// The target of a symlink header.
    pub fn target(&self, at: u32, length: u16) -> &[u8] {
        &self.targets[at as usize..at as usize + usize::from(length)]
    }

    /// Keeps a symlink's target, which must be at most 65,535 bytes long.
    pub fn add_target(&mut self, target: &[u8]) -> Result<What, Flood> {
        let at = self.targets.len();
        let limit = TARGET_BYTES + TARGET_BYTES_A_HEADER * self.headers.len();
        let limit = limit.min(u32::MAX as usize);
        if at + target.len() > limit {
            return Err(Flood {
                what: "symlink targets",
                limit,
            });
        }
        self.targets.extend_from_slice(target);
        Ok(What::Symlink {
            at: at as u32,
            length: target.len() as u16,
        })
    }

    /// Keeps a set once, however often it comes.
    pub fn intern_xattrs(&mut self, set: XattrPairs) -> Result<XattrId, Flood> {
        self.xattrs
            .intern(set, XATTR_BYTES + XATTR_BYTES_A_HEADER * self.headers.len())
    }

    /// How many different sets there are; ids are smaller.
    pub fn xattr_sets(&self) -> usize {
        self.xattrs.runs.len() + 1
    }

    /// The set with this index, sorted by name.
    pub fn xattr_set(&self, index: usize) -> Vec<(&[u8], &[u8])> {
        match index.checked_sub(1) {
            Some(index) => decode(&self.xattrs.bytes[self.xattrs.range(index)]),
            None => Vec::new(),
        }
    }
}

impl XattrSets {
    fn intern(&mut self, mut set: XattrPairs, limit: usize) -> Result<XattrId, Flood> {
        if set.is_empty() {
            return Ok(XattrId::default());
        }
        set.sort_unstable();
        let start = self.bytes.len();
        for part in set.iter().flat_map(|(name, value)| [name, value]) {
            self.bytes
                .extend_from_slice(&(part.len() as u32).to_le_bytes());
            self.bytes.extend_from_slice(part);
        }
        let hash = self.hasher.hash_one(&self.bytes[start..]);
        let found = self.index.find(hash, |&id| {
            self.bytes[self.range(id as usize)] == self.bytes[start..]
        });
        if let Some(&id) = found {
            self.bytes.truncate(start);
            return Ok(XattrId(id + 1));
        }
        if self.bytes.len() > limit.min(u32::MAX as usize) {
            return Err(Flood {
                what: "different xattrs",
                limit,
            });
        }
        let id = self.runs.len() as u32;
        self.runs
            .push((start as u32, (self.bytes.len() - start) as u32));
        let Self {
            bytes,
            runs,
            index,
            hasher,
        } = self;
        index.insert_unique(hash, id, |&id| {
            hasher.hash_one(&bytes[range(runs[id as usize])])
        });
        Ok(XattrId(id + 1))
    }

    fn range(&self, index: usize) -> Range<usize> {
        range(self.runs[index])
    }
}

fn range((start, length): (u32, u32)) -> Range<usize> {
    start as usize..start as usize + length as usize
}

fn decode(mut rest: &[u8]) -> Vec<(&[u8], &[u8])> {
    let mut part = || {
        let (length, tail) = rest.split_first_chunk::<4>()?;
        let (part, tail) = tail.split_at_checked(u32::from_le_bytes(*length) as usize)?;
        rest = tail;
        Some(part)
    };
    std::iter::from_fn(|| Some((part()?, part()?))).collect()
}

impl XattrId {
    pub fn index(self) -> usize {
        self.0 as usize
    }
}
