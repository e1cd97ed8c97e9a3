//! Shared memory into which the kernel's requests are read, so that they outlive the process that read them.
//!
//! A request that a server took and did not answer before it was killed is lost to the kernel: its caller waits for
//! ever. Here every worker reads into a slot of a memfd that the holder of the connection keeps open too. A successor
//! maps the same memfd and answers what lies in the slots; a request that had been answered already is unknown to the
//! kernel (ENOENT), which does no harm. This needs no kernel newer than memfd.
//!
//! A slot is in use when its request's length is not zero. A worker clears that before it reads anew, so there is no
//! moment at which a taken request is not marked. Each slot belongs to one worker.
#![allow(
    unsafe_code,
    reason = "memory shared with another process can only be mapped"
)]

use std::os::fd::AsFd;
use std::ptr::NonNull;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

pub use berth_mount::fuse::{SLOTS, request_memory as create};
use rustix::io::Errno;
use rustix::mm::{MapFlags, ProtFlags};

use crate::fuse::REQUEST_ROOM;

/// In front of each request: how often its slot was found in use by a new server.
const HEAD: usize = 64;
const STRIDE: usize = HEAD + REQUEST_ROOM;
const _: () = assert!(STRIDE == berth_mount::fuse::SLOT);

/// The mapping of all slots, gone with the last of them.
#[derive(Debug)]
struct Mapping {
    start: NonNull<u8>,
}

// SAFETY: an address; what lies there is used by way of slots only.
unsafe impl Send for Mapping {}
// SAFETY: as above.
unsafe impl Sync for Mapping {}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: this was mapped in `map` with this length, and no slot is left that points into it.
        let _ = unsafe { rustix::mm::munmap(self.start.as_ptr().cast(), STRIDE * SLOTS) };
    }
}

/// One worker's slot.
#[derive(Debug)]
pub struct Slot {
    start: NonNull<u8>,
    _mapping: Arc<Mapping>,
}

// SAFETY: a slot is the only one of this process at its address, and may be used by any one thread.
unsafe impl Send for Slot {}

/// Maps the memory that [`create`] made, for as long as there are slots. Call this once a connection and process.
pub fn map(fd: impl AsFd) -> Result<Vec<Slot>, Errno> {
    // Refuse another memory: touching pages beyond its end would kill the process.
    if rustix::fs::fstat(&fd)?.st_size != (STRIDE * SLOTS) as i64 {
        return Err(Errno::INVAL);
    }
    // SAFETY: a new mapping at an address that the kernel chooses; its size was just checked.
    let start = unsafe {
        rustix::mm::mmap(
            std::ptr::null_mut(),
            STRIDE * SLOTS,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::SHARED,
            &fd,
            0,
        )
    }?;
    let start = NonNull::new(start.cast::<u8>()).ok_or(Errno::INVAL)?;
    let mapping = Arc::new(Mapping { start });
    Ok((0..SLOTS)
        .map(|index| Slot {
            // SAFETY: within the mapping, which stays as long as the slot.
            start: unsafe { start.add(index * STRIDE) },
            _mapping: Arc::clone(&mapping),
        })
        .collect())
}

impl Slot {
    /// Room for a request.
    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: these bytes are this slot's alone. The holder maps nothing, and a server that had them is dead before
        // the next one starts; were it not, bytes could change, which no reader of requests relies on not to happen.
        unsafe { std::slice::from_raw_parts_mut(self.start.add(HEAD).as_ptr(), REQUEST_ROOM) }
    }

    /// Whether a request lies here that may not have been answered.
    pub fn in_use(&mut self) -> bool {
        self.bytes()[..4] != [0; 4]
    }

    /// Counts one more try to answer what lies here; gives how many there were before.
    pub fn count_try(&self) -> u32 {
        self.tries().fetch_add(1, Ordering::Relaxed)
    }

    /// The request was answered.
    pub fn clear(&mut self) {
        self.bytes()[..16].fill(0);
        self.tries().store(0, Ordering::Relaxed);
    }

    fn tries(&self) -> &AtomicU32 {
        // SAFETY: the head's first bytes, aligned to 64, used only as this atomic.
        unsafe { self.start.cast::<AtomicU32>().as_ref() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_one_server_took_the_next_one_finds() {
        let fd = create().unwrap();
        let mut first = map(&fd).unwrap();
        assert!(first.iter_mut().all(|slot| !slot.in_use()));
        first[3].bytes()[..5].copy_from_slice(&[56, 0, 0, 0, 7]);
        assert_eq!(first[3].count_try(), 0);
        let mut second = map(&fd).unwrap();
        let taken: Vec<_> = (0..SLOTS).filter(|i| second[*i].in_use()).collect();
        assert_eq!(taken, [3]);
        assert_eq!(second[3].bytes()[4], 7);
        assert_eq!(second[3].count_try(), 1);
        second[3].clear();
        assert!(!second[3].in_use());
        assert_eq!(second[3].count_try(), 0);
    }

    #[test]
    fn memory_of_another_size_is_refused() {
        let fd = rustix::fs::memfd_create("x", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::fs::ftruncate(&fd, 4096).unwrap();
        assert_eq!(map(&fd).unwrap_err(), Errno::INVAL);
    }
}
