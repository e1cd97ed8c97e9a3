//! A user namespace in which an ordinary user may mount, and what forbids that.

use std::fs;
use std::io;

use nix::sched::{CloneFlags, unshare};
use rustix::mount::{MountPropagationFlags, mount_change};

use crate::refusal::{Refusal, code};
use crate::text::plain;

/// Puts this process, which has one thread, into a user namespace in which it is who it was, and into a mount namespace
/// of that one: the node's later mounts still come, none go out.
pub(super) fn enter() -> Result<(), Refusal> {
    let uid = rustix::process::getuid().as_raw();
    let gid = rustix::process::getgid().as_raw();
    make(uid, gid).map_err(|error| forbidden(&error, Ban::of_this_machine()))?;
    mount_change(
        "/",
        MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC,
    )
    .map_err(|errno| forbidden(&errno.into(), Ban::of_this_machine()))
}

fn make(uid: u32, gid: u32) -> io::Result<()> {
    unshare(CloneFlags::CLONE_NEWUSER)?;
    // Without this no unprivileged process may write a gid_map.
    fs::write("/proc/self/setgroups", "deny")?;
    fs::write("/proc/self/uid_map", format!("{uid} {uid} 1\n"))?;
    fs::write("/proc/self/gid_map", format!("{gid} {gid} 1\n"))?;
    unshare(CloneFlags::CLONE_NEWNS)?;
    Ok(())
}

fn forbidden(error: &io::Error, ban: Option<Ban>) -> Refusal {
    let why = match ban {
        Some(ban) => ban.why().to_owned(),
        None => plain(error),
    };
    let line = format!("this machine lets ordinary users make no containers: {why}");
    let refusal = Refusal::new(code::UNAVAILABLE, line);
    refusal.hint(match ban {
        Some(ban) => format!("a job may still use the image; the admin can allow it here: {}", ban.cure()),
        None => "a job may still use the image: srun --container=… (or this runs inside another container)".into(),
    })
}

/// A setting that keeps ordinary users from mounting in a user namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ban {
    /// `user.max_user_namespaces = 0` (EL with hardening).
    None,
    /// `kernel.unprivileged_userns_clone = 0` (Debian's patch).
    Unprivileged,
    /// `kernel.apparmor_restrict_unprivileged_userns = 1` (Ubuntu 23.10 and later): they have no rights in one.
    AppArmor,
}

impl Ban {
    /// What this machine's settings say; `None` where they forbid nothing.
    #[must_use]
    pub fn of_this_machine() -> Option<Ban> {
        Ban::of(|name| {
            let text = fs::read_to_string(format!("/proc/sys/{name}")).ok()?;
            text.trim().parse().ok()
        })
    }

    fn of(setting: impl Fn(&str) -> Option<u64>) -> Option<Ban> {
        if setting("user/max_user_namespaces") == Some(0) {
            Some(Ban::None)
        } else if setting("kernel/unprivileged_userns_clone") == Some(0) {
            Some(Ban::Unprivileged)
        } else if setting("kernel/apparmor_restrict_unprivileged_userns") == Some(1) {
            Some(Ban::AppArmor)
        } else {
            None
        }
    }

    /// In words.
    #[must_use]
    pub fn why(self) -> &'static str {
        match self {
            Ban::None => "user namespaces are off (user.max_user_namespaces = 0)",
            Ban::Unprivileged => {
                "user namespaces are for root only (kernel.unprivileged_userns_clone = 0)"
            }
            Ban::AppArmor => {
                "AppArmor forbids it (kernel.apparmor_restrict_unprivileged_userns = 1)"
            }
        }
    }

    /// What an admin does about it.
    #[must_use]
    pub fn cure(self) -> &'static str {
        match self {
            Ban::None => "sysctl user.max_user_namespaces=10000",
            Ban::Unprivileged => "sysctl kernel.unprivileged_userns_clone=1",
            Ban::AppArmor => {
                "an AppArmor profile for berth-runtime with `userns,`, or sysctl \
                 kernel.apparmor_restrict_unprivileged_userns=0"
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bans_are_read_off_the_settings() {
        let of = |settings: &[(&str, u64)]| {
            Ban::of(|name| settings.iter().find(|(n, _)| *n == name).map(|(_, v)| *v))
        };
        assert_eq!(of(&[]), None);
        let zero = ("user/max_user_namespaces", 0);
        assert_eq!(of(&[zero]), Some(Ban::None));
        assert_eq!(of(&[("user/max_user_namespaces", 9000)]), None);
        let debian = ("kernel/unprivileged_userns_clone", 0);
        assert_eq!(of(&[debian]), Some(Ban::Unprivileged));
        let ubuntu = ("kernel/apparmor_restrict_unprivileged_userns", 1);
        assert_eq!(of(&[ubuntu]), Some(Ban::AppArmor));
        assert_eq!(of(&[(ubuntu.0, 0)]), None);
    }

    #[test]
    fn a_refusal_names_the_setting_and_its_cure() {
        let denied = io::Error::from_raw_os_error(libc::EPERM);
        let text = forbidden(&denied, Some(Ban::AppArmor)).text();
        assert!(
            text.contains("apparmor_restrict_unprivileged_userns = 1"),
            "{text}"
        );
        assert_eq!(text.lines().count(), 2);
        assert!(forbidden(&denied, None).text().contains("not permitted"));
    }
}
