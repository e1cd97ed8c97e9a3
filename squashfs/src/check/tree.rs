//! The folders: one tree, its listings sorted and back to back in the directory table, every inode named as often as
//! it says.

use super::inodes::Inodes;
use super::layout::Layout;
use super::{CheckError, In, Limits};
use crate::format::{DirIndex, DirInode, InodeType, MAX_NAME, METADATA_SIZE};
use crate::read::{EntryBuffer, Inode, MetaCursor, ReadAt, Reader};

/// Gives the count of names.
pub(super) fn check<S: ReadAt>(
    reader: &Reader<S>,
    layout: &Layout,
    limits: &Limits,
    table: &mut Inodes,
) -> Result<u64, CheckError> {
    let count = reader.superblock().inode_count;
    let root = reader.root().within(|| "root folder".into())?;
    if !table.matches(root.number, root.reference, InodeType::Dir) {
        return Err(CheckError::broken(
            "root folder",
            "it is not in the inode table",
        ));
    }
    let mut entries = 0;
    let mut listings = Vec::with_capacity(table.folders as usize);
    let mut parents = Vec::with_capacity(table.folders as usize);
    for number in 1..=count {
        if table.is_folder(number) {
            let folder = reader
                .inode(table.reference(number))
                .within(|| format!("inode {number}"))?;
            let dir = folder.as_dir().within(|| format!("inode {number}"))?;
            parents.push((number, dir.parent));
            entries += check_folder(reader, layout, &folder, table, &mut listings)?;
        }
    }
    check_listings(layout, listings)?;
    for (number, parent) in parents {
        if number != root.number && table.links[number as usize - 1] != parent {
            return Err(CheckError::broken(
                format!("folder {number}"),
                "its parent is not the folder that names it",
            ));
        }
    }
    if table.links[root.number as usize - 1] != 0 {
        return Err(CheckError::broken(
            "root folder",
            "it has a name in a folder",
        ));
    }
    for number in 1..=count {
        if number == root.number {
            continue;
        }
        let part = || format!("inode {number}");
        match table.is_folder(number) {
            true => check_depth(table, number, root.number, limits)?,
            false if table.links[number as usize - 1] != 0 => {
                return Err(CheckError::broken(
                    part(),
                    "it has fewer names than its link count says",
                ));
            }
            false => {}
        }
    }
    if root.as_dir().within(|| "root folder".into())?.parent != count.wrapping_add(1) {
        return Err(CheckError::broken(
            "root folder",
            "its parent is not the inode count and one",
        ));
    }
    Ok(entries)
}

/// A folder's listing, at this offset of the decoded directory table, of this length.
type Listing = (u64, u32);

fn check_folder<S: ReadAt>(
    reader: &Reader<S>,
    layout: &Layout,
    folder: &Inode,
    table: &mut Inodes,
    listings: &mut Vec<Listing>,
) -> Result<u64, CheckError> {
    let part = || format!("folder {}", folder.number);
    let broken = |rule| CheckError::broken(part(), rule);
    let dir = *folder.as_dir().within(part)?;
    if dir.size < crate::format::DIR_SIZE_BIAS {
        return Err(broken("its size is less than an empty folder's"));
    }
    if dir.listing_len() > 0 {
        let block = layout.dir_blocks.binary_search(&dir.block);
        let block =
            block.map_err(|_| broken("its listing begins in no block of the directory table"))?;
        let offset = block as u64 * METADATA_SIZE as u64 + u64::from(dir.offset);
        listings.push((offset, dir.listing_len()));
    }
    let mut index = IndexWalk::new(reader, folder, dir)?;
    let mut stream = reader.read_dir(folder).within(part)?;
    let mut buffer = EntryBuffer::default();
    let mut last: Vec<u8> = Vec::with_capacity(MAX_NAME);
    let (mut names, mut folders) = (0u64, 0u32);
    loop {
        let before = stream.run_start().within(part)?;
        let Some(entry) = stream.next_into(&mut buffer).within(part)? else {
            break;
        };
        if let Some((position, block)) = before {
            index.run(position, block - layout.dirs.start, entry.name)?;
        }
        if names > 0 && last.as_slice() >= entry.name {
            return Err(broken("its names are not sorted, or one is there twice"));
        }
        last.clear();
        last.extend_from_slice(entry.name);
        names += 1;
        if !table.matches(entry.number, entry.inode, entry.file_type) {
            return Err(broken(
                "a name's inode, number and type do not belong together",
            ));
        }
        let at = entry.number as usize - 1;
        if entry.file_type == InodeType::Dir {
            folders += 1;
            if table.links[at] != 0 {
                return Err(broken("a folder in it has another name too"));
            }
            table.links[at] = folder.number;
        } else {
            table.links[at] = table.links[at]
                .checked_sub(1)
                .ok_or_else(|| broken("a file in it has more names than its link count says"))?;
        }
    }
    index.finish()?;
    if dir.nlink != folders.saturating_add(2) {
        return Err(broken("its link count is not two and its folders"));
    }
    Ok(names)
}

/// Listings must cover the directory table without gap or overlap.
fn check_listings(layout: &Layout, mut listings: Vec<Listing>) -> Result<(), CheckError> {
    listings.sort_unstable();
    let mut at = 0;
    for (start, len) in listings {
        if start != at {
            return Err(CheckError::broken(
                "directory table",
                "two listings overlap, or there is a gap between them",
            ));
        }
        at += u64::from(len);
    }
    match at == layout.dir_bytes {
        true => Ok(()),
        false => Err(CheckError::broken(
            "directory table",
            "something follows the last listing",
        )),
    }
}

/// Every folder hangs below the root, at a bounded depth. Folders in a loop have parents without end.
fn check_depth(table: &Inodes, number: u32, root: u32, limits: &Limits) -> Result<(), CheckError> {
    let mut at = number;
    for _ in 0..limits.max_depth {
        at = table.links[at as usize - 1];
        if at == root {
            return Ok(());
        }
        if at == 0 {
            return Err(CheckError::broken(
                format!("folder {number}"),
                "it is not below the root",
            ));
        }
    }
    Err(CheckError::forbidden(
        format!("folder {number}"),
        format!("a depth of more than {} folders", limits.max_depth),
    ))
}

/// Follows a folder's index beside its listing.
struct IndexWalk<'a, S> {
    number: u32,
    cursor: Option<MetaCursor<'a, S>>,
    left: u16,
    next: Option<(u32, u32, Vec<u8>)>,
}

impl<'a, S: ReadAt> IndexWalk<'a, S> {
    fn new(reader: &'a Reader<S>, folder: &Inode, dir: DirInode) -> Result<Self, CheckError> {
        let cursor = match dir.index_count {
            0 => None,
            _ => Some(
                reader
                    .cursor(reader.inode_region(), folder.tail)
                    .within(|| format!("folder {}", folder.number))?,
            ),
        };
        let mut walk = Self {
            number: folder.number,
            cursor,
            left: dir.index_count,
            next: None,
        };
        walk.advance()?;
        Ok(walk)
    }

    fn advance(&mut self) -> Result<(), CheckError> {
        self.next = None;
        let Some(cursor) = self.cursor.as_mut().filter(|_| self.left > 0) else {
            return Ok(());
        };
        let part = || format!("index of folder {}", self.number);
        let mut bytes = [0u8; DirIndex::FIXED_LEN + MAX_NAME];
        cursor
            .read(&mut bytes[..DirIndex::FIXED_LEN])
            .within(part)?;
        let len = DirIndex::len_of(&bytes[..DirIndex::FIXED_LEN]).within(part)?;
        cursor
            .read(&mut bytes[DirIndex::FIXED_LEN..len])
            .within(part)?;
        let record = DirIndex::decode(&bytes[..len]).within(part)?;
        self.left -= 1;
        self.next = Some((record.listing_offset, record.block, record.name.to_vec()));
        Ok(())
    }

    /// A run begins at `position` of the listing, in `block` of the table, with the name `first`.
    fn run(&mut self, position: u32, block: u64, first: &[u8]) -> Result<(), CheckError> {
        let Some((listing_offset, index_block, name)) = &self.next else {
            return Ok(());
        };
        if *listing_offset > position {
            return Ok(());
        }
        let right =
            *listing_offset == position && u64::from(*index_block) == block && name == first;
        match right {
            true => self.advance(),
            false => Err(self.broken("it points where no run begins")),
        }
    }

    fn finish(&self) -> Result<(), CheckError> {
        match self.next {
            None => Ok(()),
            Some(_) => Err(self.broken("it has more entries than the folder has runs")),
        }
    }

    fn broken(&self, rule: &'static str) -> CheckError {
        CheckError::broken(format!("index of folder {}", self.number), rule)
    }
}
