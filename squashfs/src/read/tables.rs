//! An image's inode, directory and fragment tables decoded once into a file and read from its mapping.
//!
//! What lies there costs no anonymous memory (the kernel drops its pages when it needs room and reads them again), no
//! decoding and no lock. The file is written in full before it is mapped, so that a full disk is an error and not a
//! signal; whoever gave it promises that nobody changes it any more.
#![allow(unsafe_code, reason = "a mapping is made of system calls and pointers")]

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ptr::NonNull;

use rustix::mm::{MapFlags, ProtFlags};

use super::Reader;
use super::error::ReadError;
use super::meta::{Block, Region};
use super::source::ReadAt;

/// Smallest mean size of a block, decoded: an image of smaller ones has no honest maker, and its list of blocks would
/// need more memory than it spares.
const LEAST_MEAN: u64 = 512;

/// Decoded blocks, one after another in the file's order.
#[derive(Debug)]
pub(super) struct Tables {
    map: Mapping,
    /// Where each block starts in the image and in the mapping, and at the end where the last one ends.
    places: Box<[Place]>,
}

#[derive(Debug, Clone, Copy)]
struct Place {
    image: u64,
    map: usize,
}

impl Tables {
    /// The decoded block that starts at `at` in the image.
    pub(super) fn block(&self, at: u64) -> Option<Block<'_>> {
        let index = self.places.partition_point(|place| place.image < at);
        let [here, next] = self.places.get(index..index + 2)? else {
            return None;
        };
        (here.image == at).then(|| Block::Mapped {
            data: &self.map.bytes()[here.map..next.map],
            next: next.image,
        })
    }
}

impl<S: ReadAt> Reader<S> {
    /// Decodes the inode, directory and fragment tables into `file`, an empty one, and reads them from its mapping from
    /// now on; other readers of this image go on meanwhile. `false` if they would take more than `most` bytes: then
    /// they are decoded block by block as before, and so they are after an error. Nobody may change `file` afterwards:
    /// give one without a name, or a sealed one.
    ///
    /// # Errors
    /// What reading the image gives; an error of `file` is a [`ReadError::Io`] too.
    pub fn keep_tables_in(&self, file: &File, most: u64) -> Result<bool, ReadError> {
        if self.tables.get().is_some() {
            return Ok(true);
        }
        let region = Region {
            start: self.inodes.start,
            end: self.dirs.end,
        };
        let into_file = |error: io::Error| ReadError::io(0, 0, error);
        let mut out = BufWriter::with_capacity(1 << 20, file);
        let mut places = Vec::new();
        let (mut at, mut len) = (region.start, 0);
        while at < region.end {
            let block = self.load_meta_block(at, region.end)?;
            places.push(Place {
                image: at,
                map: len,
            });
            out.write_all(&block.data).map_err(into_file)?;
            len += block.data.len();
            at = block.next;
            if len as u64 > most || places.len() as u64 > most / LEAST_MEAN {
                return Ok(false);
            }
        }
        out.flush().map_err(into_file)?;
        places.push(Place {
            image: at,
            map: len,
        });
        let map = Mapping::new(file, len).map_err(into_file)?;
        // Somebody else may have done the same meanwhile: as good.
        let _ = self.tables.set(Tables {
            map,
            places: places.into_boxed_slice(),
        });
        Ok(true)
    }
}

/// The first bytes of a file, mapped for reading.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
    len: usize,
}

// SAFETY: nothing writes to the mapping.
unsafe impl Send for Mapping {}
// SAFETY: nothing writes to the mapping.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(file: &File, len: usize) -> io::Result<Self> {
        if len == 0 || file.metadata()?.len() < len as u64 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: a new mapping at a place that the kernel chooses.
        let start = unsafe {
            rustix::mm::mmap(
                std::ptr::null_mut(),
                len,
                ProtFlags::READ,
                MapFlags::SHARED,
                file,
                0,
            )
        }?;
        let start = NonNull::new(start.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, len })
    }

    fn bytes(&self) -> &[u8] {
        // SAFETY: mapped for as long as `self` lives, and by the contract of `keep_tables_in` nobody changes them.
        unsafe { std::slice::from_raw_parts(self.start.as_ptr(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and every reference into it has ended.
        let unmapped = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), self.len) };
        debug_assert!(unmapped.is_ok());
    }
}
