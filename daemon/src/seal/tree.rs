//! Whether the hash tree behind an image is one, level by level, in constant memory (format: [`verity`]).

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;

use berth_squashfs::verity::{self, BLOCK, DIGEST, VerityOptions};
use sha2::{Digest as _, Sha256};

const FANOUT: u64 = (BLOCK / DIGEST) as u64;

/// Checks the superblock and every level against the one below it, and gives the root. With `contents` the leaves are
/// checked against the data too; without, leaves that do not fit make an image that cannot be read where verity is
/// used, and that no reader takes for another.
pub(super) fn check(
    file: &File,
    hash_offset: u64,
    options: &VerityOptions,
    contents: bool,
) -> io::Result<[u8; DIGEST]> {
    let blocks = hash_offset / BLOCK as u64;
    let mut found = [0; BLOCK];
    file.read_exact_at(&mut found, hash_offset)?;
    if found != superblock(options, blocks) {
        return Err(broken("its superblock is not the expected one"));
    }
    // (offset, blocks) of each level: the data, the leaves, and up to the top.
    let mut levels = vec![(0, blocks)];
    let mut end = hash_offset + verity::tree_len(hash_offset);
    while let Some(&(_, below)) = levels.last().filter(|(_, blocks)| *blocks > 1) {
        let count = below.div_ceil(FANOUT);
        end -= count * BLOCK as u64;
        levels.push((end, count));
    }
    let salted = Sha256::new_with_prefix(options.salt);
    let first = usize::from(!contents);
    for pair in levels.windows(2).skip(first) {
        check_level(file, &salted, pair[0], pair[1])?;
    }
    let top = levels.last().map_or(0, |(offset, _)| *offset);
    file.read_exact_at(&mut found, top)?;
    Ok(salted.chain_update(found).finalize().into())
}

fn check_level(
    file: &File,
    salted: &Sha256,
    (below, count): (u64, u64),
    (above, _): (u64, u64),
) -> io::Result<()> {
    let mut blocks = vec![0; BLOCK * FANOUT as usize];
    let mut digests = [0; BLOCK];
    let mut expected = Vec::with_capacity(BLOCK);
    for (index, first) in (0..count).step_by(FANOUT as usize).enumerate() {
        let take = FANOUT.min(count - first) as usize * BLOCK;
        file.read_exact_at(&mut blocks[..take], below + first * BLOCK as u64)?;
        file.read_exact_at(&mut digests, above + (index * BLOCK) as u64)?;
        expected.clear();
        for block in blocks[..take].chunks_exact(BLOCK) {
            expected.extend_from_slice(&salted.clone().chain_update(block).finalize());
        }
        expected.resize(BLOCK, 0);
        if expected != digests {
            return Err(broken("a level does not fit the one below it"));
        }
    }
    Ok(())
}

fn superblock(options: &VerityOptions, blocks: u64) -> [u8; BLOCK] {
    let mut sb = [0; BLOCK];
    let block = (BLOCK as u32).to_le_bytes();
    for (at, bytes) in [
        (0, &b"verity\0\0"[..]),
        (8, &1u32.to_le_bytes()),
        (12, &1u32.to_le_bytes()),
        (16, &options.uuid),
        (32, b"sha256"),
        (64, &block),
        (68, &block),
        (72, &blocks.to_le_bytes()),
        (80, &(options.salt.len() as u16).to_le_bytes()),
        (88, &options.salt),
    ] {
        sb[at..at + bytes.len()].copy_from_slice(bytes);
    }
    sb
}

fn broken(why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

#[cfg(test)]
mod tests {
    use super::*;
    use berth_squashfs::write::{ImageWriter, Meta, Tree, WriteOptions};

    const OPTIONS: VerityOptions = VerityOptions {
        salt: [3; 32],
        uuid: [4; 16],
    };

    /// An image with `bytes` bytes of data, its hash offset and root.
    fn image(bytes: usize) -> (File, u64, [u8; 32]) {
        let file = tempfile::tempfile().unwrap();
        let options = WriteOptions {
            verity: Some(OPTIONS),
            ..WriteOptions::default()
        };
        let mut writer = ImageWriter::new(file.try_clone().unwrap(), options).unwrap();
        let mut lane = writer.lane();
        let mut state = 1u32;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 24) as u8
        })
        .take(bytes)
        .collect();
        lane.write(&noise).unwrap();
        lane.end_file().unwrap();
        lane.close().unwrap();
        let done = writer.finish(Tree::new(Meta::default())).unwrap();
        (file, done.hash_offset.unwrap(), done.verity_root.unwrap())
    }

    #[test]
    fn every_touched_level_is_noticed() {
        for bytes in [0, 5000, 3 << 20] {
            let (file, hash_offset, root) = image(bytes);
            let size = file.metadata().unwrap().len();
            assert_eq!(size, hash_offset + verity::tree_len(hash_offset));
            assert_eq!(check(&file, hash_offset, &OPTIONS, true).unwrap(), root);
            assert_eq!(check(&file, hash_offset, &OPTIONS, false).unwrap(), root);
            // The superblock, the top level (its root changes), the leaves, the data.
            for (at, contents) in [
                (hash_offset + 90, false),
                (size - 4000, false),
                (4000, true),
            ] {
                let mut byte = [0];
                file.read_exact_at(&mut byte, at).unwrap();
                file.write_all_at(&[byte[0] ^ 1], at).unwrap();
                let found = check(&file, hash_offset, &OPTIONS, contents);
                assert!(!found.is_ok_and(|r| r == root), "{bytes} bytes, {at}");
                file.write_all_at(&byte, at).unwrap();
            }
        }
    }
}
