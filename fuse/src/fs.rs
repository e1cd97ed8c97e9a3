//! What the file system is, without the protocol: an image's files by node id.
//!
//! A node id is an inode's reference in the image, plus two (0 is nobody and 1 the root), and a place in a folder is a
//! place in its listing. So there is no table of open files or known inodes: any process that serves the same image
//! gives the same answers, which is what makes a takeover possible.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use berth_squashfs::read::{EntryBuffer, Inode, InodeType, MetaRef, ReadAt, ReadError, Reader};
use rustix::fs::{MemfdFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::abi::{Attr, ENTRY_OUT, Put, ROOT_ID, dirent_len};
use crate::filesystem::{FileSystem, Size};

/// An image served as a file system.
#[derive(Debug)]
pub struct ImageFs<S> {
    reader: Reader<S>,
    root: MetaRef,
    owner: Option<(u32, u32)>,
}

/// Most bytes of decoded tables: about 100 an inode.
const TABLES_ON_DISK: u64 = 1 << 30;
/// The same where no folder takes them.
const TABLES_IN_MEMORY: u64 = 64 << 20;
/// Positions of a listing's entries come after those of `.` and `..`.
const DOTS: u64 = 2;

impl<S: ReadAt> ImageFs<S> {
    /// Serves what `reader` reads. Fails if the image has no root folder.
    pub fn new(reader: Reader<S>) -> Result<Self, ReadError> {
        let root = reader.root()?.reference;
        Ok(Self {
            reader,
            root,
            owner: None,
        })
    }

    /// The same with this user and group as the owner of everything: for a user namespace that has no others.
    #[must_use]
    pub fn owned_by(self, owner: Option<(u32, u32)>) -> Self {
        Self { owner, ..self }
    }

    /// Decodes the image's tables in a thread of its own, into a file without a name in `folder`, or in memory where
    /// that cannot be; from then on they cost no memory of this process and no decoding. Requests are answered meanwhile.
    pub fn keep_tables(self: &Arc<Self>, folder: Option<&Path>)
    where
        S: 'static,
    {
        let (fs, folder) = (Arc::clone(self), folder.map(Path::to_owned));
        let thread = std::thread::Builder::new().name("tables".to_owned());
        let started = thread.spawn(move || fs.decode_tables(folder.as_deref()));
        if let Err(error) = started {
            tracing::warn!(%error, "an image's tables are not kept decoded");
        }
    }

    /// The same in this thread.
    pub fn decode_tables(&self, folder: Option<&Path>) {
        let unnamed = |folder: &Path| {
            let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
            rustix::fs::open(folder, flags, Mode::RUSR | Mode::WUSR)
        };
        let (file, most) = match folder.map(unnamed) {
            Some(Ok(file)) => (Ok(file), TABLES_ON_DISK),
            _ => (
                rustix::fs::memfd_create("berth-tables", MemfdFlags::CLOEXEC),
                TABLES_IN_MEMORY,
            ),
        };
        let file = match file {
            Ok(file) => File::from(file),
            Err(error) => {
                tracing::warn!(%error, "an image's tables are not kept decoded");
                return;
            }
        };
        match self.reader.keep_tables_in(&file, most) {
            Ok(true) => {}
            Ok(false) => tracing::info!("an image's tables are too big to keep decoded"),
            Err(error) => tracing::warn!(
                error = &error as &dyn std::error::Error,
                "an image's tables are not kept decoded"
            ),
        }
    }

    /// The image.
    pub fn reader(&self) -> &Reader<S> {
        &self.reader
    }

    fn node(&self, reference: MetaRef) -> u64 {
        match reference == self.root {
            true => ROOT_ID,
            false => reference.to_raw() + 2,
        }
    }

    fn inode(&self, node: u64) -> Result<Inode, Errno> {
        let reference = match node {
            0 => return Err(Errno::NOENT),
            ROOT_ID => self.root,
            _ => MetaRef::from_raw(node - 2).map_err(|_| Errno::STALE)?,
        };
        self.reader.inode(reference).map_err(errno)
    }

    fn attr(&self, inode: &Inode) -> Attr {
        let (uid, gid) = self.owner.unwrap_or((inode.uid, inode.gid));
        Attr {
            ino: u64::from(inode.number),
            size: inode.size(),
            mtime: u64::from(inode.mtime),
            mode: inode.mode(),
            nlink: inode.nlink(),
            uid,
            gid,
            rdev: match inode.file_type() {
                InodeType::BlockDevice | InodeType::CharDevice => inode.rdev(),
                _ => 0,
            },
        }
    }

    fn dot_number(&self, folder: &Inode, at: u64) -> u64 {
        match &folder.body {
            berth_squashfs::read::InodeBody::Dir(dir)
                if at == 1 && folder.reference != self.root =>
            {
                u64::from(dir.parent)
            }
            _ => u64::from(folder.number),
        }
    }
}

impl<S: ReadAt> FileSystem for ImageFs<S> {
    fn lookup(&self, parent: u64, name: &[u8]) -> Result<Option<(u64, Attr)>, Errno> {
        let parent = self.inode(parent)?;
        let Some(entry) = self.reader.find(&parent, name).map_err(errno)? else {
            return Ok(None);
        };
        let inode = self.reader.inode(entry.inode).map_err(errno)?;
        Ok(Some((self.node(entry.inode), self.attr(&inode))))
    }

    fn getattr(&self, node: u64) -> Result<Attr, Errno> {
        Ok(self.attr(&self.inode(node)?))
    }

    fn readlink(&self, node: u64) -> Result<Vec<u8>, Errno> {
        let inode = self.inode(node)?;
        self.reader.read_link(&inode).map_err(errno)
    }

    fn read(&self, node: u64, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let inode = self.inode(node)?;
        self.reader.read(&inode, offset, buf).map_err(errno)
    }

    fn readdir(
        &self,
        node: u64,
        offset: u64,
        room: usize,
        plus: bool,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let folder = self.inode(node)?;
        let mut listing = self.reader.read_dir(&folder).map_err(errno)?;
        let before = out.len();
        let fits = |out: &Vec<u8>, name: usize| {
            let len = dirent_len(name) + if plus { ENTRY_OUT } else { 0 };
            out.len() - before + len <= room
        };
        for (at, name) in [(0, &b"."[..]), (1, b"..")] {
            if offset > at {
                continue;
            }
            if !fits(out, name.len()) {
                return Ok(());
            }
            if plus {
                // No node: the kernel has these already.
                out.entry_out(None);
            }
            out.dirent(self.dot_number(&folder, at), at + 1, 4, name);
        }
        let position = u32::try_from(offset.saturating_sub(DOTS)).unwrap_or(u32::MAX);
        listing.seek(position).map_err(errno)?;
        let mut buffer = EntryBuffer::default();
        while let Some(entry) = listing.next_into(&mut buffer).map_err(errno)? {
            if !fits(out, entry.name.len()) {
                break;
            }
            if plus {
                let inode = self.reader.inode(entry.inode).map_err(errno)?;
                out.entry_out(Some((self.node(entry.inode), self.attr(&inode))));
            }
            out.dirent(
                u64::from(entry.number),
                u64::from(listing.position()) + DOTS,
                entry.file_type.file_type_bits() >> 12,
                entry.name,
            );
        }
        Ok(())
    }

    fn has_xattrs(&self) -> bool {
        self.reader.has_xattrs()
    }

    fn getxattr(&self, node: u64, name: &[u8]) -> Result<Vec<u8>, Errno> {
        let inode = self.inode(node)?;
        let value = self.reader.xattr(&inode, name).map_err(errno)?;
        value.ok_or(Errno::NODATA)
    }

    /// As the kernel's driver does, those of `trusted.` are told to all: the kernel filters them for those who may not
    /// read them.
    fn listxattr(&self, node: u64) -> Result<Vec<u8>, Errno> {
        let inode = self.inode(node)?;
        let mut list = Vec::new();
        for name in self.reader.xattr_names(&inode).map_err(errno)? {
            list.extend_from_slice(&name);
            list.push(0);
        }
        Ok(list)
    }

    fn size(&self) -> Size {
        let sb = self.reader.superblock();
        Size {
            bytes: sb.bytes_used,
            files: u64::from(sb.inode_count),
        }
    }
}

/// What a failed read is to the caller. What is behind it goes to the log: a user sees "input/output error".
fn errno(error: ReadError) -> Errno {
    match error {
        ReadError::NotADirectory => Errno::NOTDIR,
        ReadError::NotAFile => Errno::ISDIR,
        ReadError::NotASymlink => Errno::INVAL,
        ReadError::Io { .. }
        | ReadError::Format(_)
        | ReadError::Compress { .. }
        | ReadError::Corrupt { .. } => {
            tracing::warn!(error = &error as &dyn std::error::Error, "read failed");
            Errno::IO
        }
    }
}
