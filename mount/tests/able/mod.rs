//! What tests of real mounts need of the machine; tests of other crates that mount look here too.

use std::path::Path;
use std::process::Command;

/// Whether this machine can run these tests; in CI what is missing is a failure.
pub fn able() -> bool {
    let missing = if !rustix::process::geteuid().is_root() {
        "root"
    } else if !Path::new("/dev/loop-control").exists() {
        "loop devices"
    } else if Command::new("mksquashfs").arg("-version").output().is_err() {
        "mksquashfs"
    } else {
        return true;
    };
    assert!(
        std::env::var_os("CI").is_none(),
        "this test needs {missing}"
    );
    eprintln!("left out: needs {missing}");
    false
}
