//! Block mode: the image's own bytes as one file, for a loop device and the kernel's SquashFS driver on top.
//!
//! The kernel then decodes and keeps everything itself, and only what is missing of the image comes from the source. A
//! folder with one file, [`NAME`]; only root may open it.

use berth_squashfs::read::ReadAt;
use rustix::io::Errno;

use crate::abi::{Attr, ENTRY_OUT, Put, ROOT_ID, dirent_len};
use crate::filesystem::{FileSystem, Size};

/// The file's name in the folder.
pub use berth_mount::serving::BLOCK_FILE as NAME;

/// The file's node id.
const FILE_ID: u64 = 2;

/// An image's bytes served as one file.
#[derive(Debug)]
pub struct BlockFs<S> {
    source: S,
    size: u64,
}

impl<S: ReadAt> BlockFs<S> {
    /// Serves all bytes that `source` has.
    ///
    /// # Errors
    /// The source does not know its size.
    pub fn new(source: S) -> std::io::Result<Self> {
        let size = source.size()?;
        Ok(Self { source, size })
    }

    fn attr(&self, node: u64) -> Result<Attr, Errno> {
        let (mode, nlink, size) = match node {
            ROOT_ID => (0o040500, 2, 0),
            FILE_ID => (0o100400, 1, self.size),
            _ => return Err(Errno::STALE),
        };
        Ok(Attr {
            ino: node,
            size,
            mtime: 0,
            mode,
            nlink,
            uid: 0,
            gid: 0,
            rdev: 0,
        })
    }
}

impl<S: ReadAt> FileSystem for BlockFs<S> {
    fn lookup(&self, parent: u64, name: &[u8]) -> Result<Option<(u64, Attr)>, Errno> {
        match parent {
            ROOT_ID if name == NAME.as_bytes() => Ok(Some((FILE_ID, self.attr(FILE_ID)?))),
            ROOT_ID => Ok(None),
            _ => Err(Errno::NOTDIR),
        }
    }

    fn getattr(&self, node: u64) -> Result<Attr, Errno> {
        self.attr(node)
    }

    fn readlink(&self, _node: u64) -> Result<Vec<u8>, Errno> {
        Err(Errno::INVAL)
    }

    fn read(&self, node: u64, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        match node {
            FILE_ID => {}
            ROOT_ID => return Err(Errno::ISDIR),
            _ => return Err(Errno::STALE),
        }
        let len = self.size.saturating_sub(offset).min(buf.len() as u64) as usize;
        // Beyond the end a source need not even be asked for nothing.
        if len == 0 {
            return Ok(0);
        }
        self.source
            .read_exact_at(&mut buf[..len], offset)
            .map_err(|error| {
                tracing::warn!(offset, len, %error, "read failed");
                Errno::IO
            })?;
        Ok(len)
    }

    fn readdir(
        &self,
        node: u64,
        offset: u64,
        room: usize,
        plus: bool,
        out: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        if node != ROOT_ID {
            return Err(Errno::NOTDIR);
        }
        let start = out.len();
        let entries = [(ROOT_ID, "."), (ROOT_ID, ".."), (FILE_ID, NAME)];
        for (at, (id, name)) in (0..).zip(entries).filter(|(at, _)| *at >= offset) {
            let len = dirent_len(name.len()) + if plus { ENTRY_OUT } else { 0 };
            if out.len() - start + len > room {
                break;
            }
            let attr = self.attr(id)?;
            if plus {
                // The kernel has the folder itself already.
                out.entry_out((id == FILE_ID).then_some((id, attr)));
            }
            out.dirent(id, at + 1, attr.mode >> 12, name.as_bytes());
        }
        Ok(())
    }

    fn size(&self) -> Size {
        Size {
            bytes: self.size,
            files: 2,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_file_with_the_bytes_of_the_source() {
        let bytes: Vec<u8> = (0..10_000u32).map(|i| (i % 251) as u8).collect();
        let fs = BlockFs::new(bytes.clone()).unwrap();
        let (node, attr) = fs.lookup(ROOT_ID, b"image").unwrap().unwrap();
        assert_eq!((attr.size, attr.mode), (10_000, 0o100400));
        let mut buf = [0; 4096];
        assert_eq!(fs.read(node, 8192, &mut buf), Ok(10_000 - 8192));
        assert_eq!(buf[..1808], bytes[8192..]);
        assert_eq!(fs.read(node, 10_000, &mut buf), Ok(0));
        assert_eq!(fs.read(node, u64::MAX, &mut buf), Ok(0));
        assert_eq!(fs.read(ROOT_ID, 0, &mut buf), Err(Errno::ISDIR));
        assert_eq!(fs.lookup(ROOT_ID, b"other"), Ok(None));
        assert_eq!(fs.lookup(node, b"image"), Err(Errno::NOTDIR));
        assert_eq!(fs.getattr(3), Err(Errno::STALE));
    }

    #[test]
    fn the_folder_is_listed_in_any_steps() {
        let fs = BlockFs::new(vec![0u8; 10]).unwrap();
        for (plus, one) in [(false, dirent_len(5)), (true, dirent_len(5) + ENTRY_OUT)] {
            let mut whole = Vec::new();
            fs.readdir(ROOT_ID, 0, 4096, plus, &mut whole).unwrap();
            let mut parts = Vec::new();
            for offset in 0..4 {
                let mut part = Vec::new();
                fs.readdir(ROOT_ID, offset, one, plus, &mut part).unwrap();
                assert!(part.len() <= one);
                parts.extend(part);
            }
            assert_eq!(parts, whole);
        }
    }

    #[test]
    fn a_source_that_fails_is_an_error() {
        struct Broken;
        impl ReadAt for Broken {
            fn read_exact_at(&self, _: &mut [u8], _: u64) -> std::io::Result<()> {
                Err(std::io::ErrorKind::TimedOut.into())
            }
            fn size(&self) -> std::io::Result<u64> {
                Ok(100)
            }
        }
        let fs = BlockFs::new(Broken).unwrap();
        assert_eq!(fs.read(FILE_ID, 0, &mut [0; 10]), Err(Errno::IO));
    }
}
