//! The superblock and where the tables lie: back to back, each of as many full metadata blocks as its records need.

use super::{CheckError, In, Limits};
use crate::format::{
    ABSENT, CompressorOptions, FLAG_COMPRESSOR_OPTIONS, FragmentEntry, METADATA_SIZE, MetaHeader,
    Superblock, XattrId, XattrIdTable,
};
use crate::read::{ReadAt, Reader, Region};

/// All flags of the format; bit 2 is the old "check data" flag, never set.
const KNOWN_FLAGS: u16 = 0x0ffb;

/// Facts about a well laid out image.
#[derive(Debug)]
pub(super) struct Layout {
    /// Data and fragment blocks.
    pub(super) data: Region,
    /// Blocks of the directory table.
    pub(super) dirs: Region,
    /// Where each block of the directory table starts, from the table's start.
    pub(super) dir_blocks: Vec<u32>,
    /// Bytes of the directory table when decoded.
    pub(super) dir_bytes: u64,
}

pub(super) fn check<S: ReadAt>(reader: &Reader<S>, limits: &Limits) -> Result<Layout, CheckError> {
    let sb = reader.superblock();
    let part = || "superblock".to_owned();
    if sb.inode_count > limits.max_inodes {
        return Err(CheckError::forbidden(
            part(),
            format!("a count of {} inodes", sb.inode_count),
        ));
    }
    if sb.flags & !KNOWN_FLAGS != 0 {
        return Err(CheckError::broken(
            part(),
            "a flag is set that nobody knows",
        ));
    }
    let data_start = check_options(reader, sb)?;
    if data_start > sb.inode_table {
        return Err(CheckError::broken(
            part(),
            "the inode table begins before the data area",
        ));
    }
    let inodes = Region {
        start: sb.inode_table,
        end: sb.directory_table,
    };
    walk_blocks(reader, "inode table", inodes, |_| Ok(()))?;

    // From the directory table on, each table starts where the one before it ends.
    let mut tables = Tables { reader, at: 0 };
    let fragments = (sb.fragment_count > 0).then_some(sb.fragment_table);
    let exports = (sb.export_table != ABSENT).then_some(sb.export_table);
    let first_list = fragments.or(exports).unwrap_or(sb.id_table);
    let first_count = match (fragments, exports) {
        (Some(_), _) => u64::from(sb.fragment_count) * FragmentEntry::LEN as u64,
        (None, Some(_)) => u64::from(sb.inode_count) * 8,
        (None, None) => u64::from(sb.id_count) * 4,
    };
    let after_dirs = match first_count {
        0 => first_list,
        _ => reader
            .pointer(first_list, 0)
            .within(|| "list of a lookup table".into())?,
    };
    if after_dirs < sb.directory_table || after_dirs > first_list {
        return Err(CheckError::broken(
            "directory table",
            "it does not end where the next table begins",
        ));
    }
    let dirs = Region {
        start: sb.directory_table,
        end: after_dirs,
    };
    let mut dir_blocks = Vec::new();
    let dir_bytes = walk_blocks(reader, "directory table", dirs, |at| {
        let relative = u32::try_from(at - dirs.start).map_err(|_| {
            CheckError::broken("directory table", "it is longer than references reach")
        })?;
        dir_blocks.push(relative);
        Ok(())
    })?;
    tables.at = dirs.end;
    if sb.fragment_count > 0 {
        let bytes = u64::from(sb.fragment_count) * FragmentEntry::LEN as u64;
        tables.lookup("fragment table", sb.fragment_table, bytes)?;
    } else if sb.fragment_table != ABSENT && sb.fragment_table != tables.at {
        return Err(CheckError::broken(
            "fragment table",
            "it is empty and has a place of its own",
        ));
    }
    if sb.export_table != ABSENT {
        tables.lookup(
            "export table",
            sb.export_table,
            u64::from(sb.inode_count) * 8,
        )?;
    }
    tables.lookup("id table", sb.id_table, u64::from(sb.id_count) * 4)?;
    check_ids(reader)?;
    if let Some(xattrs) = reader.xattrs() {
        if xattrs.pairs.start != tables.at {
            return Err(CheckError::broken(
                "xattr table",
                "it does not begin where the id table ends",
            ));
        }
        let bytes = u64::from(xattrs.count) * XattrId::LEN as u64;
        let sets_start = match xattrs.count {
            0 => sb.xattr_table,
            _ => reader
                .pointer(xattrs.sets.list, 0)
                .within(|| "list of the xattr table".into())?,
        };
        let pairs = Region {
            start: xattrs.pairs.start,
            end: sets_start,
        };
        if sets_start < pairs.start || sets_start > sb.xattr_table {
            return Err(CheckError::broken("xattr table", "its sets lie outside it"));
        }
        walk_blocks(reader, "xattr table", pairs, |_| Ok(()))?;
        tables.at = sets_start;
        tables.blocks("xattr table", sb.xattr_table, xattrs.sets.list, bytes)?;
        tables.at += XattrIdTable::LEN as u64;
    }
    if tables.at != sb.bytes_used {
        return Err(CheckError::broken(
            part(),
            "the image does not end where its last table ends",
        ));
    }
    Ok(Layout {
        data: Region {
            start: data_start,
            end: sb.inode_table,
        },
        dirs,
        dir_blocks,
        dir_bytes,
    })
}

fn check_options<S: ReadAt>(reader: &Reader<S>, sb: &Superblock) -> Result<u64, CheckError> {
    let at = Superblock::LEN as u64;
    if sb.flags & FLAG_COMPRESSOR_OPTIONS == 0 {
        return Ok(at);
    }
    let part = || "compressor options".to_owned();
    // The longest options are gzip's 8 bytes.
    let mut bytes = [0u8; MetaHeader::LEN + 8];
    reader.read_source(&mut bytes, at).within(part)?;
    let header = MetaHeader::from_raw(u16::from_le_bytes([bytes[0], bytes[1]])).within(part)?;
    let len = MetaHeader::LEN + usize::from(header.size);
    let Some(bytes) = bytes.get(..len).filter(|_| !header.compressed) else {
        return Err(CheckError::broken(
            part(),
            "they are longer than any compressor's",
        ));
    };
    CompressorOptions::decode(sb, bytes).within(part)?;
    Ok(at + len as u64)
}

fn check_ids<S: ReadAt>(reader: &Reader<S>) -> Result<(), CheckError> {
    match reader.ids().contains(&u32::MAX) {
        true => Err(CheckError::broken(
            "id table",
            "no owner has the number 4294967295",
        )),
        false => Ok(()),
    }
}

/// Walks the tables behind the directory table.
struct Tables<'a, S> {
    reader: &'a Reader<S>,
    /// Where the next table must begin.
    at: u64,
}

impl<S: ReadAt> Tables<'_, S> {
    /// A table whose superblock field is its list.
    fn lookup(&mut self, name: &'static str, list: u64, bytes: u64) -> Result<(), CheckError> {
        self.blocks(name, list, list, bytes)
    }

    /// A table of `bytes` decoded bytes whose blocks end at `end` and are listed from `list` on.
    fn blocks(
        &mut self,
        name: &'static str,
        end: u64,
        list: u64,
        bytes: u64,
    ) -> Result<(), CheckError> {
        let region = Region {
            start: self.at,
            end,
        };
        let mut count = 0;
        let decoded = walk_blocks(self.reader, name, region, |at| {
            let listed = self.reader.pointer(list, count).within(|| name.into())?;
            count += 1;
            match listed == at {
                true => Ok(()),
                false => Err(CheckError::broken(
                    name,
                    "its list names other blocks than it has",
                )),
            }
        })?;
        if decoded != bytes {
            return Err(CheckError::broken(
                name,
                "its length does not fit its count of records",
            ));
        }
        self.at = end + count * 8;
        Ok(())
    }
}

/// Decodes every block of a table: all are full but the last, and they end where the table ends. Gives the table's
/// decoded length.
fn walk_blocks<S: ReadAt>(
    reader: &Reader<S>,
    name: &'static str,
    region: Region,
    mut visit: impl FnMut(u64) -> Result<(), CheckError>,
) -> Result<u64, CheckError> {
    if region.start > region.end {
        return Err(CheckError::broken(name, "it ends before it begins"));
    }
    let mut decoded = 0;
    let mut at = region.start;
    while at < region.end {
        visit(at)?;
        let block = reader
            .load_meta_block(at, region.end)
            .within(|| name.into())?;
        if block.next < region.end && block.data.len() != METADATA_SIZE {
            return Err(CheckError::broken(
                name,
                "a metadata block in its middle is not full",
            ));
        }
        decoded += block.data.len() as u64;
        at = block.next;
    }
    match at == region.end {
        true => Ok(decoded),
        false => Err(CheckError::broken(
            name,
            "its last block reaches into what follows",
        )),
    }
}
