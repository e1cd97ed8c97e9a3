//! The FUSE wire format: what the kernel sends and what it takes, as of protocol 7.31 and later.
//!
//! All numbers have the machine's byte order. Requests are read field by field from a slice and replies are put
//! together in a `Vec`, so that no struct is laid over bytes. Names are those of the kernel's `linux/fuse.h`.

/// Protocol version spoken; a kernel with another major version is refused, an older minor one down to
/// [`MINOR_NEEDED`] is followed.
pub const MAJOR: u32 = 7;
/// See [`MAJOR`]. What later versions add is not asked for.
pub const MINOR: u32 = 38;
/// Linux 5.4 has it: cached symlinks, OPEN and OPENDIR that may be left out.
pub const MINOR_NEEDED: u32 = 31;

/// The root folder's node id.
pub const ROOT_ID: u64 = 1;
/// Bytes before every request's own.
pub const IN_HEADER: usize = 40;
/// Bytes before every reply's own.
pub const OUT_HEADER: usize = 16;

/// Requests, by their numbers.
#[allow(missing_docs, reason = "the names are the kernel's")]
pub mod op {
    pub const LOOKUP: u32 = 1;
    pub const FORGET: u32 = 2;
    pub const GETATTR: u32 = 3;
    pub const SETATTR: u32 = 4;
    pub const READLINK: u32 = 5;
    pub const SYMLINK: u32 = 6;
    pub const MKNOD: u32 = 8;
    pub const MKDIR: u32 = 9;
    pub const UNLINK: u32 = 10;
    pub const RMDIR: u32 = 11;
    pub const RENAME: u32 = 12;
    pub const LINK: u32 = 13;
    pub const OPEN: u32 = 14;
    pub const READ: u32 = 15;
    pub const WRITE: u32 = 16;
    pub const STATFS: u32 = 17;
    pub const RELEASE: u32 = 18;
    pub const SETXATTR: u32 = 21;
    pub const GETXATTR: u32 = 22;
    pub const LISTXATTR: u32 = 23;
    pub const REMOVEXATTR: u32 = 24;
    pub const INIT: u32 = 26;
    pub const OPENDIR: u32 = 27;
    pub const READDIR: u32 = 28;
    pub const RELEASEDIR: u32 = 29;
    pub const CREATE: u32 = 35;
    pub const INTERRUPT: u32 = 36;
    pub const DESTROY: u32 = 38;
    pub const BATCH_FORGET: u32 = 42;
    pub const READDIRPLUS: u32 = 44;
    pub const RENAME2: u32 = 45;
    pub const TMPFILE: u32 = 51;
}

/// Flags of INIT.
#[allow(missing_docs, reason = "the names are the kernel's")]
pub mod init {
    pub const ASYNC_READ: u32 = 1 << 0;
    pub const DO_READDIRPLUS: u32 = 1 << 13;
    pub const ASYNC_DIO: u32 = 1 << 15;
    pub const NO_OPEN_SUPPORT: u32 = 1 << 17;
    pub const PARALLEL_DIROPS: u32 = 1 << 18;
    pub const ABORT_ERROR: u32 = 1 << 21;
    pub const MAX_PAGES: u32 = 1 << 22;
    pub const CACHE_SYMLINKS: u32 = 1 << 23;
    pub const NO_OPENDIR_SUPPORT: u32 = 1 << 24;
    pub const EXPLICIT_INVAL_DATA: u32 = 1 << 25;
}

/// What an answered INIT says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InitIn {
    /// The kernel's protocol version.
    pub major: u32,
    /// See `major`.
    pub minor: u32,
    /// Bytes the kernel would read ahead at most.
    pub max_readahead: u32,
    /// What it offers.
    pub flags: u32,
}

/// A request: its header and what follows.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// Which request: see [`op`].
    pub opcode: u32,
    /// The answer names this.
    pub unique: u64,
    /// Which file.
    pub node: u64,
    /// The user that asks, as numbered in the user namespace of the mount.
    pub uid: u32,
    /// The thread that asks, as numbered in the pid namespace of who made the mount; 0 if it has no number there.
    pub pid: u32,
    /// What the opcode adds.
    pub body: &'a [u8],
}

impl<'a> Request<'a> {
    /// Takes a request apart; `None` if `bytes` is shorter than it says.
    pub fn parse(bytes: &'a [u8]) -> Option<Self> {
        let len = u32_at(bytes, 0)? as usize;
        if len < IN_HEADER {
            return None;
        }
        Some(Self {
            opcode: u32_at(bytes, 4)?,
            unique: u64_at(bytes, 8)?,
            node: u64_at(bytes, 16)?,
            uid: u32_at(bytes, 24)?,
            pid: u32_at(bytes, 32)?,
            body: bytes.get(IN_HEADER..len)?,
        })
    }

    /// The NUL-ended name that starts at `at` of the body.
    pub fn name(&self, at: usize) -> Option<&'a [u8]> {
        let rest = self.body.get(at..)?;
        let end = rest.iter().position(|byte| *byte == 0)?;
        Some(&rest[..end])
    }

    /// The body of READ, READDIR and READDIRPLUS: offset and size.
    pub fn read_in(&self) -> Option<(u64, u32)> {
        Some((u64_at(self.body, 8)?, u32_at(self.body, 16)?))
    }

    /// The body of GETXATTR and LISTXATTR: how much room the caller has, 0 to ask for the size.
    pub fn xattr_room(&self) -> Option<u32> {
        u32_at(self.body, 0)
    }

    /// The body of INIT.
    pub fn init_in(&self) -> Option<InitIn> {
        Some(InitIn {
            major: u32_at(self.body, 0)?,
            minor: u32_at(self.body, 4)?,
            max_readahead: u32_at(self.body, 8)?,
            flags: u32_at(self.body, 12)?,
        })
    }

    /// The body of INTERRUPT: which request is no longer wanted.
    pub fn interrupted(&self) -> Option<u64> {
        u64_at(self.body, 0)
    }
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let field = bytes.get(at..at + 4)?;
    Some(u32::from_ne_bytes(field.try_into().ok()?))
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    let field = bytes.get(at..at + 8)?;
    Some(u64::from_ne_bytes(field.try_into().ok()?))
}

/// A reply's header, in front of `body` bytes.
pub fn out_header(unique: u64, errno: i32, body: usize) -> [u8; OUT_HEADER] {
    let mut header = [0; OUT_HEADER];
    header[..4].copy_from_slice(&((OUT_HEADER + body) as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&(-errno).to_ne_bytes());
    header[8..].copy_from_slice(&unique.to_ne_bytes());
    header
}

/// How long the kernel may keep names, attributes and the absence of names, in seconds: an image never changes.
const FOREVER: u64 = u32::MAX as u64;

/// What `stat` shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs, reason = "the fields are stat's")]
pub struct Attr {
    pub ino: u64,
    pub size: u64,
    pub mtime: u64,
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub rdev: u32,
}

/// Puts together what a reply carries.
pub trait Put {
    /// A 32-bit number.
    fn u32(&mut self, value: u32);
    /// A 64-bit number.
    fn u64(&mut self, value: u64);
    /// `fuse_attr`, 88 bytes.
    fn attr(&mut self, attr: &Attr);
    /// `fuse_attr_out`.
    fn attr_out(&mut self, attr: &Attr);
    /// `fuse_entry_out`, 128 bytes; without a node it says, for good, that there is none.
    fn entry_out(&mut self, node: Option<(u64, Attr)>);
    /// `fuse_dirent` and its name, padded; 24 bytes before the name.
    fn dirent(&mut self, ino: u64, next: u64, kind: u32, name: &[u8]);
}

/// Bytes of `fuse_entry_out`.
pub const ENTRY_OUT: usize = 128;

/// Bytes of an entry of READDIR with a name of this length.
pub fn dirent_len(name: usize) -> usize {
    (24 + name).next_multiple_of(8)
}

impl Put for Vec<u8> {
    fn u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_ne_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_ne_bytes());
    }

    fn attr(&mut self, attr: &Attr) {
        self.u64(attr.ino);
        self.u64(attr.size);
        self.u64(attr.size.div_ceil(512));
        for _ in 0..3 {
            self.u64(attr.mtime);
        }
        for _ in 0..3 {
            self.u32(0);
        }
        self.u32(attr.mode);
        self.u32(attr.nlink);
        self.u32(attr.uid);
        self.u32(attr.gid);
        self.u32(attr.rdev);
        self.u32(4096);
        self.u32(0);
    }

    fn attr_out(&mut self, attr: &Attr) {
        self.u64(FOREVER);
        self.u32(0);
        self.u32(0);
        self.attr(attr);
    }

    fn entry_out(&mut self, node: Option<(u64, Attr)>) {
        self.u64(node.map_or(0, |(id, _)| id));
        self.u64(0);
        self.u64(FOREVER);
        self.u64(FOREVER);
        self.u32(0);
        self.u32(0);
        match node {
            Some((_, attr)) => self.attr(&attr),
            None => self.resize(self.len() + 88, 0),
        }
    }

    fn dirent(&mut self, ino: u64, next: u64, kind: u32, name: &[u8]) {
        let end = self.len() + dirent_len(name.len());
        self.u64(ino);
        self.u64(next);
        self.u32(name.len() as u32);
        self.u32(kind);
        self.extend_from_slice(name);
        self.resize(end, 0);
    }
}
