//! What ordinary users need for `berth exec` and `berth mount`, and jobs for image files of their users' own. Nothing
//! here stops a job that runs an image of the store's.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};

use berth_runtime::user_view::Ban;

use super::Check;
use crate::programs;

pub fn checks() -> Vec<Check> {
    vec![
        fuse(fs::metadata("/dev/fuse").ok()),
        server(),
        namespaces(Ban::of_this_machine()),
        helper(programs::on_path("fusermount3")),
    ]
}

fn fuse(facts: Option<fs::Metadata>) -> Check {
    let name = "fuse";
    match facts {
        Some(facts) if facts.file_type().is_char_device() && facts.mode() & 0o666 == 0o666 => {
            Check::ok(name, "/dev/fuse is open to all")
        }
        Some(facts) => Check::warn(
            name,
            format!(
                "/dev/fuse has mode {:04o}: `berth exec` and other FUSE mounts fail for users",
                facts.mode() & 0o7777
            ),
        )
        .hint("chmod 0666 /dev/fuse, as udev does"),
        None => Check::warn(
            name,
            "no /dev/fuse: no `berth exec`, no image files of users' own in jobs",
        )
        .hint("modprobe fuse"),
    }
}

fn server() -> Check {
    let name = "berth-fuse";
    match programs::find("berth-fuse") {
        Ok(path) => Check::ok(name, path.display().to_string()),
        Err(failure) => Check {
            hint: failure.hint,
            ..Check::warn(name, failure.message)
        },
    }
}

fn namespaces(ban: Option<Ban>) -> Check {
    let name = "namespaces";
    match ban {
        None => Check::ok(name, "no setting keeps users from making user namespaces"),
        Some(ban) => {
            let detail = format!("`berth exec` fails for users: {}", ban.why());
            Check::warn(name, detail).hint(ban.cure())
        }
    }
}

fn helper(is_there: bool) -> Check {
    let name = "fusermount3";
    match is_there {
        true => Check::ok(name, "users can `berth mount`"),
        false => Check::warn(name, "not installed: only root can `berth mount`")
            .hint("install the package fuse3, where users are to have it"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn what_users_lack_is_a_warning_with_a_cure() {
        assert_eq!(namespaces(None).state, State::Ok);
        for check in [fuse(None), namespaces(Some(Ban::AppArmor)), helper(false)] {
            assert_eq!(check.state, State::Warn, "{check:?}");
            assert!(check.hint.is_some(), "{check:?}");
        }
        // A device is there, but not of this kind.
        assert_eq!(fuse(fs::metadata("/").ok()).state, State::Warn);
    }
}
