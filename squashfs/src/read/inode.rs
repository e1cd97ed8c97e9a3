//! Inodes: found by reference or number, with their owners resolved.

use super::Reader;
use super::error::ReadError;
use super::meta::{MetaCursor, MetaPos};
use super::source::ReadAt;
use crate::format::{self, DirInode, FileInode, InodeBody, InodeType, MetaRef, NO_XATTR};

/// One inode.
#[derive(Debug, Clone)]
pub struct Inode {
    /// Where it lies in the inode table. Directory entries with the same reference are hard links of one inode.
    pub reference: MetaRef,
    /// Its number in the image, what `st_ino` shows; never zero.
    pub number: u32,
    /// Permission bits with set-id and sticky, no type bits.
    pub permissions: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Modification time, seconds since 1970.
    pub mtime: u32,
    /// What it is, with what that kind has.
    pub body: InodeBody,
    /// Where what follows the fixed part lies: block list, link target or directory index.
    pub(crate) tail: MetaPos,
    /// What the record itself says, before owners were looked up.
    pub(crate) raw_type: InodeType,
}

impl Inode {
    /// Its basic type.
    pub fn file_type(&self) -> InodeType {
        self.raw_type.basic()
    }

    /// `st_mode`: type and permissions.
    pub fn mode(&self) -> u32 {
        self.raw_type.file_type_bits() | u32::from(self.permissions)
    }

    /// `st_nlink`, as the image states it.
    pub fn nlink(&self) -> u32 {
        match &self.body {
            InodeBody::Dir(dir) => dir.nlink,
            InodeBody::File(file) => file.nlink,
            InodeBody::Symlink(link) => link.nlink,
            InodeBody::Device(_, device) => device.nlink,
            InodeBody::Ipc(_, ipc) => ipc.nlink,
        }
    }

    /// `st_size` as the kernel's driver shows it.
    pub fn size(&self) -> u64 {
        match &self.body {
            InodeBody::Dir(dir) => u64::from(dir.size),
            InodeBody::File(file) => file.size,
            InodeBody::Symlink(link) => u64::from(link.target_len),
            InodeBody::Device(..) | InodeBody::Ipc(..) => 0,
        }
    }

    /// The device number of a device, in the kernel's `new_encode_dev` form; 0 of anything else.
    pub fn rdev(&self) -> u32 {
        match &self.body {
            InodeBody::Device(_, device) => device.rdev,
            _ => 0,
        }
    }

    pub(crate) fn as_dir(&self) -> Result<&DirInode, ReadError> {
        match &self.body {
            InodeBody::Dir(dir) => Ok(dir),
            _ => Err(ReadError::NotADirectory),
        }
    }

    pub(crate) fn as_file(&self) -> Result<&FileInode, ReadError> {
        match &self.body {
            InodeBody::File(file) => Ok(file),
            _ => Err(ReadError::NotAFile),
        }
    }
}

impl<S: ReadAt> Reader<S> {
    /// The root folder.
    pub fn root(&self) -> Result<Inode, ReadError> {
        let root = self.inode(self.superblock.root_inode)?;
        root.as_dir()?;
        Ok(root)
    }

    /// The inode at `reference`. A made-up reference gives an error or a senseless inode, never a crash; take
    /// those that a directory entry, the superblock or [`Reader::reference_of`] gave.
    pub fn inode(&self, reference: MetaRef) -> Result<Inode, ReadError> {
        let mut cursor = self.cursor(self.inodes, self.inode_pos(reference)?)?;
        self.parse_inode(&mut cursor, reference)
    }

    /// The reference of the inode with this number, by the export table; `None` if the image has none.
    pub fn reference_of(&self, number: u32) -> Result<Option<MetaRef>, ReadError> {
        let Some(table) = self.export else {
            return Ok(None);
        };
        if number == 0 || number > self.superblock.inode_count {
            return Err(ReadError::corrupt("inode number", u64::from(number)));
        }
        let bytes: [u8; 8] = self.lookup(table, u64::from(number - 1))?;
        Ok(Some(MetaRef::from_raw(u64::from_le_bytes(bytes))?))
    }

    fn inode_pos(&self, reference: MetaRef) -> Result<MetaPos, ReadError> {
        let block = self
            .inodes
            .start
            .checked_add(reference.block)
            .ok_or_else(|| ReadError::corrupt("inode reference", reference.to_raw()))?;
        Ok(MetaPos {
            block,
            offset: u32::from(reference.offset),
        })
    }

    /// Reads the inode under `cursor`, leaving it at what follows the fixed part.
    pub(crate) fn parse_inode(
        &self,
        cursor: &mut MetaCursor<'_, S>,
        reference: MetaRef,
    ) -> Result<Inode, ReadError> {
        let corrupt = |what| ReadError::corrupt(what, reference.to_raw());
        let mut bytes = [0u8; format::Inode::MAX_FIXED_LEN];
        let (head, rest) = bytes.split_at_mut(format::Inode::HEAD_LEN);
        cursor.read(head)?;
        let len = format::Inode::peek_type(head)?.fixed_len();
        cursor.read(&mut rest[..len - format::Inode::HEAD_LEN])?;
        let (record, raw_type) = format::Inode::decode(&bytes[..len])?;
        if record.number == 0 || record.number > self.superblock.inode_count {
            return Err(corrupt("inode number"));
        }
        if let InodeBody::File(file) = &record.body {
            // Every block has four bytes in the table: a size that the table cannot hold is a lie.
            let blocks = file.block_count(self.superblock.block_size);
            if file.size > i64::MAX as u64 || blocks > self.inodes.most_decoded() / 4 {
                return Err(corrupt("file size"));
            }
        }
        let id = |index: u16| {
            let id = self.ids.get(usize::from(index));
            id.copied().ok_or_else(|| corrupt("owner index"))
        };
        Ok(Inode {
            reference,
            number: record.number,
            permissions: record.mode,
            uid: id(record.uid_index)?,
            gid: id(record.gid_index)?,
            mtime: record.mtime,
            body: record.body,
            tail: cursor.pos(),
            raw_type,
        })
    }

    /// The target of a symbolic link.
    pub fn read_link(&self, inode: &Inode) -> Result<Vec<u8>, ReadError> {
        let InodeBody::Symlink(link) = &inode.body else {
            return Err(ReadError::NotASymlink);
        };
        let mut target = vec![0u8; link.target_len as usize];
        self.cursor(self.inodes, inode.tail)?.read(&mut target)?;
        if target.contains(&0) {
            return Err(ReadError::corrupt(
                "NUL in a link target",
                inode.reference.to_raw(),
            ));
        }
        Ok(target)
    }

    /// The index of the inode's xattr set, if it has one.
    pub(crate) fn xattr_index(&self, inode: &Inode) -> Result<Option<u32>, ReadError> {
        let index = match &inode.body {
            InodeBody::Dir(dir) => dir.xattr,
            InodeBody::File(file) => file.xattr,
            InodeBody::Device(_, device) => device.xattr,
            InodeBody::Ipc(_, ipc) => ipc.xattr,
            InodeBody::Symlink(link) if link.extended => {
                let mut cursor = self.cursor(self.inodes, inode.tail)?;
                cursor.skip(u64::from(link.target_len))?;
                u32::from_le_bytes(cursor.bytes()?)
            }
            InodeBody::Symlink(_) => NO_XATTR,
        };
        Ok((index != NO_XATTR).then_some(index))
    }
}
