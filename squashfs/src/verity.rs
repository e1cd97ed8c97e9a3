//! The dm-verity tree behind an image: format version 1 as `veritysetup` and the kernel read it, with
//! SHA-256 and 4 KiB data and hash blocks.
//!
//! ```text
//! hash_offset          superblock (512 bytes, zeros up to 4,096)
//! hash_offset + 4096   top level (one block), …, leaf level
//! ```
//! A digest is `SHA-256(salt || block)`; 128 of them, padded with zeros, make a block of the level above;
//! the root is the digest of the top block (of the one data block, when there is but one). `hash_offset`
//! is the data's length, a multiple of 4,096.
//! Source: `Documentation/admin-guide/device-mapper/verity.rst` and cryptsetup's verity format page.
//!
//! The leaf level (1/128 of the data) is collected while the data goes out, so nothing is read again.

use std::io;
use std::sync::Arc;

use sha2::{Digest, Sha256};

use crate::spill::Spill;

/// Bytes of a data block and of a hash block.
pub const BLOCK: usize = 4096;
/// Bytes of a digest.
pub const DIGEST: usize = 32;
const FANOUT: usize = BLOCK / DIGEST;

/// What identifies and salts a tree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VerityOptions {
    /// Goes before every block that is hashed.
    pub salt: [u8; 32],
    /// In the superblock only.
    pub uuid: [u8; 16],
}

/// The leaf level of a tree that is being made: the digests of all data blocks, in order.
///
/// Invariant: `memory` holds the last digests; earlier ones are in the spill file, in pieces of `keep` bytes.
#[derive(Debug)]
pub struct Leaves {
    /// Has taken in the salt.
    salted: Sha256,
    options: VerityOptions,
    memory: Vec<u8>,
    keep: usize,
    spill: Option<Arc<Spill>>,
    spilled: Vec<u64>,
}

impl Leaves {
    /// Without a spill file all digests stay in memory: 1/128 of the data. With one, no more than `keep`
    /// bytes (a multiple of [`BLOCK`]) do.
    pub(crate) fn new(options: VerityOptions, keep: usize, spill: Option<Arc<Spill>>) -> Self {
        debug_assert!(keep > 0 && keep.is_multiple_of(BLOCK));
        let salted = Sha256::new_with_prefix(options.salt);
        Self {
            salted,
            options,
            memory: Vec::new(),
            keep,
            spill,
            spilled: Vec::new(),
        }
    }

    /// Adds the next data block, which must be [`BLOCK`] bytes long.
    pub fn add(&mut self, block: &[u8]) -> io::Result<()> {
        self.memory.extend_from_slice(&self.digest(block));
        if let Some(spill) = self
            .spill
            .as_ref()
            .filter(|_| self.memory.len() == self.keep)
        {
            self.spilled.push(spill.put(&self.memory)?);
            self.memory.clear();
        }
        Ok(())
    }

    /// Puts another block in the place of the first one, which must have been added.
    pub fn replace_first(&mut self, block: &[u8]) -> io::Result<()> {
        let digest = self.digest(block);
        match (&self.spill, self.spilled.first()) {
            (Some(spill), Some(&first)) => spill.patch(first, &digest),
            _ => {
                self.memory[..DIGEST].copy_from_slice(&digest);
                Ok(())
            }
        }
    }

    /// Writes the superblock and the tree and returns the root digest. At least one block is needed.
    pub fn write_tree(
        mut self,
        mut out: impl FnMut(&[u8]) -> io::Result<()>,
    ) -> io::Result<[u8; DIGEST]> {
        let data_blocks = (self.spilled.len() * self.keep + self.memory.len()) / DIGEST;
        assert!(data_blocks > 0, "a tree is over something");
        out(&superblock(&self.options, data_blocks as u64))?;
        if data_blocks == 1 {
            let mut root = [0; DIGEST];
            root.copy_from_slice(&self.memory);
            return Ok(root);
        }
        pad(&mut self.memory);
        // From the level above the leaves up: 1/128 of them, and less.
        let mut levels = Vec::new();
        let mut level = Vec::new();
        self.for_each_part(|part| {
            part.chunks_exact(BLOCK)
                .for_each(|block| level.extend_from_slice(&self.digest(block)));
            Ok(())
        })?;
        while level.len() > DIGEST {
            pad(&mut level);
            let above = level
                .chunks_exact(BLOCK)
                .flat_map(|block| self.digest(block))
                .collect();
            levels.push(std::mem::replace(&mut level, above));
        }
        for level in levels.iter().rev() {
            out(level)?;
        }
        self.for_each_part(&mut out)?;
        let mut root = [0; DIGEST];
        root.copy_from_slice(&level);
        Ok(root)
    }

    /// All leaves in order, in whole blocks.
    fn for_each_part(&self, mut each: impl FnMut(&[u8]) -> io::Result<()>) -> io::Result<()> {
        if let Some(spill) = &self.spill {
            let mut part = vec![
                0;
                if self.spilled.is_empty() {
                    0
                } else {
                    self.keep
                }
            ];
            for &at in &self.spilled {
                spill.get(at, &mut part)?;
                each(&part)?;
            }
        }
        each(&self.memory)
    }

    fn digest(&self, block: &[u8]) -> [u8; DIGEST] {
        debug_assert_eq!(block.len(), BLOCK);
        self.salted.clone().chain_update(block).finalize().into()
    }
}

/// Bytes that superblock and tree take behind `data_len` bytes (a multiple of [`BLOCK`]).
pub fn tree_len(data_len: u64) -> u64 {
    let (mut blocks, mut total) = (data_len / BLOCK as u64, 1);
    while blocks > 1 {
        blocks = blocks.div_ceil(FANOUT as u64);
        total += blocks;
    }
    total * BLOCK as u64
}

fn pad(level: &mut Vec<u8>) {
    level.resize(level.len().next_multiple_of(BLOCK), 0);
}

fn superblock(options: &VerityOptions, data_blocks: u64) -> [u8; BLOCK] {
    let mut sb = [0; BLOCK];
    let mut at = 0;
    let mut put = |bytes: &[u8], room: usize| {
        sb[at..at + bytes.len()].copy_from_slice(bytes);
        at += room;
    };
    put(b"verity", 8);
    put(&1u32.to_le_bytes(), 4); // version of the superblock
    put(&1u32.to_le_bytes(), 4); // hash type: salt first
    put(&options.uuid, 16);
    put(b"sha256", 32);
    put(&(BLOCK as u32).to_le_bytes(), 4); // data block
    put(&(BLOCK as u32).to_le_bytes(), 4); // hash block
    put(&data_blocks.to_le_bytes(), 8);
    put(&(options.salt.len() as u16).to_le_bytes(), 8); // and 6 bytes of nothing
    put(&options.salt, 256);
    sb
}

#[cfg(test)]
mod tests {
    use super::*;

    const OPTIONS: VerityOptions = VerityOptions {
        salt: [7; 32],
        uuid: [9; 16],
    };

    fn tree(blocks: usize, spill: Option<Spill>) -> (Vec<u8>, [u8; 32]) {
        let mut leaves = Leaves::new(OPTIONS, 2 * BLOCK, spill.map(Arc::new));
        for i in 0..blocks {
            leaves.add(&[i as u8; BLOCK]).unwrap();
        }
        leaves.replace_first(&[1; BLOCK]).unwrap();
        let mut out = Vec::new();
        let root = leaves.write_tree(|part| {
            out.extend_from_slice(part);
            Ok(())
        });
        (out, root.unwrap())
    }

    #[test]
    fn a_tree_is_as_long_as_foretold_and_the_same_with_a_spill_file() {
        for blocks in [1, 2, 127, 128, 129, 255, 256, 257, 128 * 128, 128 * 128 + 1] {
            let (bytes, root) = tree(blocks, None);
            assert_eq!(
                bytes.len() as u64,
                tree_len((blocks * BLOCK) as u64),
                "{blocks} blocks"
            );
            assert!(
                tree(blocks, Some(Spill::new(tempfile::tempfile().unwrap()))) == (bytes, root),
                "{blocks} blocks"
            );
        }
    }

    #[test]
    fn one_block_is_its_own_root() {
        let (bytes, root) = tree(1, None);
        assert_eq!(
            root,
            *Sha256::new_with_prefix([7; 32])
                .chain_update([1; BLOCK])
                .finalize()
        );
        assert_eq!(&bytes[..8], b"verity\0\0");
    }
}
