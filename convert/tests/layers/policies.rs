//! What a site's policy lets users read, seen by an ordinary user through the kernel's mount.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use berth_convert::job::{Options, Ownership, Policy};

use crate::build::{Tar, head};
use crate::image::{Mounted, can_mount, convert_tars, options};

/// The user who looks, and no one's in the layer below.
const NOBODY: u32 = 65_534;

fn layer() -> Vec<u8> {
    let mut tar = Tar::new()
        .add(head(b'5', "closed").mode(0o700).owner(1000, 1000))
        .add(head(b'5', "closed/deep").mode(0o000));
    for (name, mode) in [
        ("closed/secret", 0o600),
        ("closed/deep/none", 0o000),
        ("tool", 0o4750),
        ("group", 0o2640),
        ("open", 0o644),
    ] {
        tar.push(
            head(b'0', name).mode(mode).owner(1000, 1000),
            name.as_bytes(),
        );
    }
    tar.push(
        head(b'0', "marked")
            .xattr("user.keep", "1")
            .xattr("trusted.overlay.opaque", "y")
            .xattr("security.selinux", "label")
            .xattr(
                "security.capability",
                b"\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0",
            ),
        b"marked",
    );
    tar.end()
}

fn mounted(policy: Policy) -> Mounted {
    let options = Options {
        policy,
        ..options()
    };
    let (file, _) = convert_tars(&[layer()], &options).unwrap_or_else(|e| panic!("{e}"));
    let mounted = Mounted::new(&file);
    // The folder that the mount lies in is a private one.
    std::fs::set_permissions(mounted.0.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    mounted
}

/// What `cat` gives to an ordinary user who belongs to no group.
fn read_as_nobody(path: &Path) -> Option<Vec<u8>> {
    let out = Command::new("cat")
        .arg(path)
        .uid(NOBODY)
        .gid(NOBODY)
        .output()
        .unwrap();
    out.status.success().then_some(out.stdout)
}

fn mode(path: &Path) -> u32 {
    std::fs::symlink_metadata(path).unwrap().mode() & 0o7777
}

fn xattrs(path: &Path) -> Vec<String> {
    let mut list = vec![0; 4096];
    let n = rustix::fs::llistxattr(path, &mut list[..]).unwrap();
    let names = list[..n].split(|b| *b == 0).filter(|name| !name.is_empty());
    let mut names: Vec<_> = names
        .map(|n| String::from_utf8(n.to_vec()).unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn readable_lets_everybody_read_everything() {
    if !can_mount(&["mount", "umount", "cat"]) {
        return;
    }
    let image = mounted(Policy {
        ownership: Ownership::Readable,
        keep_setid: false,
        keep_xattrs: vec!["user.".into()],
    });
    let at = |name: &str| image.root().join(name);
    for name in [
        "closed/secret",
        "closed/deep/none",
        "tool",
        "group",
        "open",
        "marked",
    ] {
        assert_eq!(
            read_as_nobody(&at(name)).as_deref(),
            Some(name.as_bytes()),
            "{name}"
        );
        assert_eq!(std::fs::metadata(at(name)).unwrap().uid(), 0, "{name}");
    }
    assert_eq!(mode(&at("closed")), 0o755);
    assert_eq!(mode(&at("closed/deep")), 0o555);
    assert_eq!(mode(&at("tool")), 0o755);
    assert_eq!(mode(&at("group")), 0o644);
    assert_eq!(xattrs(&at("marked")), ["user.keep"]);
}

#[test]
fn keep_keeps_owners_and_what_is_closed() {
    if !can_mount(&["mount", "umount", "cat"]) {
        return;
    }
    let image = mounted(Policy {
        ownership: Ownership::Keep,
        keep_setid: true,
        keep_xattrs: vec!["user.".into(), "trusted.".into()],
    });
    let at = |name: &str| image.root().join(name);
    for name in ["closed/secret", "closed/deep/none", "tool", "group"] {
        assert_eq!(read_as_nobody(&at(name)), None, "{name}");
        assert_eq!(std::fs::metadata(at(name)).unwrap().uid(), 1000, "{name}");
    }
    assert_eq!(read_as_nobody(&at("open")).as_deref(), Some(&b"open"[..]));
    assert_eq!(mode(&at("closed")), 0o700);
    assert_eq!(mode(&at("tool")), 0o4750);
    assert_eq!(mode(&at("group")), 0o2640);
    assert_eq!(
        xattrs(&at("marked")),
        ["security.capability", "trusted.overlay.opaque", "user.keep"]
    );
}
