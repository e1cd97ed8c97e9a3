//! The ioctls of the loop driver (`linux/loop.h`), as safe functions.
#![allow(
    unsafe_code,
    reason = "the loop driver is reachable by ioctl only; each call names its structure"
)]

use std::ffi::c_void;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use rustix::io::{Errno, Result};
use rustix::ioctl::{Ioctl, IoctlOutput, Opcode, ioctl};

const LOOP_GET_STATUS64: Opcode = 0x4C05;
const LOOP_CONFIGURE: Opcode = 0x4C0A;
const LOOP_CTL_GET_FREE: Opcode = 0x4C82;

/// The device gives no writes to its file.
pub(crate) const LO_FLAGS_READ_ONLY: u32 = 1;
/// The device lets go of its file when its last opener closes.
pub(crate) const LO_FLAGS_AUTOCLEAR: u32 = 4;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy, Debug)]
pub(crate) struct LoopInfo {
    pub(crate) device: u64,
    pub(crate) inode: u64,
    pub(crate) rdevice: u64,
    pub(crate) offset: u64,
    pub(crate) sizelimit: u64,
    pub(crate) number: u32,
    pub(crate) encrypt_type: u32,
    pub(crate) encrypt_key_size: u32,
    pub(crate) flags: u32,
    pub(crate) file_name: [u8; 64],
    pub(crate) crypt_name: [u8; 64],
    pub(crate) encrypt_key: [u8; 32],
    pub(crate) init: [u64; 2],
}

impl LoopInfo {
    pub(crate) const fn empty() -> Self {
        LoopInfo {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            sizelimit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: 0,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

const _: () = assert!(size_of::<LoopInfo>() == 232 && size_of::<LoopConfig>() == 304);

/// One request: its number and where its argument lies.
struct Request<T> {
    opcode: Opcode,
    argument: T,
}

// SAFETY: `as_ptr` points at the argument for as long as the request lives, and each user below pairs an opcode with
// the structure that opcode reads or fills.
unsafe impl<T> Ioctl for Request<&mut T> {
    type Output = IoctlOutput;
    const IS_MUTATING: bool = true;

    fn opcode(&self) -> Opcode {
        self.opcode
    }

    fn as_ptr(&mut self) -> *mut c_void {
        std::ptr::from_mut(self.argument).cast()
    }

    unsafe fn output_from_ptr(out: IoctlOutput, _: *mut c_void) -> Result<IoctlOutput> {
        Ok(out)
    }
}

/// What the device serves now; `ENXIO` when it serves nothing.
pub(crate) fn loop_status(device: BorrowedFd<'_>) -> Result<LoopInfo> {
    let mut info = LoopInfo::empty();
    let request = Request {
        opcode: LOOP_GET_STATUS64,
        argument: &mut info,
    };
    // SAFETY: LOOP_GET_STATUS64 fills exactly one `struct loop_info64`.
    unsafe { ioctl(device, request)? };
    Ok(info)
}

/// Makes `device` serve `file` as `info` says; `EBUSY` when it already serves one.
pub(crate) fn loop_configure(
    device: BorrowedFd<'_>,
    file: BorrowedFd<'_>,
    info: LoopInfo,
) -> Result<()> {
    let mut config = LoopConfig {
        fd: u32::try_from(file.as_raw_fd()).map_err(|_| Errno::BADF)?,
        block_size: 0,
        info,
        reserved: [0; 8],
    };
    let request = Request {
        opcode: LOOP_CONFIGURE,
        argument: &mut config,
    };
    // SAFETY: LOOP_CONFIGURE reads exactly one `struct loop_config`.
    unsafe { ioctl(device, request)? };
    Ok(())
}

/// The number of a device that served nothing a moment ago; the kernel makes one if there is none.
pub(crate) fn loop_get_free(control: impl AsFd) -> Result<u32> {
    let mut unused = 0u8;
    let request = Request {
        opcode: LOOP_CTL_GET_FREE,
        argument: &mut unused,
    };
    // SAFETY: LOOP_CTL_GET_FREE ignores its argument and returns a number.
    let number = unsafe { ioctl(control, request)? };
    u32::try_from(number).map_err(|_| Errno::INVAL)
}
