//! Whether bytes of an image file are those that were sealed: the dm-verity tree behind the image, from the leaves up
//! to the root that the signed record names.
//!
//! Only the levels above the leaves are kept in memory (32 bytes for each 512 KiB of image); they are checked against
//! the root when the tree is opened. Format: [`berth_squashfs::verity`].

use std::ops::Range;

use berth_squashfs::verity::{BLOCK, DIGEST};
use sha2::{Digest, Sha256};

use super::CHUNK;
use super::source::SourceError;

/// What a record says about an image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Sealed {
    /// The root of the tree.
    pub root: [u8; DIGEST],
    /// Where the tree starts, which is how many bytes of data there are.
    pub hash_offset: u64,
}

/// How an image's file is divided: chunks of data, then chunks of the tree's leaves. What lies between, the tree's
/// head, is no chunk's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Chunks {
    data: u64,
    leaves: Range<u64>,
    /// Chunks of data; those of leaves are numbered from here.
    pub(super) data_count: u32,
    pub(super) count: u32,
}

impl Chunks {
    pub(super) fn of(sealed: &Sealed) -> Result<Self, TreeError> {
        let start = Tree::head_place(sealed)?.end;
        let data = sealed.hash_offset;
        let leaves = levels(data / BLOCK as u64).first().copied().unwrap_or(0) * BLOCK as u64;
        let data_count = data.div_ceil(CHUNK) as u32;
        Ok(Self {
            data,
            leaves: start..start + leaves,
            data_count,
            count: data_count + leaves.div_ceil(CHUNK) as u32,
        })
    }

    /// Where a chunk lies in the file.
    pub(super) fn place(&self, chunk: u32) -> Range<u64> {
        let (start, end, number) = match chunk.checked_sub(self.data_count) {
            None => (0, self.data, chunk),
            Some(leaf) => (self.leaves.start, self.leaves.end, leaf),
        };
        let from = start + u64::from(number) * CHUNK;
        from..(from + CHUNK).min(end)
    }

    pub(super) fn len_of(&self, chunk: u32) -> u64 {
        let place = self.place(chunk);
        place.end - place.start
    }

    /// The chunk of leaves that a data chunk's digests are in; `None` for an image of one block.
    pub(super) fn leaf_of(&self, data_chunk: u32) -> Option<u32> {
        let at = u64::from(data_chunk) * (CHUNK / BLOCK as u64) * DIGEST as u64;
        (!self.leaves.is_empty()).then(|| self.data_count + (at / CHUNK) as u32)
    }
}

/// Why a tree cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TreeError {
    /// The record's numbers are impossible.
    #[error("a hash tree cannot start at byte {0}")]
    Offset(u64),
    /// The tree's head could not be fetched, or is not the sealed one.
    #[error("cannot get the head of the image's hash tree")]
    Fetch(#[from] SourceError),
}

/// The tree's upper levels, checked.
#[derive(Debug)]
pub struct Tree {
    /// Has taken in the salt.
    salted: Sha256,
    data_blocks: u64,
    /// Where the leaf level lies in the file, and its length.
    pub(super) leaves: Range<u64>,
    /// Digests of the leaf level's blocks.
    above_leaves: Vec<u8>,
}

const FANOUT: u64 = (BLOCK / DIGEST) as u64;

impl Tree {
    /// Where the head (superblock and upper levels) of the sealed tree lies in the file.
    pub(super) fn head_place(sealed: &Sealed) -> Result<Range<u64>, TreeError> {
        // An image of more than 4 TiB is a mistake; its chunks' states would not fit.
        let at = sealed.hash_offset;
        if at == 0 || !at.is_multiple_of(BLOCK as u64) || at >> 42 != 0 {
            return Err(TreeError::Offset(at));
        }
        let upper: u64 = levels(at / BLOCK as u64).iter().skip(1).sum();
        Ok(at..at + (1 + upper) * BLOCK as u64)
    }

    /// Where the bytes lie that prove a head: the head itself and, where it has no level that the root could be the
    /// digest of, the one block beside it that the root is the digest of.
    pub(super) fn proof_place(sealed: &Sealed) -> Result<Range<u64>, TreeError> {
        let head = Self::head_place(sealed)?;
        Ok(match levels(sealed.hash_offset / BLOCK as u64).len() {
            0 => 0..head.end,
            1 => head.start..head.end + BLOCK as u64,
            _ => head,
        })
    }

    /// Checks the bytes of [`Self::proof_place`]. `None` if they are another tree's, or its salt is another one: with
    /// that, no right byte would ever look right.
    pub(super) fn proven(sealed: &Sealed, proof: &[u8]) -> Option<Self> {
        let (head, block) = match levels(sealed.hash_offset / BLOCK as u64).len() {
            0 => {
                let (block, head) = proof.split_at_checked(BLOCK)?;
                (head, Some(block))
            }
            1 => {
                let (head, block) = proof.split_at_checked(BLOCK)?;
                (head, Some(block))
            }
            _ => (proof, None),
        };
        let tree = Self::from_head(sealed, head)?;
        let is_right = block.is_none_or(|block| matches(&tree.salted, block, &sealed.root));
        is_right.then_some(tree)
    }

    /// Checks a head against the root. `None` if it is another tree's.
    fn from_head(sealed: &Sealed, head: &[u8]) -> Option<Self> {
        let data_blocks = sealed.hash_offset / BLOCK as u64;
        let levels = levels(data_blocks);
        let salted = Sha256::new_with_prefix(salt(head)?);
        // The levels from the top down, each checked by the one before.
        let mut digests = sealed.root.to_vec();
        let mut rest = head.get(BLOCK..)?;
        for blocks in levels.iter().skip(1).rev() {
            let (level, below) = rest.split_at_checked(*blocks as usize * BLOCK)?;
            if !matches(&salted, level, &digests) {
                return None;
            }
            digests = level.to_vec();
            rest = below;
        }
        let start = sealed.hash_offset + head.len() as u64;
        let leaves = levels.first().copied().unwrap_or(0) * BLOCK as u64;
        rest.is_empty().then_some(Self {
            salted,
            data_blocks,
            leaves: start..start + leaves,
            above_leaves: digests,
        })
    }

    /// Where the digests of the data blocks from `first` on lie in the file; `None` for the tree without leaves, of an
    /// image of one block.
    pub(super) fn leaf_place(&self, first: u64, count: u64) -> Option<Range<u64>> {
        debug_assert!(first + count <= self.data_blocks);
        let start = self.leaves.start + first * DIGEST as u64;
        (!self.leaves.is_empty()).then(|| start..start + count * DIGEST as u64)
    }

    /// Whether `bytes` are whole leaf blocks from `offset` of the file on.
    pub(super) fn leaves_right(&self, offset: u64, bytes: &[u8]) -> bool {
        let from = ((offset - self.leaves.start) / FANOUT) as usize;
        self.above_leaves
            .get(from..)
            .is_some_and(|digests| matches(&self.salted, bytes, digests))
    }

    /// Whether `bytes` are whole data blocks with these digests.
    pub(super) fn data_right(&self, bytes: &[u8], digests: &[u8]) -> bool {
        matches(&self.salted, bytes, digests)
    }

    /// The root, as the digest of an image's only block.
    pub(super) fn only_digest(&self) -> &[u8] {
        &self.above_leaves
    }
}

/// Blocks of each level over so many data blocks, from the leaves up.
fn levels(data_blocks: u64) -> Vec<u64> {
    let mut levels = Vec::new();
    let mut below = data_blocks;
    while below > 1 {
        below = below.div_ceil(FANOUT);
        levels.push(below);
    }
    levels
}

/// Whether each block of `bytes` has the digest that stands in its place; there may be more digests.
fn matches(salted: &Sha256, bytes: &[u8], digests: &[u8]) -> bool {
    let blocks = bytes.chunks_exact(BLOCK);
    let count = blocks.len();
    blocks.remainder().is_empty()
        && digests.len() / DIGEST >= count
        && blocks
            .zip(digests.chunks_exact(DIGEST))
            .all(|(block, digest)| salted.clone().chain_update(block).finalize()[..] == *digest)
}

/// The salt in a verity superblock. It need not be trusted: with another one nothing matches the root, which is seen
/// before it is used.
fn salt(head: &[u8]) -> Option<&[u8]> {
    let known =
        head.starts_with(b"verity\0\0\x01\0\0\0\x01\0\0\0") && head[32..].starts_with(b"sha256\0");
    let len = usize::from(u16::from_le_bytes([*head.get(80)?, *head.get(81)?]));
    let salt = head.get(88..88 + len)?;
    (known && len <= 256).then_some(salt)
}
