//! What a file system must answer, in the kernel's terms: node ids and errnos, no protocol.
//!
//! Its answers depend on nothing but the question: whoever serves the same image says the same, so that a server may die
//! and another one go on.

use rustix::io::Errno;

use crate::abi::{Attr, Put};

/// A read-only file system. Called from many threads at once.
pub trait FileSystem: Send + Sync {
    /// The node of `name` in the folder `parent`, and its attributes; `None` if there is no such name.
    fn lookup(&self, parent: u64, name: &[u8]) -> Result<Option<(u64, Attr)>, Errno>;

    /// A node's attributes.
    fn getattr(&self, node: u64) -> Result<Attr, Errno>;

    /// A symbolic link's target.
    fn readlink(&self, node: u64) -> Result<Vec<u8>, Errno>;

    /// Contents of a file from `offset` on; fewer bytes than asked for only at its end.
    fn read(&self, node: u64, offset: u64, buf: &mut [u8]) -> Result<usize, Errno>;

    /// Puts entries of a folder into `out`, from the one at `offset` on, as many as fit into `room` bytes; with `plus`
    /// each comes with what [`Self::lookup`] would say.
    fn readdir(
        &self,
        node: u64,
        offset: u64,
        room: usize,
        plus: bool,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno>;

    /// Whether any file can have extended attributes.
    fn has_xattrs(&self) -> bool {
        false
    }

    /// The value of an extended attribute.
    fn getxattr(&self, _node: u64, _name: &[u8]) -> Result<Vec<u8>, Errno> {
        Err(Errno::NODATA)
    }

    /// The names of a node's extended attributes, each with a NUL after it.
    fn listxattr(&self, _node: u64) -> Result<Vec<u8>, Errno> {
        Ok(Vec::new())
    }

    /// How big it is, all of it used.
    fn size(&self) -> Size;
}

/// What `statfs` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Size {
    /// Bytes.
    pub bytes: u64,
    /// Inodes.
    pub files: u64,
}

impl Size {
    /// `fuse_kstatfs`, in blocks of 4 KiB.
    pub(crate) fn put(self, out: &mut Vec<u8>) {
        out.u64(self.bytes.div_ceil(4096));
        out.u64(0);
        out.u64(0);
        out.u64(self.files);
        out.u64(0);
        for value in [4096, 255, 4096] {
            out.u32(value);
        }
        out.resize(out.len() + 28, 0);
    }
}
