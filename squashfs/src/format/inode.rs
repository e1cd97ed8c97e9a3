//! Inodes of all kinds.
//!
//! An inode is a head of 16 bytes, a body whose length its type tells ([`InodeType::fixed_len`], head
//! included), and for three kinds a tail:
//! - files: a u32 [`super::BlockSize`] for each block ([`FileInode::block_count`]);
//! - symlinks: the target, then for the extended type a u32 xattr id;
//! - extended folders: `index_count` records of [`super::DirIndex`].

use super::{DIR_SIZE_BIAS, Fields, FormatError, NO_FRAGMENT, NO_XATTR, put16, put32, put64};

/// Raw types. Extended ones are the basic ones + 7.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u16)]
#[allow(missing_docs, reason = "the names say it")]
pub enum InodeType {
    Dir = 1,
    File = 2,
    Symlink = 3,
    BlockDevice = 4,
    CharDevice = 5,
    Fifo = 6,
    Socket = 7,
    ExtDir = 8,
    ExtFile = 9,
    ExtSymlink = 10,
    ExtBlockDevice = 11,
    ExtCharDevice = 12,
    ExtFifo = 13,
    ExtSocket = 14,
}

impl InodeType {
    const ALL: [Self; 14] = [
        Self::Dir,
        Self::File,
        Self::Symlink,
        Self::BlockDevice,
        Self::CharDevice,
        Self::Fifo,
        Self::Socket,
        Self::ExtDir,
        Self::ExtFile,
        Self::ExtSymlink,
        Self::ExtBlockDevice,
        Self::ExtCharDevice,
        Self::ExtFifo,
        Self::ExtSocket,
    ];

    /// The type with this number.
    pub fn from_raw(raw: u16) -> Option<Self> {
        Self::ALL.get(usize::from(raw).checked_sub(1)?).copied()
    }

    /// Whether this is an extended type.
    pub fn is_extended(self) -> bool {
        self as u16 > 7
    }

    /// The basic type of the same kind: what directory entries hold.
    pub fn basic(self) -> Self {
        Self::ALL[(self as usize - 1) % 7]
    }

    fn extended(self) -> Self {
        Self::ALL[(self as usize - 1) % 7 + 7]
    }

    /// The `S_IF…` bits of `st_mode`.
    pub fn file_type_bits(self) -> u32 {
        match self.basic() {
            Self::Dir => 0o040_000,
            Self::File => 0o100_000,
            Self::Symlink => 0o120_000,
            Self::BlockDevice => 0o060_000,
            Self::CharDevice => 0o020_000,
            Self::Fifo => 0o010_000,
            _ => 0o140_000,
        }
    }

    /// Bytes of head and body, without the tail.
    pub fn fixed_len(self) -> usize {
        match self {
            Self::Dir | Self::File => 32,
            Self::Symlink | Self::BlockDevice | Self::CharDevice | Self::ExtSymlink => 24,
            Self::Fifo | Self::Socket => 20,
            Self::ExtDir => 40,
            Self::ExtFile => 56,
            Self::ExtBlockDevice | Self::ExtCharDevice => 28,
            Self::ExtFifo | Self::ExtSocket => 24,
        }
    }
}

/// One inode without its tail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Inode {
    /// Permission bits with set-id and sticky (`0o7777`); the type is in `body`.
    pub mode: u16,
    /// Index of the owner in the id table.
    pub uid_index: u16,
    /// Index of the group in the id table.
    pub gid_index: u16,
    /// Seconds since 1970, unsigned.
    pub mtime: u32,
    /// 1 to the superblock's count.
    pub number: u32,
    /// The rest.
    pub body: InodeBody,
}

/// What differs by kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InodeBody {
    /// A folder.
    Dir(DirInode),
    /// A file.
    File(FileInode),
    /// A symlink.
    Symlink(SymlinkInode),
    /// A device; `InodeType::BlockDevice` or `CharDevice`.
    Device(InodeType, DeviceInode),
    /// `InodeType::Fifo` or `Socket`.
    Ipc(InodeType, IpcInode),
}

/// A folder.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DirInode {
    /// Links: 2 and one for each folder in it.
    pub nlink: u32,
    /// Listing length + 3.
    pub size: u32,
    /// Metadata block of the listing, from the start of the directory table.
    pub block: u32,
    /// Offset in that block.
    pub offset: u16,
    /// Inode number of the folder above (of root: the inode count + 1).
    pub parent: u32,
    /// Records of the index (the tail); 0 in basic inodes.
    pub index_count: u16,
    /// Xattr set or [`NO_XATTR`].
    pub xattr: u32,
}

impl DirInode {
    /// Bytes of the listing.
    pub fn listing_len(&self) -> u32 {
        self.size.saturating_sub(DIR_SIZE_BIAS)
    }
}

/// A file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileInode {
    /// Where its first block lies in the image.
    pub start: u64,
    /// Bytes of the file.
    pub size: u64,
    /// Bytes of it that are holes.
    pub sparse: u64,
    /// Links.
    pub nlink: u32,
    /// Fragment block that holds the tail, or [`NO_FRAGMENT`].
    pub fragment: u32,
    /// Offset of the tail in the fragment block after decompression.
    pub fragment_offset: u32,
    /// Xattr set or [`NO_XATTR`].
    pub xattr: u32,
}

impl FileInode {
    /// Blocks in the tail's list: without a fragment the remainder is a block too.
    pub fn block_count(&self, block_size: u32) -> u64 {
        let full = self.size / u64::from(block_size);
        if self.fragment == NO_FRAGMENT && !self.size.is_multiple_of(u64::from(block_size)) {
            full + 1
        } else {
            full
        }
    }
}

/// A symlink. The target's bytes are in the inode's tail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SymlinkInode {
    /// Links.
    pub nlink: u32,
    /// Bytes of the target.
    pub target_len: u32,
    /// Whether a u32 xattr id follows the target.
    pub extended: bool,
}

/// A block or character device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceInode {
    /// Links.
    pub nlink: u32,
    /// As the kernel's `new_encode_dev`: `(minor & 0xff) | major << 8 | (minor & !0xff) << 12`.
    pub rdev: u32,
    /// Xattr set or [`NO_XATTR`].
    pub xattr: u32,
}

/// A fifo or a socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IpcInode {
    /// Links.
    pub nlink: u32,
    /// Xattr set or [`NO_XATTR`].
    pub xattr: u32,
}

impl Inode {
    /// Longest head and body.
    pub const MAX_FIXED_LEN: usize = 56;
    /// Bytes of the head.
    pub const HEAD_LEN: usize = 16;

    /// The smallest type that holds this inode.
    pub fn inode_type(&self) -> InodeType {
        match self.body {
            InodeBody::Dir(d) => pick(
                InodeType::Dir,
                d.xattr != NO_XATTR || d.index_count > 0 || u16::try_from(d.size).is_err(),
            ),
            InodeBody::File(f) => pick(
                InodeType::File,
                f.xattr != NO_XATTR
                    || f.nlink != 1
                    || f.sparse > 0
                    || u32::try_from(f.start).is_err()
                    || u32::try_from(f.size).is_err(),
            ),
            InodeBody::Symlink(s) => pick(InodeType::Symlink, s.extended),
            InodeBody::Device(kind, d) => pick(kind, d.xattr != NO_XATTR),
            InodeBody::Ipc(kind, i) => pick(kind, i.xattr != NO_XATTR),
        }
    }

    /// Appends head and body; the tail is the caller's.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let kind = self.inode_type();
        put16(out, kind as u16);
        put16(out, self.mode);
        put16(out, self.uid_index);
        put16(out, self.gid_index);
        put32(out, self.mtime);
        put32(out, self.number);
        let extended = kind.is_extended();
        match self.body {
            InodeBody::Dir(d) if extended => {
                put32(out, d.nlink);
                put32(out, d.size);
                put32(out, d.block);
                put32(out, d.parent);
                put16(out, d.index_count);
                put16(out, d.offset);
                put32(out, d.xattr);
            }
            InodeBody::Dir(d) => {
                put32(out, d.block);
                put32(out, d.nlink);
                put16(out, d.size as u16);
                put16(out, d.offset);
                put32(out, d.parent);
            }
            InodeBody::File(f) if extended => {
                put64(out, f.start);
                put64(out, f.size);
                put64(out, f.sparse);
                put32(out, f.nlink);
                put32(out, f.fragment);
                put32(out, f.fragment_offset);
                put32(out, f.xattr);
            }
            InodeBody::File(f) => {
                put32(out, f.start as u32);
                put32(out, f.fragment);
                put32(out, f.fragment_offset);
                put32(out, f.size as u32);
            }
            InodeBody::Symlink(s) => {
                put32(out, s.nlink);
                put32(out, s.target_len);
            }
            InodeBody::Device(_, d) => {
                put32(out, d.nlink);
                put32(out, d.rdev);
                if extended {
                    put32(out, d.xattr);
                }
            }
            InodeBody::Ipc(_, i) => {
                put32(out, i.nlink);
                if extended {
                    put32(out, i.xattr);
                }
            }
        }
    }

    /// The type of the inode that begins here (needs 2 bytes): tells how many bytes [`Self::decode`] wants.
    pub fn peek_type(bytes: &[u8]) -> Result<InodeType, FormatError> {
        let raw = Fields::new("inode", bytes, 2)?.u16()?;
        InodeType::from_raw(raw).ok_or(FormatError::Value {
            what: "inode type",
            value: u64::from(raw),
        })
    }

    /// Reads head and body and the type they were stored as; the tail begins at
    /// [`InodeType::fixed_len`] of that type. Mode bits beyond `0o7777` are refused: the kernel takes
    /// them into the file's type.
    pub fn decode(bytes: &[u8]) -> Result<(Self, InodeType), FormatError> {
        let kind = Self::peek_type(bytes)?;
        let mut f = Fields::new("inode", bytes, kind.fixed_len())?;
        f.take(2)?;
        let (mode, uid_index, gid_index) = (f.u16()?, f.u16()?, f.u16()?);
        if mode & !0o7777 != 0 {
            return Err(FormatError::Value {
                what: "inode mode",
                value: u64::from(mode),
            });
        }
        let (mtime, number) = (f.u32()?, f.u32()?);
        let xattr = |f: &mut Fields<'_>| {
            if kind.is_extended() {
                f.u32()
            } else {
                Ok(NO_XATTR)
            }
        };
        let body = match kind {
            InodeType::Dir => {
                let (block, nlink, size, offset, parent) =
                    (f.u32()?, f.u32()?, f.u16()?, f.u16()?, f.u32()?);
                let size = u32::from(size);
                InodeBody::Dir(DirInode {
                    nlink,
                    size,
                    block,
                    offset,
                    parent,
                    index_count: 0,
                    xattr: NO_XATTR,
                })
            }
            InodeType::ExtDir => {
                let (nlink, size, block, parent) = (f.u32()?, f.u32()?, f.u32()?, f.u32()?);
                let (index_count, offset, xattr) = (f.u16()?, f.u16()?, f.u32()?);
                InodeBody::Dir(DirInode {
                    nlink,
                    size,
                    block,
                    offset,
                    parent,
                    index_count,
                    xattr,
                })
            }
            InodeType::File => {
                let (start, fragment, fragment_offset, size) =
                    (f.u32()?, f.u32()?, f.u32()?, f.u32()?);
                InodeBody::File(FileInode {
                    start: u64::from(start),
                    size: u64::from(size),
                    sparse: 0,
                    nlink: 1,
                    fragment,
                    fragment_offset,
                    xattr: NO_XATTR,
                })
            }
            InodeType::ExtFile => {
                let (start, size, sparse) = (f.u64()?, f.u64()?, f.u64()?);
                let (nlink, fragment, fragment_offset, xattr) =
                    (f.u32()?, f.u32()?, f.u32()?, f.u32()?);
                InodeBody::File(FileInode {
                    start,
                    size,
                    sparse,
                    nlink,
                    fragment,
                    fragment_offset,
                    xattr,
                })
            }
            InodeType::Symlink | InodeType::ExtSymlink => InodeBody::Symlink(SymlinkInode {
                nlink: f.u32()?,
                target_len: f.u32()?,
                extended: kind.is_extended(),
            }),
            InodeType::BlockDevice
            | InodeType::CharDevice
            | InodeType::ExtBlockDevice
            | InodeType::ExtCharDevice => {
                let (nlink, rdev) = (f.u32()?, f.u32()?);
                InodeBody::Device(
                    kind.basic(),
                    DeviceInode {
                        nlink,
                        rdev,
                        xattr: xattr(&mut f)?,
                    },
                )
            }
            InodeType::Fifo | InodeType::Socket | InodeType::ExtFifo | InodeType::ExtSocket => {
                let nlink = f.u32()?;
                InodeBody::Ipc(
                    kind.basic(),
                    IpcInode {
                        nlink,
                        xattr: xattr(&mut f)?,
                    },
                )
            }
        };
        let inode = Self {
            mode,
            uid_index,
            gid_index,
            mtime,
            number,
            body,
        };
        inode.check()?;
        Ok((inode, kind))
    }

    fn check(&self) -> Result<(), FormatError> {
        match self.body {
            InodeBody::Dir(d) if usize::from(d.offset) >= super::METADATA_SIZE => {
                Err(FormatError::Value {
                    what: "listing offset",
                    value: u64::from(d.offset),
                })
            }
            InodeBody::File(f)
                if f.fragment == NO_FRAGMENT && f.size > 0 && f.start == super::ABSENT =>
            {
                Err(FormatError::Value {
                    what: "file start",
                    value: f.start,
                })
            }
            InodeBody::Symlink(s)
                if s.target_len == 0 || s.target_len as usize > super::MAX_SYMLINK =>
            {
                Err(FormatError::Value {
                    what: "symlink target length",
                    value: u64::from(s.target_len),
                })
            }
            _ => Ok(()),
        }
    }
}

fn pick(basic: InodeType, extended: bool) -> InodeType {
    if extended { basic.extended() } else { basic }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inode(body: InodeBody) -> Inode {
        Inode {
            mode: 0o4755,
            uid_index: 1,
            gid_index: 65_534,
            mtime: u32::MAX,
            number: 12,
            body,
        }
    }

    fn dir() -> DirInode {
        DirInode {
            nlink: 2,
            size: 3,
            block: 9,
            offset: 8191,
            parent: 1,
            index_count: 0,
            xattr: NO_XATTR,
        }
    }

    fn file() -> FileInode {
        FileInode {
            start: 96,
            size: 131_073,
            sparse: 0,
            nlink: 1,
            fragment: NO_FRAGMENT,
            fragment_offset: 0,
            xattr: NO_XATTR,
        }
    }

    #[test]
    fn every_kind_comes_back_in_its_smallest_form() {
        use InodeType as T;
        let link = |extended| SymlinkInode {
            nlink: 1,
            target_len: 4095,
            extended,
        };
        let device = |xattr| DeviceInode {
            nlink: 1,
            rdev: 0x103,
            xattr,
        };
        let ipc = |xattr| IpcInode { nlink: 3, xattr };
        let cases = [
            (InodeBody::Dir(dir()), T::Dir),
            (
                InodeBody::Dir(DirInode {
                    size: 65_536,
                    ..dir()
                }),
                T::ExtDir,
            ),
            (
                InodeBody::Dir(DirInode {
                    index_count: 2,
                    ..dir()
                }),
                T::ExtDir,
            ),
            (InodeBody::Dir(DirInode { xattr: 0, ..dir() }), T::ExtDir),
            (InodeBody::File(file()), T::File),
            (
                InodeBody::File(FileInode { nlink: 2, ..file() }),
                T::ExtFile,
            ),
            (
                InodeBody::File(FileInode {
                    sparse: 1,
                    ..file()
                }),
                T::ExtFile,
            ),
            (
                InodeBody::File(FileInode {
                    size: 1 << 32,
                    ..file()
                }),
                T::ExtFile,
            ),
            (
                InodeBody::File(FileInode {
                    start: 1 << 32,
                    ..file()
                }),
                T::ExtFile,
            ),
            (InodeBody::Symlink(link(false)), T::Symlink),
            (InodeBody::Symlink(link(true)), T::ExtSymlink),
            (
                InodeBody::Device(T::BlockDevice, device(NO_XATTR)),
                T::BlockDevice,
            ),
            (
                InodeBody::Device(T::CharDevice, device(5)),
                T::ExtCharDevice,
            ),
            (InodeBody::Ipc(T::Fifo, ipc(NO_XATTR)), T::Fifo),
            (InodeBody::Ipc(T::Socket, ipc(5)), T::ExtSocket),
        ];
        for (body, kind) in cases {
            let mut out = Vec::new();
            inode(body).encode(&mut out);
            assert_eq!(out.len(), kind.fixed_len(), "{kind:?}");
            assert_eq!(Inode::decode(&out), Ok((inode(body), kind)));
            for cut in 0..out.len() {
                assert!(matches!(
                    Inode::decode(&out[..cut]),
                    Err(FormatError::Truncated { .. })
                ));
            }
        }
    }

    #[test]
    fn bad_inodes_are_refused() {
        assert!(Inode::decode(&[0; 64]).is_err());
        assert!(Inode::decode(&[15; 64]).is_err());
        for target_len in [0, 4096] {
            let mut out = Vec::new();
            inode(InodeBody::Symlink(SymlinkInode {
                nlink: 1,
                target_len,
                extended: false,
            }))
            .encode(&mut out);
            assert!(Inode::decode(&out).is_err());
        }
        let mut out = Vec::new();
        inode(InodeBody::Dir(DirInode {
            offset: 8192,
            ..dir()
        }))
        .encode(&mut out);
        assert!(Inode::decode(&out).is_err());
    }

    #[test]
    fn block_counts() {
        assert_eq!(file().block_count(131_072), 2);
        assert_eq!(
            FileInode {
                fragment: 0,
                ..file()
            }
            .block_count(131_072),
            1
        );
        assert_eq!(FileInode { size: 0, ..file() }.block_count(131_072), 0);
        assert_eq!(
            FileInode {
                size: 131_072,
                ..file()
            }
            .block_count(131_072),
            1
        );
    }
}
