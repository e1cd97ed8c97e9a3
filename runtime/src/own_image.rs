//! `--container=/path/my.sqsh`: a SquashFS file that nobody sealed.
//!
//! The kernel's driver never sees it. The file is opened by a child that is wholly the job's user, which gives it
//! straight to a server under a uid that nobody has, in a cage; our own reader serves it there through FUSE, where the user
//! can neither stop nor trace it: whoever could stop the server of a mount could make the node's processes wait in it for
//! ever. Root has no descriptor of the file. Every request has a deadline in the server, which ends with the mount.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

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

/// A served file; its servers end with this.
#[derive(Debug)]
pub(crate) struct OwnImage {
    path: PathBuf,
    user: User,
    options: Vec<OsString>,
    servers: Vec<Child>,
}

impl OwnImage {
    /// The file at `path`, as `user` can open it. `as_users`: everything in the image is to belong to the user, whatever
    /// it says.
    pub(crate) fn new(path: &Path, user: &User, as_users: bool) -> Self {
        let owner = as_users.then(|| format!("--owner={}:{}", user.uid, user.gid).into());
        OwnImage {
            path: path.to_owned(),
            user: user.clone(),
            options: owner.into_iter().collect(),
            servers: Vec::new(),
        }
    }

    /// A mount of the image, attached nowhere, `ro,nosuid,nodev`, with a server of its own.
    pub(crate) fn mount(&mut self) -> Result<OwnedFd, Refusal> {
        let bytes = Bytes {
            file: None,
            options: &self.options,
            grant: None,
        };
        let who = As::Apart {
            path: &self.path,
            user: &self.user,
        };
        let server = Server::start(&bytes, &shown(&self.path), who)?;
        let (mount, server) = server.mount()?;
        self.servers.extend(server);
        Ok(mount)
    }
}
