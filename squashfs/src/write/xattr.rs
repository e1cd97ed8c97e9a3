//! Xattr sets, each stored once, however many inodes carry it.

use std::collections::HashMap;

use super::error::TreeError;
use super::metadata::MetadataBlocks;
use super::tree::Tree;
use crate::compress::{CompressError, Compressor};
use crate::format::{NO_XATTR, XattrEntry, XattrId, XattrPrefix, put32};

/// A set of xattrs of one [`super::Tree`]; the default is the empty one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct XattrSet(pub(super) u32);

impl Default for XattrSet {
    fn default() -> Self {
        Self(NO_XATTR)
    }
}

/// All sets, encoded as the key/value table wants them.
#[derive(Debug, Default)]
pub(super) struct XattrSets {
    bytes: Vec<u8>,
    sets: Vec<Encoded>,
    by_hash: HashMap<[u8; 32], u32>,
}

/// Where a set lies in `bytes` (from `at` to the next set's) and what its id record says.
#[derive(Debug)]
struct Encoded {
    at: usize,
    count: u32,
    list_size: u32,
}

const MAX_VALUE: usize = 65_536;
const MAX_FULL_NAME: usize = 255;

impl XattrSets {
    pub(super) fn intern(&mut self, set: &[(&[u8], &[u8])]) -> Result<XattrSet, TreeError> {
        if set.is_empty() {
            return Ok(XattrSet::default());
        }
        let mut keys = Vec::with_capacity(set.len());
        for &(name, value) in set {
            if value.len() > MAX_VALUE {
                return Err(TreeError::XattrValue(value.len()));
            }
            let split = XattrPrefix::split(name)
                .filter(|_| name.len() <= MAX_FULL_NAME && !name.contains(&0));
            let (prefix, rest) =
                split.ok_or_else(|| TreeError::XattrName(name[..name.len().min(300)].to_vec()))?;
            keys.push((prefix, rest, value));
        }
        keys.sort_unstable();
        if let Some(pair) = keys
            .windows(2)
            .find(|pair| pair[0].0 == pair[1].0 && pair[0].1 == pair[1].1)
        {
            return Err(TreeError::XattrTwice(
                [pair[0].0.as_bytes(), pair[0].1].concat(),
            ));
        }
        let at = self.bytes.len();
        let mut list_size = 0;
        for (prefix, name, value) in &keys {
            XattrEntry {
                prefix: *prefix,
                out_of_line: false,
                name_len: name.len() as u16,
            }
            .encode(&mut self.bytes);
            self.bytes.extend_from_slice(name);
            put32(&mut self.bytes, value.len() as u32);
            self.bytes.extend_from_slice(value);
            list_size += (prefix.as_bytes().len() + name.len() + 1) as u32;
        }
        let hash = *blake3::hash(&self.bytes[at..]).as_bytes();
        let next = self.sets.len() as u32;
        let id = *self.by_hash.entry(hash).or_insert(next);
        if id == next {
            self.sets.push(Encoded {
                at,
                count: keys.len() as u32,
                list_size,
            });
        } else {
            self.bytes.truncate(at);
        }
        Ok(XattrSet(id))
    }

    /// Number of sets.
    pub(super) fn len(&self) -> usize {
        self.sets.len()
    }

    /// Encoded keys and values, number of keys, size of the list of names.
    pub(super) fn get(&self, id: u32) -> (&[u8], u32, u32) {
        let set = &self.sets[id as usize];
        let end = self
            .sets
            .get(id as usize + 1)
            .map_or(self.bytes.len(), |next| next.at);
        (&self.bytes[set.at..end], set.count, set.list_size)
    }
}

/// Which sets inodes use, in the order they were first used: the numbers in the image.
#[derive(Debug)]
pub(super) struct XattrOrder {
    /// By number in the tree.
    new: Vec<u32>,
    /// By number in the image.
    old: Vec<u32>,
}

impl XattrOrder {
    pub(super) fn new(tree: &Tree) -> Self {
        Self {
            new: vec![NO_XATTR; tree.xattrs.len()],
            old: Vec::new(),
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.old.is_empty()
    }

    pub(super) fn len(&self) -> u32 {
        self.old.len() as u32
    }

    /// The number of a set in the image.
    pub(super) fn use_set(&mut self, set: XattrSet) -> u32 {
        let Some(new) = self.new.get_mut(set.0 as usize) else {
            return NO_XATTR;
        };
        if *new == NO_XATTR {
            *new = self.old.len() as u32;
            self.old.push(set.0);
        }
        *new
    }

    /// The key/value table's metadata blocks, and the id records.
    pub(super) fn encode(
        &self,
        compressor: &mut Compressor,
        tree: &Tree,
    ) -> Result<(Vec<u8>, Vec<u8>), CompressError> {
        let (mut blocks, mut records) = (MetadataBlocks::new(), Vec::new());
        for &old in &self.old {
            let (bytes, count, size) = tree.xattrs.get(old);
            XattrId {
                start: blocks.position(),
                count,
                size,
            }
            .encode(&mut records);
            blocks.append(compressor, bytes)?;
        }
        Ok((blocks.finish(compressor)?.0, records))
    }
}
