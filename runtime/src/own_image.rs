//! `--container=/path/my.sqsh`: a SquashFS file that nobody sealed.
//!
//! The kernel's driver never sees it. The file is opened by a child that is wholly the job's user; our own reader serves
//! it through FUSE, in a process under the node service's uid, where the user can neither stop nor trace it: whoever
//! could stop the server of a mount could make the node's processes wait in it for ever. Every request has a deadline in
//! the server, and when its keeper ends, or the mount, so does it.

use std::ffi::OsString;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags, fstat, openat2};
use rustix::io::Errno;

use crate::refusal::{Refusal, code};
use crate::sys::Child;
use crate::text::{plain, shown};
use crate::user::User;
use crate::user_view::server::{As, Bytes, Server};

/// Opens the file with the rights of this process, which is wholly the user.
pub(crate) fn open(path: &Path) -> Result<OwnedFd, Refusal> {
    let name = shown(path);
    // Without waiting for anybody, should it be a FIFO.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS);
    let file = file.map_err(|errno| {
        let line = format!("cannot open the image `{name}`: {}", plain(&errno.into()));
        let code = match errno {
            Errno::ACCESS | Errno::PERM => code::PERMISSION,
            _ => code::USAGE,
        };
        Refusal::new(code, line).hint("the path is opened on the node, with your rights")
    })?;
    match fstat(&file).map(|stat| FileType::from_raw_mode(stat.st_mode)) {
        Ok(FileType::RegularFile) => Ok(file),
        _ => Err(
            Refusal::new(code::USAGE, format!("the image `{name}` is not a file"))
                .hint("give a reference (docker://…) or a SquashFS file"),
        ),
    }
}

/// A served file; its server ends with this.
#[derive(Debug)]
pub(crate) struct OwnImage {
    name: String,
    data: OwnedFd,
    options: Vec<OsString>,
    server_user: String,
    keepers: Vec<Child>,
}

impl OwnImage {
    /// `data` as [`open`] gave it. `owner` is whom everything in the image is to belong to, where that is not to be as
    /// the image says.
    pub(crate) fn new(path: &Path, data: OwnedFd, owner: Option<&User>, server_user: &str) -> Self {
        let owner = owner.map(|user| format!("--owner={}:{}", user.uid, user.gid).into());
        OwnImage {
            name: shown(path),
            data,
            options: owner.into_iter().collect(),
            server_user: server_user.to_owned(),
            keepers: Vec::new(),
        }
    }

    /// A mount of the image, attached nowhere, `ro,nosuid,nodev`, with a server of its own.
    pub(crate) fn mount(&mut self) -> Result<OwnedFd, Refusal> {
        let bytes = Bytes {
            file: Some(self.data.as_fd()),
            options: &self.options,
            grant: None,
        };
        let server = Server::start(&bytes, &self.name, As::Service(&self.server_user))?;
        let (mount, keeper) = server.mount()?;
        self.keepers.extend(keeper);
        Ok(mount)
    }
}
