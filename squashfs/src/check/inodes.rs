//! Every inode of the inode table, in the order they lie there, once.

use super::layout::Layout;
use super::{CheckError, In, Limits, files};
use crate::format::{DirIndex, InodeBody, InodeType, MetaRef};
use crate::read::{Inode, MetaPos, ReadAt, Reader};

/// What the walk remembers of an inode: its place (6 bytes), its type, and links or parent.
pub const BYTES_PER_INODE: usize = 11;

/// What is known of the inodes after the table was read; indexed by inode number less one.
#[derive(Debug)]
pub(super) struct Inodes {
    blocks: Vec<u32>,
    offsets: Vec<u16>,
    /// Basic type; 0 until the inode was met.
    kinds: Vec<u8>,
    /// Of a folder: the number of the one above, 0 until a name for it was met. Of others: links not yet met.
    pub(super) links: Vec<u32>,
    pub(super) folders: u32,
    pub(super) files: u32,
    pub(super) bytes: u64,
}

impl Inodes {
    fn new(count: u32) -> Self {
        let count = count as usize;
        Self {
            blocks: vec![0; count],
            offsets: vec![0; count],
            kinds: vec![0; count],
            links: vec![0; count],
            folders: 0,
            files: 0,
            bytes: 0,
        }
    }

    /// The reference of inode `number`, which was met.
    pub(super) fn reference(&self, number: u32) -> MetaRef {
        let at = number as usize - 1;
        MetaRef {
            block: u64::from(self.blocks[at]),
            offset: self.offsets[at],
        }
    }

    /// Whether inode `number` is a folder.
    pub(super) fn is_folder(&self, number: u32) -> bool {
        self.kinds[number as usize - 1] == InodeType::Dir as u8
    }

    /// Whether there is an inode `number` at `reference` of type `kind`.
    pub(super) fn matches(&self, number: u32, reference: MetaRef, kind: InodeType) -> bool {
        (1..=self.kinds.len() as u64).contains(&u64::from(number))
            && self.reference(number) == reference
            && self.kinds[number as usize - 1] == kind as u8
    }
}

pub(super) fn scan<S: ReadAt>(
    reader: &Reader<S>,
    layout: &Layout,
    limits: &Limits,
) -> Result<Inodes, CheckError> {
    let sb = reader.superblock();
    let region = reader.inode_region();
    // The smallest inode has 20 bytes.
    if u64::from(sb.inode_count) > region.most_decoded() / 20 {
        return Err(CheckError::broken(
            "superblock",
            "the inode table cannot hold as many inodes",
        ));
    }
    let mut table = Inodes::new(sb.inode_count);
    let start = MetaPos {
        block: region.start,
        offset: 0,
    };
    let part = || "inode table".to_owned();
    let mut cursor = reader.cursor(region, start).within(part)?;
    for _ in 0..sb.inode_count {
        cursor.settle().within(part)?;
        let pos = cursor.pos();
        let reference = MetaRef {
            block: pos.block - region.start,
            offset: pos.offset as u16,
        };
        let inode = reader.parse_inode(&mut cursor, reference).within(part)?;
        let part = || format!("inode {}", inode.number);
        let at = inode.number as usize - 1;
        if table.kinds[at] != 0 {
            return Err(CheckError::broken(part(), "two inodes have this number"));
        }
        table.blocks[at] = u32::try_from(reference.block)
            .map_err(|_| CheckError::broken(part(), "it lies further than references reach"))?;
        table.offsets[at] = reference.offset;
        table.kinds[at] = inode.file_type() as u8;
        check_common(reader, &inode, limits)?;
        match &inode.body {
            InodeBody::Dir(dir) => {
                table.folders += 1;
                for _ in 0..dir.index_count {
                    let head = cursor.bytes::<{ DirIndex::FIXED_LEN }>().within(part)?;
                    let len = DirIndex::len_of(&head).within(part)?;
                    let rest = len - DirIndex::FIXED_LEN;
                    cursor.skip(rest as u64).within(part)?;
                }
            }
            InodeBody::File(file) => {
                table.files += 1;
                table.links[at] = file.nlink;
                table.bytes = table
                    .bytes
                    .checked_add(file.size)
                    .ok_or_else(|| CheckError::broken(part(), "all files together are too long"))?;
                files::check_file(reader, layout, &inode, file, &mut cursor)?;
            }
            InodeBody::Symlink(link) => {
                table.links[at] = link.nlink;
                reader.read_link(&inode).within(part)?;
                let tail = link.target_len + if link.extended { 4 } else { 0 };
                cursor.skip(u64::from(tail)).within(part)?;
            }
            InodeBody::Device(_, device) => table.links[at] = device.nlink,
            InodeBody::Ipc(_, ipc) => table.links[at] = ipc.nlink,
        }
        if inode.nlink() == 0 {
            return Err(CheckError::broken(part(), "its link count is zero"));
        }
    }
    match cursor.at_end() {
        true => Ok(table),
        false => Err(CheckError::broken(
            "inode table",
            "something follows the last inode",
        )),
    }
}

fn check_common<S: ReadAt>(
    reader: &Reader<S>,
    inode: &Inode,
    limits: &Limits,
) -> Result<(), CheckError> {
    let part = || format!("inode {}", inode.number);
    let kind = inode.file_type();
    if kind == InodeType::File && inode.permissions & 0o6000 != 0 && !limits.setid {
        return Err(CheckError::forbidden(part(), "a set-id file"));
    }
    if matches!(kind, InodeType::BlockDevice | InodeType::CharDevice) && !limits.devices {
        return Err(CheckError::forbidden(part(), "a device"));
    }
    let sets = reader.xattrs().map_or(0, |xattrs| xattrs.count);
    match reader.xattr_index(inode).within(part)? {
        Some(index) if index >= sets => {
            Err(CheckError::broken(part(), "its xattr set does not exist"))
        }
        _ => Ok(()),
    }
}

/// The export table must name every inode's place.
pub(super) fn check_export<S: ReadAt>(
    reader: &Reader<S>,
    table: &Inodes,
) -> Result<(), CheckError> {
    let part = || "export table".to_owned();
    for number in 1..=reader.superblock().inode_count {
        match reader.reference_of(number).within(part)? {
            None => return Ok(()),
            Some(reference) if reference == table.reference(number) => {}
            Some(_) => {
                return Err(CheckError::broken(
                    part(),
                    "it names a place where no inode lies",
                ));
            }
        }
    }
    Ok(())
}
