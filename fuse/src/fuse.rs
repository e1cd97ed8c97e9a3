//! From a request to its answer: takes requests apart, asks a [`FileSystem`], puts answers together. Nothing else: no file
//! descriptor, no thread, no clock, so that tests speak the protocol without a mount.

use rustix::io::Errno;

use crate::abi::{self, InitIn, Put, Request, init, op};
use crate::filesystem::FileSystem;

/// What is to be done with a request.
#[derive(Debug, PartialEq, Eq)]
pub enum Action {
    /// Send this error, or the body that was put together.
    Answer(Result<(), Errno>),
    /// It wants no answer.
    Nothing,
    /// Answer `unique` with EINTR if it is still being worked on.
    Interrupt(u64),
}

/// Largest read the kernel may send, in 4 KiB pages: 1 MiB.
const MAX_PAGES: u16 = 256;
/// Most bytes that the kernel may read ahead, should root tell it to.
const MAX_READAHEAD: u32 = berth_mount::fuse::READ_AHEAD_KIB << 10;
/// Largest WRITE: never sent, as the mount is read-only, but it bounds how big a request can be.
const MAX_WRITE: u32 = 4096;
/// Room that a request needs: the kernel refuses a smaller buffer.
pub const REQUEST_ROOM: usize = 8192;

/// What is used of what the kernel offers.
const WANTED: u32 = init::ASYNC_READ
    | init::DO_READDIRPLUS
    | init::ASYNC_DIO
    | init::NO_OPEN_SUPPORT
    | init::PARALLEL_DIROPS
    | init::ABORT_ERROR
    | init::MAX_PAGES
    | init::CACHE_SYMLINKS
    | init::NO_OPENDIR_SUPPORT
    | init::EXPLICIT_INVAL_DATA;

/// Answers one request; the answer's body goes to `out`, which is empty.
pub fn dispatch(fs: &dyn FileSystem, request: &Request<'_>, out: &mut Vec<u8>) -> Action {
    match request.opcode {
        op::FORGET | op::BATCH_FORGET => Action::Nothing,
        op::INTERRUPT => match request.interrupted() {
            Some(unique) => Action::Interrupt(unique),
            None => Action::Nothing,
        },
        _ => Action::Answer(answer(fs, request, out)),
    }
}

fn answer(fs: &dyn FileSystem, request: &Request<'_>, out: &mut Vec<u8>) -> Result<(), Errno> {
    let node = request.node;
    match request.opcode {
        op::INIT => negotiate(request.init_in().ok_or(Errno::INVAL)?, out)?,
        op::LOOKUP => out.entry_out(fs.lookup(node, request.name(0).ok_or(Errno::INVAL)?)?),
        op::GETATTR => out.attr_out(&fs.getattr(node)?),
        op::READLINK => *out = fs.readlink(node)?,
        op::READ => {
            let (offset, size) = request.read_in().ok_or(Errno::INVAL)?;
            out.resize((size as usize).min(usize::from(MAX_PAGES) * 4096), 0);
            let len = fs.read(node, offset, out)?;
            out.truncate(len);
        }
        op::READDIR | op::READDIRPLUS => {
            let (offset, size) = request.read_in().ok_or(Errno::INVAL)?;
            let room = (size as usize).min(usize::from(MAX_PAGES) * 4096);
            let plus = request.opcode == op::READDIRPLUS;
            fs.readdir(node, offset, room, plus, out)?;
        }
        op::STATFS => fs.size().put(out),
        // Said once, the kernel does not ask again.
        op::GETXATTR | op::LISTXATTR if !fs.has_xattrs() => return Err(Errno::NOSYS),
        op::GETXATTR => {
            let room = request.xattr_room().ok_or(Errno::INVAL)?;
            let name = request.name(8).ok_or(Errno::INVAL)?;
            xattr_out(fs.getxattr(node, name)?, room, out)?;
        }
        op::LISTXATTR => {
            let room = request.xattr_room().ok_or(Errno::INVAL)?;
            xattr_out(fs.listxattr(node)?, room, out)?;
        }
        op::DESTROY => {}
        op::SETATTR
        | op::SYMLINK
        | op::MKNOD
        | op::MKDIR
        | op::UNLINK
        | op::RMDIR
        | op::RENAME
        | op::RENAME2
        | op::LINK
        | op::WRITE
        | op::SETXATTR
        | op::REMOVEXATTR
        | op::CREATE
        | op::TMPFILE => return Err(Errno::ROFS),
        // OPEN and OPENDIR among them: "no need to open" lets the kernel keep its caches and ask nothing more. FLUSH
        // too, so that a server which has a file of its own mount open can end.
        _ => return Err(Errno::NOSYS),
    }
    Ok(())
}

/// Answers INIT.
fn negotiate(kernel: InitIn, out: &mut Vec<u8>) -> Result<(), Errno> {
    let needed = init::NO_OPEN_SUPPORT | init::NO_OPENDIR_SUPPORT;
    if kernel.major == abi::MAJOR
        && (kernel.minor < abi::MINOR_NEEDED || kernel.flags & needed != needed)
        || kernel.major < abi::MAJOR
    {
        tracing::error!(
            major = kernel.major,
            minor = kernel.minor,
            "this kernel's fuse is too old"
        );
        return Err(Errno::PROTO);
    }
    out.u32(abi::MAJOR);
    out.u32(abi::MINOR.min(kernel.minor));
    // The kernel takes what it offers, or what root has set meanwhile.
    out.u32(MAX_READAHEAD.max(kernel.max_readahead));
    out.u32(WANTED & kernel.flags);
    // Requests in the background (readahead) at once, and how many count as congestion.
    out.extend_from_slice(&64u16.to_ne_bytes());
    out.extend_from_slice(&48u16.to_ne_bytes());
    out.u32(MAX_WRITE);
    // Times are whole seconds.
    out.u32(1_000_000_000);
    out.extend_from_slice(&MAX_PAGES.to_ne_bytes());
    // map_alignment, flags2, unused.
    out.resize(64, 0);
    Ok(())
}

fn xattr_out(value: Vec<u8>, room: u32, out: &mut Vec<u8>) -> Result<(), Errno> {
    if room == 0 {
        out.u32(value.len() as u32);
        out.u32(0);
    } else if value.len() > room as usize {
        return Err(Errno::RANGE);
    } else {
        *out = value;
    }
    Ok(())
}
