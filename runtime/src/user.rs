//! The job's user: who it is, and becoming it for good.

use std::io;
use std::path::PathBuf;

use rustix::process::{DumpableBehavior, Gid, Signal, Uid};
use rustix::thread::{CapabilitySet, CapabilitySets};

use crate::wire::Fields;

/// Numbers a process runs under.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups.
    pub groups: Vec<u32>,
}

/// What the node's account database says of a user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Account {
    pub name: String,
    pub home: PathBuf,
    /// The user's groups, the primary one first.
    pub groups: Vec<(u32, String)>,
    /// Other users that programs in the container look up by name: Slurm's.
    pub others: Vec<(String, u32, u32)>,
}

impl Account {
    /// From the fields of a message: `name`, `home`, `group=GID:NAME`, `other=UID:GID:NAME`.
    pub(crate) fn read(body: &[u8]) -> Account {
        let fields = Fields(body);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let groups = fields.all("group").filter_map(|g| {
            let g = text(g);
            let (gid, name) = g.split_once(':')?;
            Some((gid.parse().ok()?, name.to_owned()))
        });
        let others = fields.all("other").filter_map(|o| {
            let o = text(o);
            let mut parts = o.splitn(3, ':');
            let (uid, gid) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
            Some((parts.next()?.to_owned(), uid, gid))
        });
        Account {
            name: text(fields.get("name").unwrap_or_default()),
            home: fields.path("home").unwrap_or_else(|| PathBuf::from("/")),
            groups: groups.collect(),
            others: others.collect(),
        }
    }
}

/// Lets go of the groups that slurmstepd has, which are the user's: what is made here belongs to root.
pub(crate) fn be_root_alone() -> io::Result<()> {
    rustix::thread::set_thread_groups(&[])?;
    rustix::thread::set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)?;
    Ok(())
}

/// Lets go of every capability, since root on a node is not to mean more than the files say, and of the ways to get
/// one; nobody but root can trace this process, and it ends with its parent.
pub(crate) fn stay_for_good() -> io::Result<()> {
    drop_privileges()?;
    rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable)?;
    // After the change of identity, which clears it.
    rustix::process::set_parent_process_death_signal(Some(Signal::KILL))?;
    Ok(())
}

/// Lets go of every capability, and of what an exec could give.
pub(crate) fn drop_privileges() -> io::Result<()> {
    // The kernel emptied them at a change of identity, unless the user is root.
    let none = CapabilitySet::empty();
    let sets = CapabilitySets {
        effective: none,
        permitted: none,
        inheritable: none,
    };
    rustix::thread::set_capabilities(None, sets)?;
    rustix::thread::set_no_new_privs(true)?;
    Ok(())
}

impl User {
    /// Whoever this process is.
    pub(crate) fn own() -> io::Result<User> {
        let groups = rustix::process::getgroups()?;
        Ok(User {
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            groups: groups.into_iter().map(Gid::as_raw).collect(),
        })
    }

    /// Turns this process wholly into the user: no identity, capability or group of root's is left, none can come
    /// back, the user cannot trace it, and it ends with its parent. There is no way back.
    pub(crate) fn become_for_good(&self) -> io::Result<()> {
        let raw = |id: u32| {
            (id != u32::MAX)
                .then_some(id)
                .ok_or(io::ErrorKind::InvalidInput)
        };
        let uid = Uid::from_raw(raw(self.uid)?);
        let gid = Gid::from_raw(raw(self.gid)?);
        let mut groups = Vec::with_capacity(self.groups.len());
        for group in &self.groups {
            groups.push(Gid::from_raw(raw(*group)?));
        }
        rustix::thread::set_thread_groups(&groups)?;
        rustix::thread::set_thread_res_gid(gid, gid, gid)?;
        rustix::thread::set_thread_res_uid(uid, uid, uid)?;
        stay_for_good()
    }

    /// Asks the account database, as whoever this process is, for this user and for `others`. Users it does not know
    /// get a name made of their number.
    pub(crate) fn look_up(&self, others: &[String]) -> Account {
        let entry = nix::unistd::User::from_uid(nix::unistd::Uid::from_raw(self.uid));
        let (name, home) = match entry {
            Ok(Some(entry)) => (entry.name, entry.dir),
            _ => (format!("user{}", self.uid), PathBuf::from("/")),
        };
        let mut groups: Vec<(u32, String)> = Vec::new();
        for gid in std::iter::once(&self.gid).chain(&self.groups) {
            if groups.iter().any(|(known, _)| known == gid) {
                continue;
            }
            let entry = nix::unistd::Group::from_gid(nix::unistd::Gid::from_raw(*gid));
            let name = match entry {
                Ok(Some(group)) => group.name,
                _ => format!("group{gid}"),
            };
            groups.push((*gid, name));
        }
        let others = others
            .iter()
            .filter_map(|name| nix::unistd::User::from_name(name).ok().flatten())
            .map(|u| (u.name, u.uid.as_raw(), u.gid.as_raw()))
            .filter(|(_, uid, _)| *uid != self.uid)
            .collect();
        Account {
            name,
            home,
            groups,
            others,
        }
    }
}
