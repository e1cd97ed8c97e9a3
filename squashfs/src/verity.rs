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

use sha2::{Digest, Sha256};

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

/// Hashes blocks; cheap to clone.
#[derive(Debug, Clone)]
pub struct BlockHasher(Sha256);

impl BlockHasher {
    /// A hasher with this salt.
    pub fn new(salt: &[u8]) -> Self {
        Self(Sha256::new_with_prefix(salt))
    }

    /// The digest of one block, which must be [`BLOCK`] bytes long.
    pub fn digest(&self, block: &[u8]) -> [u8; DIGEST] {
        debug_assert_eq!(block.len(), BLOCK);
        self.0.clone().chain_update(block).finalize().into()
    }
}

/// Writes the superblock and the tree over `leaves` (the digests of all data blocks, one after another)
/// and returns the root digest. At least one leaf is needed.
pub fn write_tree(
    options: &VerityOptions,
    mut leaves: Vec<u8>,
    mut out: impl FnMut(&[u8]) -> io::Result<()>,
) -> io::Result<[u8; DIGEST]> {
    let data_blocks = leaves.len() / DIGEST;
    assert!(
        data_blocks > 0 && leaves.len().is_multiple_of(DIGEST),
        "leaves are whole digests"
    );
    let hasher = BlockHasher::new(&options.salt);
    out(&superblock(options, data_blocks as u64))?;
    if data_blocks == 1 {
        let mut root = [0; DIGEST];
        root.copy_from_slice(&leaves);
        return Ok(root);
    }
    pad(&mut leaves);
    let mut levels = vec![leaves];
    while let Some(below) = levels.last().filter(|level| level.len() > BLOCK) {
        let mut level = Vec::with_capacity((below.len() / FANOUT).next_multiple_of(BLOCK));
        below
            .chunks_exact(BLOCK)
            .for_each(|block| level.extend_from_slice(&hasher.digest(block)));
        pad(&mut level);
        levels.push(level);
    }
    for level in levels.iter().rev() {
        out(level)?;
    }
    Ok(levels.last().map_or([0; DIGEST], |top| hasher.digest(top)))
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

    fn tree(blocks: usize) -> (Vec<u8>, [u8; 32]) {
        let hasher = BlockHasher::new(&OPTIONS.salt);
        let leaves = (0..blocks)
            .flat_map(|i| hasher.digest(&[i as u8; BLOCK]))
            .collect();
        let mut out = Vec::new();
        let root = write_tree(&OPTIONS, leaves, |part| {
            out.extend_from_slice(part);
            Ok(())
        });
        (out, root.unwrap())
    }

    #[test]
    fn a_tree_is_as_long_as_foretold() {
        for blocks in [1, 2, 127, 128, 129, 128 * 128, 128 * 128 + 1] {
            assert_eq!(
                tree(blocks).0.len() as u64,
                tree_len((blocks * BLOCK) as u64),
                "{blocks} blocks"
            );
        }
    }

    #[test]
    fn one_block_is_its_own_root() {
        let (bytes, root) = tree(1);
        assert_eq!(root, BlockHasher::new(&OPTIONS.salt).digest(&[0; BLOCK]));
        assert_eq!(&bytes[..8], b"verity\0\0");
    }
}
