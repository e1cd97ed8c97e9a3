//! The end of an image: inodes and listings folder by folder, then every table, then the superblock.

use super::contents::Appended;
use super::inodes::InodeTables;
use super::metadata::table;
use super::plan::Plan;
use super::tree::Tree;
use super::{Finished, Settings, WriteError};
use crate::compress::Compression;
use crate::format::{
    ABSENT, CompressorOptions, FLAG_COMPRESSOR_OPTIONS, FLAG_DUPLICATES, FLAG_EXPORTABLE,
    FragmentEntry, Superblock, XattrIdTable, put32, put64,
};

/// Superblock space and compressor options: what the image file begins with.
pub(super) fn opening(settings: &Settings) -> Vec<u8> {
    let mut out = vec![0; Superblock::LEN];
    if let Some(options) = compressor_options(settings) {
        options.encode(&mut out);
    }
    out
}

/// Told only when they are not what a reader of the format takes for granted.
fn compressor_options(settings: &Settings) -> Option<CompressorOptions> {
    let level = settings.level as u32;
    match settings.compression {
        Compression::Zstd if level != 15 => Some(CompressorOptions::Zstd { level }),
        Compression::Gzip if level != 9 => Some(CompressorOptions::Gzip {
            level,
            window: 15,
            strategies: 0,
        }),
        Compression::Lz4 => Some(CompressorOptions::Lz4 {
            version: 1,
            flags: 0,
        }),
        _ => None,
    }
}

/// Writes everything behind the data, and the superblock.
pub(super) fn finish(
    settings: &Settings,
    mut appended: Appended,
    mut tree: Tree,
) -> Result<Finished, WriteError> {
    tree.sort();
    let plan = Plan::new(&tree)?;
    let inodes = InodeTables::write(settings, &appended, &tree, &plan)?;
    let inode_count = inodes.places.len() as u32;
    let fragments = std::mem::take(&mut appended.fragments);
    let InodeTables {
        mut compressor,
        inodes,
        directories,
        places,
        ids,
        xattrs,
        root,
        ..
    } = inodes;
    let compressor = &mut compressor;
    let mut out = appended.output;

    let inode_table = out.position();
    out.append(&inodes.finish(compressor)?.0)?;
    let directory_table = out.position();
    out.append(&directories.finish(compressor)?.0)?;

    let mut records = Vec::new();
    let mut write_table = |records: &mut Vec<u8>| {
        let (bytes, list) = table(compressor, records, out.position())?;
        records.clear();
        out.append(&bytes)?;
        Ok::<u64, WriteError>(list)
    };
    let mut fragment_table = ABSENT;
    if !fragments.is_empty() {
        fragments
            .iter()
            .for_each(|entry: &FragmentEntry| entry.encode(&mut records));
        fragment_table = write_table(&mut records)?;
    }
    places.iter().for_each(|place| put64(&mut records, *place));
    let export_table = write_table(&mut records)?;
    let id_count = ids.list.len() as u16;
    ids.list.iter().for_each(|id| put32(&mut records, *id));
    let id_table = write_table(&mut records)?;

    let mut xattr_table = ABSENT;
    if !xattrs.is_empty() {
        let start = out.position();
        let (key_values, records) = xattrs.encode(compressor, &tree)?;
        out.append(&key_values)?;
        let (mut bytes, list) = table(compressor, &records, out.position())?;
        xattr_table = list;
        // The head of the list comes between the blocks and the list.
        let offsets = bytes.split_off((list - out.position()) as usize);
        XattrIdTable {
            key_values: start,
            count: xattrs.len(),
        }
        .encode(&mut bytes);
        bytes.extend_from_slice(&offsets);
        out.append(&bytes)?;
    }

    let squashfs_size = out.position();
    let options = if compressor_options(settings).is_some() {
        FLAG_COMPRESSOR_OPTIONS
    } else {
        0
    };
    let mut superblock = Vec::with_capacity(Superblock::LEN);
    Superblock {
        inode_count,
        mkfs_time: settings.mkfs_time,
        block_size: settings.block_size,
        fragment_count: fragments.len() as u32,
        compression: settings.compression,
        flags: FLAG_DUPLICATES | FLAG_EXPORTABLE | options,
        id_count,
        root_inode: root,
        bytes_used: squashfs_size,
        id_table,
        xattr_table,
        inode_table,
        directory_table,
        fragment_table,
        export_table,
    }
    .encode(&mut superblock);
    let sealed = out.seal(&superblock)?;
    Ok(Finished {
        squashfs_size,
        hash_offset: sealed.hash_offset,
        verity_root: sealed.verity_root,
        file_size: sealed.file_size,
        inodes: inode_count,
    })
}
