//! The mount namespace in which kept mounts hang.
//!
//! It is one thread's own, with an empty root, so that it holds nothing of the node's but the mounts put there: nobody
//! sees them, no unmount elsewhere is held up by a copy, and they go with the process. A mount must hang somewhere to
//! be cloned: kernels before 6.15 clone nothing that is detached.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{CWD, Mode};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount,
    mount_change, move_mount, open_tree, unmount,
};

use crate::setup::Failure;

/// A mount in the den, by its folder's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Berth(u64);

enum Order {
    Put(OwnedFd, Sender<Result<Berth, Errno>>),
    Clone(Berth, Sender<Result<OwnedFd, Errno>>),
    Drop(Berth),
}

/// The way to the thread in there.
#[derive(Debug, Clone)]
pub(crate) struct Den {
    orders: Sender<Order>,
}

impl Den {
    /// Makes the namespace; `folder` is a folder that will be covered, inside it only.
    pub(crate) fn new(folder: &Path) -> Result<Self, Failure> {
        let (orders, inbox) = channel();
        let (ready, made) = channel();
        let folder = folder.to_owned();
        let thread = std::thread::Builder::new().name("den".into());
        thread
            .spawn(move || {
                let entered = enter(&folder);
                let well = entered.is_ok();
                let _ = ready.send(entered);
                if well {
                    obey(&inbox);
                }
            })
            .map_err(|e| Failure::system("cannot start a thread", e))?;
        match made.recv() {
            Ok(Ok(())) => Ok(Self { orders }),
            Ok(Err((step, errno))) => Err(Failure::system(
                &format!("cannot make a mount namespace ({step})"),
                errno,
            )),
            Err(_) => Err(Failure::new(Failure::INTERNAL, "a thread ended")),
        }
    }

    /// Hangs a detached mount up.
    pub(crate) fn put(&self, mount: OwnedFd) -> Result<Berth, Errno> {
        let (answer, answered) = channel();
        let _ = self.orders.send(Order::Put(mount, answer));
        answered.recv().unwrap_or(Err(Errno::SRCH))
    }

    /// One more detached mount of the same.
    pub(crate) fn clone_of(&self, berth: Berth) -> Result<OwnedFd, Errno> {
        let (answer, answered) = channel();
        let _ = self.orders.send(Order::Clone(berth, answer));
        answered.recv().unwrap_or(Err(Errno::SRCH))
    }

    /// Lets go of it; clones stay.
    pub(crate) fn drop_of(&self, berth: Berth) {
        let _ = self.orders.send(Order::Drop(berth));
    }
}

/// Moves this thread into a namespace with nothing in it.
fn enter(folder: &Path) -> Result<(), (&'static str, Errno)> {
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_FS)
        .map_err(|e| ("unshare", Errno::from_raw_os_error(e as i32)))?;
    let step = |name: &'static str| move |errno: Errno| (name, errno);
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(step("private"))?;
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("berth", folder, "tmpfs", flags, c"mode=700,size=1m").map_err(step("tmpfs"))?;
    rustix::process::chdir(folder).map_err(step("chdir"))?;
    rustix::process::pivot_root(".", ".").map_err(step("pivot_root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(step("unmount"))?;
    rustix::process::chdir("/").map_err(step("chdir"))
}

fn obey(inbox: &Receiver<Order>) {
    let mut next = 0;
    let folder = |Berth(number): Berth| format!("/{number}");
    for order in inbox {
        match order {
            Order::Put(mount, answer) => {
                let berth = Berth(next);
                next += 1;
                let _ = answer.send(put(&mount, &folder(berth)).map(|()| berth));
            }
            Order::Clone(berth, answer) => {
                let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
                let _ = answer.send(open_tree(CWD, folder(berth), flags));
            }
            Order::Drop(berth) => {
                let folder = folder(berth);
                let _ = unmount(&folder, UnmountFlags::DETACH);
                let _ = rustix::fs::rmdir(&folder);
            }
        }
    }
}

fn put(mount: &OwnedFd, folder: &str) -> Result<(), Errno> {
    rustix::fs::mkdir(folder, Mode::from(0o700))?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(mount.as_fd(), c"", CWD, folder, flags)
}
