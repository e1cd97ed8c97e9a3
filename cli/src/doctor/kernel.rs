//! What the kernel must bring.

use std::fs;
use std::path::Path;

use nix::sys::utsname::uname;

use super::Check;

/// mount_setattr, and what else the runtime calls, are in every distribution's kernel from here on.
const OLDEST: (u32, u32) = (5, 14);

pub fn checks() -> Vec<Check> {
    let release = uname()
        .map(|u| u.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    vec![
        version(&release),
        filesystem("squashfs", &release),
        filesystem("overlay", &release),
        loop_devices(&release),
    ]
}

fn version(release: &str) -> Check {
    let name = "kernel";
    match parse(release) {
        Some(found) if found >= OLDEST => Check::ok(name, release),
        Some(_) => Check::fail(
            name,
            format!("{release} is older than {}.{}", OLDEST.0, OLDEST.1),
        )
        .hint("EL9, SLES 15 SP4, Debian 12 and later have a kernel that is new enough"),
        None => Check::warn(name, format!("cannot tell the version of `{release}`")),
    }
}

/// `6.1.0-18-amd64` → (6, 1).
fn parse(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn filesystem(name: &'static str, release: &str) -> Check {
    let known = fs::read_to_string("/proc/filesystems").unwrap_or_default();
    if known.split_whitespace().any(|word| word == name) {
        return Check::ok(name, "the kernel has it");
    }
    if has_module(name, release) {
        return Check::ok(name, "a module, loaded at first use");
    }
    let needed = match name {
        "overlay" => "without it --container-writable fails",
        _ => "no image can be mounted without it",
    };
    let detail = format!("this kernel has none: {needed}");
    let check = match name {
        "overlay" => Check::warn(name, detail),
        _ => Check::fail(name, detail),
    };
    check.hint(format!(
        "modprobe {name}; it may be in another package (kernel-modules-extra), or blacklisted"
    ))
}

fn has_module(name: &str, release: &str) -> bool {
    ["modules.dep", "modules.builtin"].iter().any(|list| {
        let path = Path::new("/lib/modules").join(release).join(list);
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines().any(|line| {
            let file = line.split(':').next().unwrap_or_default();
            file.rsplit('/')
                .next()
                .is_some_and(|f| f.split('.').next() == Some(name))
        })
    })
}

fn loop_devices(release: &str) -> Check {
    let name = "loop";
    if Path::new("/dev/loop-control").exists() {
        Check::ok(name, "/dev/loop-control is there")
    } else if has_module(name, release) {
        Check::warn(
            name,
            "the module is not loaded, so /dev/loop-control is missing",
        )
        .hint("modprobe loop; echo loop > /etc/modules-load.d/berth.conf")
    } else {
        Check::fail(name, "no /dev/loop-control: no image can be mounted").hint("modprobe loop")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_numbers_not_text() {
        assert_eq!(parse("6.1.0-18-amd64"), Some((6, 1)));
        assert_eq!(parse("5.14.0-427.el9.x86_64"), Some((5, 14)));
        assert!(parse("4.18.0").is_some_and(|v| v < OLDEST));
        assert!(parse("10.0-rc1").is_some_and(|v| v >= OLDEST));
        assert_eq!(parse("x"), None);
    }
}
