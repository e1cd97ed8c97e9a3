//! Gives a writable container's files to its user: what root owns in the image belongs to the user in the view.
//!
//! Without that an ordinary user could write almost nowhere, since images are root's. It is an idmapped mount of this
//! one view (mount_setattr(2), `MOUNT_ATTR_IDMAP`): nothing is written, and no privilege comes with it, for the mount
//! stays nosuid and the files are seen by this job alone. Kernels whose SquashFS or overlayfs cannot do it leave the
//! owners as they are.

use std::fs;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};

use nix::sched::{CloneFlags, unshare};
use rustix::fs::{Mode, OFlags, open};

use crate::channel::Channel;
use crate::sys;
use crate::user::User;

/// A map of owners that shows root's files as the user's, and the other way round.
pub(super) struct Swap {
    namespace: OwnedFd,
}

impl Swap {
    /// Must come before anything is mounted over the root: a process that is not at its namespace's root makes no user
    /// namespace.
    pub(super) fn with_root(user: &User) -> io::Result<Swap> {
        let namespace = id_map(&swap_with_root(user.uid), &swap_with_root(user.gid))?;
        Ok(Swap { namespace })
    }

    /// Shows the owners of `image`, which is attached nowhere yet, by this map.
    pub(super) fn apply(&self, image: BorrowedFd<'_>) -> io::Result<()> {
        Ok(sys::mount_map_owners(image, &self.namespace)?)
    }
}

/// Lines of a `uid_map` that swap `id` and 0 and leave all others: what the file says, what is seen, how many.
fn swap_with_root(id: u32) -> String {
    if id == 0 {
        return format!("0 0 {}\n", u32::MAX);
    }
    let mut lines = format!("0 {id} 1\n{id} 0 1\n");
    if id > 1 {
        lines.push_str(&format!("1 1 {}\n", id - 1));
    }
    if let Some(rest @ 1..) = u32::MAX.checked_sub(id).map(|n| n - 1) {
        lines.push_str(&format!("{} {} {rest}\n", id + 1, id + 1));
    }
    lines
}

/// A user namespace with these maps, made in a child that does nothing else.
fn id_map(uids: &str, gids: &str) -> io::Result<OwnedFd> {
    let (ours, theirs) = Channel::pair()?;
    let child = sys::fork(|| {
        sys::die_with_parent();
        let ready = unshare(CloneFlags::CLONE_NEWUSER)
            .map_err(io::Error::from)
            .and_then(|()| theirs.send_wait(b"r", &[]))
            // Stays until the parent has what it needs, and is ended then.
            .and_then(|()| theirs.receive());
        i32::from(ready.is_err())
    })?;
    drop(theirs);
    drop(ours.receive()?.ok_or(io::ErrorKind::UnexpectedEof)?);
    let of_child = format!("/proc/{}", child.number());
    fs::write(format!("{of_child}/uid_map"), uids)?;
    fs::write(format!("{of_child}/gid_map"), gids)?;
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(open(format!("{of_child}/ns/user"), flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_is_mapped_once() {
        assert_eq!(
            swap_with_root(1000),
            "0 1000 1\n1000 0 1\n1 1 999\n1001 1001 4294966294\n"
        );
        assert_eq!(swap_with_root(1), "0 1 1\n1 0 1\n2 2 4294967293\n");
        assert_eq!(
            swap_with_root(u32::MAX - 1),
            "0 4294967294 1\n4294967294 0 1\n1 1 4294967293\n"
        );
    }
}
