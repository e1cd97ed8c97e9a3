//! Berth's other programs on this machine.

use std::path::{Path, PathBuf};

use crate::error::{Failure, UNAVAILABLE};

/// Where the package puts what people do not call.
const LIBEXEC: &str = "/usr/libexec/berth";

/// The program `name` of this installation: beside this one, or where the package puts it.
pub fn find(name: &str) -> Result<PathBuf, Failure> {
    let beside = std::env::current_exe().map(|own| own.with_file_name(name));
    let packaged = Path::new(LIBEXEC).join(name);
    let mut places = beside.into_iter().chain([packaged]);
    places.find(|path| path.exists()).ok_or_else(|| {
        Failure::new(UNAVAILABLE, format!("`{name}` is not installed here"))
            .hint(format!("it belongs into {LIBEXEC}: ask the admin"))
    })
}

/// Whether `PATH` has it.
pub fn on_path(program: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
}
