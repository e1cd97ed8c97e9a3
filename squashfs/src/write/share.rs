//! What is in the image already: blocks, beginnings of files, small files.

use std::collections::HashMap;
use std::sync::{PoisonError, RwLock};

/// BLAKE3-256.
pub(super) type Hash = [u8; 32];

/// Blocks in the image by the hash of their contents; workers ask, the appender tells.
#[derive(Debug, Default)]
pub(super) struct KnownBlocks(RwLock<HashMap<Hash, Stored>>);

/// A stored block.
#[derive(Debug, Clone, Copy)]
pub(super) struct Stored {
    pub(super) at: u64,
    /// As in [`crate::format::BlockSize`].
    pub(super) size: u32,
}

impl KnownBlocks {
    pub(super) fn contains(&self, hash: &Hash) -> bool {
        self.get(hash).is_some()
    }

    pub(super) fn get(&self, hash: &Hash) -> Option<Stored> {
        self.0
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .get(hash)
            .copied()
    }

    pub(super) fn insert(&self, hash: Hash, stored: Stored) {
        self.0
            .write()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(hash, stored);
    }
}

/// A run of blocks in the image: where it begins and its sizes in the list of all block sizes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Run {
    pub(super) start: u64,
    pub(super) list: u32,
}

/// Every beginning of every file that has blocks, by the chained hash of its blocks. One look-up a block
/// tells whether some file begins with exactly these, however many files begin alike.
#[derive(Debug, Default)]
pub(super) struct Beginnings(HashMap<Hash, Run>);

impl Beginnings {
    /// The chain of a file without blocks.
    pub(super) const EMPTY: Hash = [0; 32];

    /// The chain with one more block.
    pub(super) fn extend(chain: &Hash, block: &Hash) -> Hash {
        let mut both = [0; 64];
        both[..32].copy_from_slice(chain);
        both[32..].copy_from_slice(block);
        *blake3::hash(&both).as_bytes()
    }

    pub(super) fn get(&self, chain: &Hash) -> Option<Run> {
        self.0.get(chain).copied()
    }

    /// The first that came stays.
    pub(super) fn insert(&mut self, chain: Hash, run: Run) {
        self.0.entry(chain).or_insert(run);
    }
}

/// Small files in fragments: contents' hash → fragment, offset. Equal hashes mean equal contents, and so
/// equal lengths.
pub(super) type SmallFiles = HashMap<Hash, (u32, u32)>;
