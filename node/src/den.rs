//! The mount namespace in which kept mounts hang.
//!
//! It is one thread's own, with an empty root, so that it holds nothing of the node's but the mounts put there: nobody
//! sees them, no unmount elsewhere is held up by a copy, and they go with the process. A mount must hang somewhere to
//! be cloned: kernels before 6.15 clone nothing that is detached.

use std::collections::HashSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount,
    mount_change, move_mount, open_tree, unmount,
};

use serde::{Deserialize, Serialize};

use crate::setup::Failure;

/// How long the thread in there may take: it never waits for a filesystem, so this is for its bugs.
const PATIENCE: Duration = Duration::from_secs(10);

/// A mount in the den, by its folder's number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub(crate) struct Berth(pub(crate) u64);

enum Order {
    Put(OwnedFd, Sender<Result<Berth, Errno>>),
    Clone(Berth, Sender<Result<OwnedFd, Errno>>),
    Drop(Berth),
}

/// The way to the thread in there.
#[derive(Debug)]
pub(crate) struct Den {
    orders: Sender<Order>,
    /// For the next keeper.
    pub(crate) namespace: OwnedFd,
}

/// A den that another keeper left, and what is to stay in it.
#[derive(Debug)]
pub(crate) struct Old {
    pub(crate) namespace: OwnedFd,
    pub(crate) berths: HashSet<Berth>,
}

impl Den {
    /// Makes the namespace, or moves into the old one; `folder` is a folder that will be covered, inside it only.
    pub(crate) fn new(folder: &Path, old: Option<Old>) -> Result<Self, Failure> {
        let (orders, inbox) = channel();
        let (ready, made) = channel();
        let (last, end) = channel();
        let folder = folder.to_owned();
        let thread = std::thread::Builder::new().name("den".into());
        thread
            .spawn(move || {
                // There is no /proc in there.
                let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
                let links = rustix::fs::open("/proc/thread-self/ns", flags, Mode::empty());
                let links = links.map_err(|e| ("look at /proc", e));
                let (entered, next) = match old {
                    Some(old) => (enter_old(&old, &last), next_after(&old)),
                    None => (enter(&folder), 0),
                };
                let well = entered.is_ok();
                let _ = ready.send(entered.and_then(|()| own_namespace(&links?)));
                if well {
                    obey(&inbox, next, &last);
                }
            })
            .map_err(|e| Failure::system("cannot start a thread", e))?;
        // Whoever lets go of a mount last takes its filesystem down, which may wait: nobody waits for this one.
        let lets_go = std::thread::Builder::new().name("let-go".into());
        lets_go
            .spawn(move || end.into_iter().for_each(drop::<OwnedFd>))
            .map_err(|e| Failure::system("cannot start a thread", e))?;
        match made.recv() {
            Ok(Ok(namespace)) => Ok(Self { orders, namespace }),
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
        answered
            .recv_timeout(PATIENCE)
            .unwrap_or(Err(Errno::TIMEDOUT))
    }

    /// One more detached mount of the same.
    pub(crate) fn clone_of(&self, berth: Berth) -> Result<OwnedFd, Errno> {
        let (answer, answered) = channel();
        let _ = self.orders.send(Order::Clone(berth, answer));
        answered
            .recv_timeout(PATIENCE)
            .unwrap_or(Err(Errno::TIMEDOUT))
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

/// Moves this thread into a namespace of an earlier keeper's, and lets go of what nobody knows any more.
fn enter_old(old: &Old, last: &Sender<OwnedFd>) -> Result<(), (&'static str, Errno)> {
    let nix = |step: &'static str| move |e: nix::Error| (step, Errno::from_raw_os_error(e as i32));
    unshare(CloneFlags::CLONE_FS).map_err(nix("unshare"))?;
    setns(&old.namespace, CloneFlags::CLONE_NEWNS).map_err(nix("setns"))?;
    let root = rustix::fs::open("/", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
    let entries = root
        .and_then(rustix::fs::Dir::new)
        .map_err(|e| ("list", e))?;
    for entry in entries.flatten() {
        let number = entry.file_name().to_str().ok().and_then(|n| n.parse().ok());
        if let Some(berth) = number
            .map(Berth)
            .filter(|berth| !old.berths.contains(berth))
        {
            drop_berth(berth, last);
        }
    }
    Ok(())
}

fn next_after(old: &Old) -> u64 {
    old.berths.iter().map(|Berth(at)| at + 1).max().unwrap_or(0)
}

/// This thread's; the process as a whole stays in the node's.
fn own_namespace(links: &OwnedFd) -> Result<OwnedFd, (&'static str, Errno)> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    rustix::fs::openat(links, c"mnt", flags, Mode::empty()).map_err(|e| ("open", e))
}

fn obey(inbox: &Receiver<Order>, mut next: u64, last: &Sender<OwnedFd>) {
    for order in inbox {
        match order {
            Order::Put(mount, answer) => {
                let berth = Berth(next);
                next += 1;
                let done = put(&mount, &folder(berth)).map(|()| berth);
                if answer.send(done).is_err() {
                    drop_berth(berth, last);
                }
                // Where it was not hung up this was the last of it.
                let _ = last.send(mount);
            }
            Order::Clone(berth, answer) => {
                let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
                let _ = answer.send(open_tree(CWD, folder(berth), flags));
            }
            Order::Drop(berth) => drop_berth(berth, last),
        }
    }
}

fn folder(Berth(number): Berth) -> String {
    format!("/{number}")
}

/// Takes it out of the namespace, and leaves the end of its filesystem to another thread.
fn drop_berth(berth: Berth, last: &Sender<OwnedFd>) {
    let folder = folder(berth);
    // A reference and no more: its filesystem is not asked.
    let flags = OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if let Ok(mount) = open_tree(CWD, &folder, flags) {
        let _ = last.send(mount);
    }
    let _ = unmount(&folder, UnmountFlags::DETACH);
    let _ = rustix::fs::rmdir(&folder);
}

fn put(mount: &OwnedFd, folder: &str) -> Result<(), Errno> {
    rustix::fs::mkdir(folder, Mode::from(0o700))?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(mount.as_fd(), c"", CWD, folder, flags)
}
