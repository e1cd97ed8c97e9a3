//! The root of an image's hash tree, made anew from the image's data: dm-verity's format 1 with SHA-256 and blocks of
//! 4 KiB (docs/FORMATS.md, `squashfs/src/verity.rs`).
//!
//! Of the tree that is stored nothing is read but the salt, and that need not be trusted: it goes before every block of
//! one length, so with another one, or of another length, the root is another.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use sha2::{Digest, Sha256};

const BLOCK: usize = 4096;
const DIGEST: usize = 32;
const FANOUT: u64 = (BLOCK / DIGEST) as u64;
/// Bytes that are read at a time, in whole blocks.
const PART: usize = 1 << 20;
/// An image of more than 4 TiB is a mistake.
const MOST: u64 = 1 << 42;

/// How many bytes an image has whose SquashFS part has `data` bytes; `None` if no image has so many.
pub(crate) fn file_len(data: u64) -> Option<u64> {
    if data == 0 || !data.is_multiple_of(BLOCK as u64) || data > MOST {
        return None;
    }
    let blocks: u64 = levels(data / BLOCK as u64).iter().sum();
    Some(data + (1 + blocks) * BLOCK as u64)
}

/// The root of the tree over the first `data` bytes of a file. `None` where no superblock follows them.
///
/// # Errors
/// The file's; one that is too short ends early.
pub(crate) fn root_of(file: &File, data: u64) -> io::Result<Option<[u8; DIGEST]>> {
    let mut head = [0; BLOCK];
    file.read_exact_at(&mut head, data)?;
    let Some(salt) = salt(&head) else {
        return Ok(None);
    };
    let mut tree = Tree::new(salt, data / BLOCK as u64);
    let mut part = vec![0; PART];
    let mut at = 0;
    while at < data {
        let len = (data - at).min(PART as u64);
        let part = &mut part[..len as usize];
        file.read_exact_at(part, at)?;
        part.chunks(BLOCK).for_each(|block| tree.block(block));
        at += len;
    }
    Ok(Some(tree.finish()))
}

/// The salt in a superblock of the one kind that Berth makes.
fn salt(head: &[u8; BLOCK]) -> Option<&[u8]> {
    let known =
        head.starts_with(b"verity\0\0\x01\0\0\0\x01\0\0\0") && head[32..].starts_with(b"sha256\0");
    let len = usize::from(u16::from_le_bytes([head[80], head[81]]));
    (known && len <= 256).then(|| &head[88..88 + len])
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

/// A tree that grows with its data. Of each level only the block that is not full yet is kept.
struct Tree {
    /// Has taken in the salt.
    salted: Sha256,
    open: Vec<Vec<u8>>,
    root: [u8; DIGEST],
}

impl Tree {
    fn new(salt: &[u8], data_blocks: u64) -> Self {
        let level = |_| Vec::with_capacity(BLOCK);
        Self {
            salted: Sha256::new_with_prefix(salt),
            open: levels(data_blocks).into_iter().map(level).collect(),
            root: [0; DIGEST],
        }
    }

    fn block(&mut self, block: &[u8]) {
        let digest = self.digest(block);
        self.put(0, digest);
    }

    /// Adds a digest to a level's open block; above the last level it is the root.
    fn put(&mut self, mut level: usize, mut digest: [u8; DIGEST]) {
        while let Some(open) = self.open.get_mut(level) {
            open.extend_from_slice(&digest);
            if open.len() < BLOCK {
                return;
            }
            digest = self.close(level);
            level += 1;
        }
        self.root = digest;
    }

    /// The digest of a level's open block, padded with zeros; the next one is begun.
    fn close(&mut self, level: usize) -> [u8; DIGEST] {
        let mut block = std::mem::take(&mut self.open[level]);
        block.resize(BLOCK, 0);
        let digest = self.digest(&block);
        block.clear();
        self.open[level] = block;
        digest
    }

    fn finish(mut self) -> [u8; DIGEST] {
        for level in 0..self.open.len() {
            if !self.open[level].is_empty() {
                let digest = self.close(level);
                self.put(level + 1, digest);
            }
        }
        self.root
    }

    fn digest(&self, block: &[u8]) -> [u8; DIGEST] {
        self.salted.clone().chain_update(block).finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    /// An image of so many blocks that differ, with the tree that `veritysetup` makes; `None` without that program.
    fn sealed(blocks: u64, salt: &str) -> Option<(File, u64, String)> {
        let data = blocks * BLOCK as u64;
        let image = tempfile::NamedTempFile::new().unwrap();
        for at in 0..blocks {
            image
                .as_file()
                .write_all_at(&at.to_le_bytes(), at * BLOCK as u64 + 8)
                .unwrap();
        }
        image.as_file().set_len(data).unwrap();
        let made = Command::new("veritysetup")
            .args(["format", &format!("--hash-offset={data}")])
            .arg(format!("--salt={salt}"))
            .args([image.path(), image.path()])
            .output();
        let Ok(made) = made else {
            assert!(std::env::var_os("CI").is_none(), "CI has veritysetup");
            eprintln!("left out: needs veritysetup");
            return None;
        };
        assert!(made.status.success(), "{made:?}");
        let said = String::from_utf8(made.stdout).unwrap();
        let root = said.lines().find_map(|l| l.strip_prefix("Root hash:"));
        let root = root.unwrap().trim().to_owned();
        Some((image.reopen().unwrap(), data, root))
    }

    fn hex(root: [u8; DIGEST]) -> String {
        root.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_root_is_the_one_that_veritysetup_makes() {
        let salts = ["-".to_owned(), "ab".repeat(32), "07".repeat(256)];
        for blocks in [
            1,
            2,
            127,
            128,
            129,
            255,
            256,
            257,
            600,
            16384,
            16385,
            16384 + 129,
        ] {
            for salt in &salts {
                let Some((file, data, root)) = sealed(blocks, salt) else {
                    return;
                };
                let found = root_of(&file, data).unwrap().unwrap();
                assert_eq!(hex(found), root, "{blocks} blocks, salt {salt}");
                let len = file.metadata().unwrap().len();
                assert_eq!(file_len(data), Some(len), "{blocks} blocks");
                if blocks > 600 {
                    break;
                }
            }
        }
    }

    #[test]
    fn every_bit_of_the_data_and_of_the_salt_counts_and_the_stored_tree_does_not() {
        let Some((file, data, root)) = sealed(300, &"ab".repeat(32)) else {
            return;
        };
        let with = |at: u64| {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at).unwrap();
            file.write_all_at(&[byte[0] ^ 1], at).unwrap();
            let found = root_of(&file, data).unwrap();
            file.write_all_at(&byte, at).unwrap();
            found.map(hex)
        };
        for at in [0, 4095, 128 * 4096, 299 * 4096, data - 1, data + 88] {
            assert!(with(at).is_some_and(|found| found != root), "{at}");
        }
        // A superblock of another kind, or a salt that is too long.
        for at in [data, data + 8, data + 12, data + 32] {
            assert_eq!(with(at), None, "{at}");
        }
        file.write_all_at(&[1, 1], data + 80).unwrap();
        assert_eq!(root_of(&file, data).unwrap(), None);
        file.write_all_at(&[32, 0], data + 80).unwrap();
        assert_eq!(with(data + 4096), Some(root));
    }

    #[test]
    fn what_is_too_short_or_of_no_image_s_length_is_told() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let short = root_of(&file, 8192).unwrap_err();
        assert_eq!(short.kind(), io::ErrorKind::UnexpectedEof);
        for data in [0, 1, 4095, 4097, MOST + 4096, u64::MAX] {
            assert_eq!(file_len(data), None, "{data}");
        }
        assert_eq!(file_len(4096), Some(8192));
        assert_eq!(file_len(8192), Some(4 * 4096));
    }
}
