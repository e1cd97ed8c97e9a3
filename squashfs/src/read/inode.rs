//! Inodes as they lie in the inode table.

use super::Reader;
use super::error::ReadError;
use super::meta::{MetaCursor, MetaPos};
use super::source::ReadAt;

/// Where an inode lies: the inode table's block (relative to the table's start) in the upper bits, the offset in the
/// decoded block in the lower 16. Two directory entries with the same reference are hard links of one file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct InodeRef(pub u64);

impl InodeRef {
    pub(crate) fn new(block: u32, offset: u16) -> Self {
        Self(u64::from(block) << 16 | u64::from(offset))
    }

    pub(crate) fn block(self) -> u64 {
        self.0 >> 16
    }

    pub(crate) fn offset(self) -> u32 {
        (self.0 & 0xffff) as u32
    }
}

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum FileType {
    /// A folder.
    Directory,
    /// A regular file.
    Regular,
    /// A symbolic link.
    Symlink,
    /// A block device.
    BlockDevice,
    /// A character device.
    CharDevice,
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

impl FileType {
    /// From the number in a directory entry or of a basic inode (extended ones are seven more).
    pub(crate) fn from_basic(number: u16) -> Option<Self> {
        Some(match number {
            1 => Self::Directory,
            2 => Self::Regular,
            3 => Self::Symlink,
            4 => Self::BlockDevice,
            5 => Self::CharDevice,
            6 => Self::Fifo,
            7 => Self::Socket,
            _ => return None,
        })
    }

    /// The type bits of `st_mode`.
    pub fn mode_bits(self) -> u32 {
        match self {
            Self::Directory => 0o040000,
            Self::Regular => 0o100000,
            Self::Symlink => 0o120000,
            Self::BlockDevice => 0o060000,
            Self::CharDevice => 0o020000,
            Self::Fifo => 0o010000,
            Self::Socket => 0o140000,
        }
    }
}

/// One inode, without what follows it in the table.
#[derive(Debug, Clone)]
pub struct Inode {
    /// Where it lies.
    pub reference: InodeRef,
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
    /// Link count as the image states it.
    pub nlink: u32,
    /// What it is, with what that kind has.
    pub kind: InodeKind,
    pub(crate) xattr: Option<u32>,
    pub(crate) uid_index: u16,
    pub(crate) gid_index: u16,
    pub(crate) extended: bool,
}

/// What only inodes of one kind have.
#[derive(Debug, Clone)]
pub enum InodeKind {
    /// A folder.
    Directory(Directory),
    /// A regular file.
    Regular(Regular),
    /// A symbolic link.
    Symlink {
        /// The target's length in bytes.
        len: u32,
    },
    /// A block device.
    BlockDevice {
        /// As the kernel encodes it (`new_encode_dev`).
        rdev: u32,
    },
    /// A character device.
    CharDevice {
        /// As the kernel encodes it (`new_encode_dev`).
        rdev: u32,
    },
    /// A named pipe.
    Fifo,
    /// A socket.
    Socket,
}

/// A folder's place in the directory table.
#[derive(Debug, Clone)]
pub struct Directory {
    /// Size the image states: the listing's bytes and three (for `.` and `..`).
    pub size: u32,
    /// Inode number of the folder above; of the root, one more than the last inode.
    pub parent: u32,
    pub(crate) block: u32,
    pub(crate) offset: u16,
    pub(crate) index_count: u16,
    pub(crate) tail: MetaPos,
}

/// A regular file's place in the data area.
#[derive(Debug, Clone)]
pub struct Regular {
    /// Length in bytes.
    pub size: u64,
    /// Bytes of it that lie in holes, as an extended inode states.
    pub sparse: u64,
    pub(crate) start: u64,
    pub(crate) fragment: Option<(u32, u32)>,
    pub(crate) tail: MetaPos,
}

impl Inode {
    /// What it is.
    pub fn file_type(&self) -> FileType {
        match self.kind {
            InodeKind::Directory(_) => FileType::Directory,
            InodeKind::Regular(_) => FileType::Regular,
            InodeKind::Symlink { .. } => FileType::Symlink,
            InodeKind::BlockDevice { .. } => FileType::BlockDevice,
            InodeKind::CharDevice { .. } => FileType::CharDevice,
            InodeKind::Fifo => FileType::Fifo,
            InodeKind::Socket => FileType::Socket,
        }
    }

    /// `st_mode`: type and permissions.
    pub fn mode(&self) -> u32 {
        self.file_type().mode_bits() | u32::from(self.permissions)
    }

    /// `st_size` as the kernel's driver shows it.
    pub fn size(&self) -> u64 {
        match &self.kind {
            InodeKind::Directory(dir) => u64::from(dir.size),
            InodeKind::Regular(file) => file.size,
            InodeKind::Symlink { len } => u64::from(*len),
            _ => 0,
        }
    }
}

/// No fragment, no xattrs.
const NONE: u32 = u32::MAX;
/// The kernel refuses a link target longer than a page.
pub(crate) const SYMLINK_MAX: u32 = 4096;

impl<S: ReadAt> Reader<S> {
    /// The root folder.
    pub fn root(&self) -> Result<Inode, ReadError> {
        let root = self.inode(self.root_ref())?;
        match root.kind {
            InodeKind::Directory(_) => Ok(root),
            _ => Err(ReadError::corrupt("root is no folder", root.reference.0)),
        }
    }

    /// The inode at `reference`. A wrong reference gives an error or some other inode, never a crash; take only
    /// those that a directory entry, [`Reader::root_ref`] or [`Reader::inode_by_number`] gave.
    pub fn inode(&self, reference: InodeRef) -> Result<Inode, ReadError> {
        let pos = MetaPos {
            block: self
                .inodes
                .start
                .checked_add(reference.block())
                .ok_or_else(|| ReadError::corrupt("inode reference", reference.0))?,
            offset: reference.offset(),
        };
        let mut cursor = self.cursor(self.inodes, pos)?;
        self.parse_inode(&mut cursor, reference)
    }

    /// Reads the inode under `cursor`, leaving it at what follows the fixed part.
    pub(crate) fn parse_inode(
        &self,
        cursor: &mut MetaCursor<'_, S>,
        reference: InodeRef,
    ) -> Result<Inode, ReadError> {
        let corrupt = |what| ReadError::corrupt(what, reference.0);
        let head = cursor.fields::<16>()?;
        let kind_number = head.u16(0);
        let extended = kind_number > 7;
        let kind_of = FileType::from_basic(if extended { kind_number - 7 } else { kind_number })
            .ok_or_else(|| corrupt("inode type"))?;
        let number = head.u32(12);
        if number == 0 || number > self.superblock.inode_count {
            return Err(corrupt("inode number"));
        }
        let id = |index: u16| {
            self.ids
                .get(usize::from(index))
                .copied()
                .ok_or_else(|| corrupt("owner index"))
        };
        let (nlink, xattr, kind) = match (kind_of, extended) {
            (FileType::Directory, _) => parse_dir(cursor, extended)?,
            (FileType::Regular, _) => self.parse_file(cursor, extended, reference)?,
            (FileType::Symlink, _) => {
                let body = cursor.fields::<8>()?;
                let len = body.u32(4);
                if len == 0 || len > SYMLINK_MAX {
                    return Err(corrupt("link target length"));
                }
                // An extended link's xattr index follows the target: see `xattr_index`.
                (body.u32(0), NONE, InodeKind::Symlink { len })
            }
            (FileType::BlockDevice | FileType::CharDevice, _) => {
                let body = cursor.fields::<8>()?;
                let xattr = if extended { cursor.fields::<4>()?.u32(0) } else { NONE };
                let rdev = body.u32(4);
                let kind = match kind_of {
                    FileType::BlockDevice => InodeKind::BlockDevice { rdev },
                    _ => InodeKind::CharDevice { rdev },
                };
                (body.u32(0), xattr, kind)
            }
            (FileType::Fifo | FileType::Socket, _) => {
                let nlink = cursor.fields::<4>()?.u32(0);
                let xattr = if extended { cursor.fields::<4>()?.u32(0) } else { NONE };
                let kind = match kind_of {
                    FileType::Fifo => InodeKind::Fifo,
                    _ => InodeKind::Socket,
                };
                (nlink, xattr, kind)
            }
        };
        let (uid_index, gid_index) = (head.u16(4), head.u16(6));
        Ok(Inode {
            reference,
            number,
            permissions: head.u16(2) & 0o7777,
            uid: id(uid_index)?,
            gid: id(gid_index)?,
            mtime: head.u32(8),
            nlink,
            kind,
            xattr: (xattr != NONE).then_some(xattr),
            uid_index,
            gid_index,
            extended,
        })
    }

    fn parse_file(
        &self,
        cursor: &mut MetaCursor<'_, S>,
        extended: bool,
        reference: InodeRef,
    ) -> Result<(u32, u32, InodeKind), ReadError> {
        let (start, size, sparse, nlink, fragment, offset, xattr) = if extended {
            let body = cursor.fields::<40>()?;
            (
                body.u64(0),
                body.u64(8),
                body.u64(16),
                body.u32(24),
                body.u32(28),
                body.u32(32),
                body.u32(36),
            )
        } else {
            let body = cursor.fields::<16>()?;
            let (start, size) = (u64::from(body.u32(0)), u64::from(body.u32(12)));
            (start, size, 0, 1, body.u32(4), body.u32(8), NONE)
        };
        // Every block has four bytes in the table: a size that the table cannot hold is a lie.
        let blocks = size >> self.superblock.block_log;
        if size > i64::MAX as u64 || blocks > self.inodes.most_decoded() / 4 {
            return Err(ReadError::corrupt("file size", reference.0));
        }
        let fragment = (fragment != NONE).then_some((fragment, offset));
        let kind = InodeKind::Regular(Regular {
            size,
            sparse,
            start,
            fragment,
            tail: cursor.pos(),
        });
        Ok((nlink, xattr, kind))
    }

    /// The target of a symbolic link.
    pub fn read_link(&self, inode: &Inode) -> Result<Vec<u8>, ReadError> {
        let InodeKind::Symlink { len } = inode.kind else {
            return Err(ReadError::NotASymlink);
        };
        let mut cursor = self.at_symlink_target(inode)?;
        let mut target = vec![0u8; len as usize];
        cursor.read(&mut target)?;
        if target.contains(&0) {
            return Err(ReadError::corrupt("NUL in a link target", inode.reference.0));
        }
        Ok(target)
    }

    /// The index of the inode's xattr set, also where it follows a link's target.
    pub(crate) fn xattr_index(&self, inode: &Inode) -> Result<Option<u32>, ReadError> {
        match inode.kind {
            InodeKind::Symlink { len } if inode.extended => {
                let mut cursor = self.at_symlink_target(inode)?;
                cursor.skip(u64::from(len))?;
                let index = cursor.fields::<4>()?.u32(0);
                Ok((index != NONE).then_some(index))
            }
            _ => Ok(inode.xattr),
        }
    }

    fn at_symlink_target(&self, inode: &Inode) -> Result<MetaCursor<'_, S>, ReadError> {
        let pos = MetaPos {
            block: self.inodes.start + inode.reference.block(),
            offset: inode.reference.offset(),
        };
        let mut cursor = self.cursor(self.inodes, pos)?;
        // Common head, link count, target length.
        cursor.skip(16 + 8)?;
        Ok(cursor)
    }
}

fn parse_dir<S: ReadAt>(
    cursor: &mut MetaCursor<'_, S>,
    extended: bool,
) -> Result<(u32, u32, InodeKind), ReadError> {
    if extended {
        let body = cursor.fields::<24>()?;
        let dir = Directory {
            size: body.u32(4),
            block: body.u32(8),
            parent: body.u32(12),
            index_count: body.u16(16),
            offset: body.u16(18),
            tail: cursor.pos(),
        };
        return Ok((body.u32(0), body.u32(20), InodeKind::Directory(dir)));
    }
    let body = cursor.fields::<16>()?;
    let dir = Directory {
        size: u32::from(body.u16(8)),
        block: body.u32(0),
        parent: body.u32(12),
        index_count: 0,
        offset: body.u16(10),
        tail: cursor.pos(),
    };
    Ok((body.u32(4), NONE, InodeKind::Directory(dir)))
}
