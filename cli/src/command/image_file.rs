//! The SquashFS file that a command line names: an image of the store's, pulled first where needed, or a file of the
//! user's own.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use berth_image::{Platform, Record, layout};
use nix::fcntl::{OFlag, open};
use nix::sys::stat::{Mode, SFlag, fstat};

use crate::command::path;
use crate::context::Context;
use crate::error::{Failure, OTHER, PERMISSION, USAGE};

/// An image's file, opened with the rights of whoever runs this.
#[derive(Debug)]
pub struct ImageFile {
    /// For messages.
    pub name: String,
    pub path: PathBuf,
    pub file: OwnedFd,
    /// What is signed about it; none for a file of the user's own.
    pub record: Option<Record>,
}

/// Opens what `text` names. A path is what starts with `/`, `./` or `../`.
pub fn open_image(
    context: &Context,
    text: &str,
    platform: Option<Platform>,
) -> Result<ImageFile, Failure> {
    let is_path = ["/", "./", "../"]
        .iter()
        .any(|start| text.starts_with(start));
    let of_store = layout::parse_data_path(&context.config.store.path, Path::new(text)).is_some();
    let (path, record) = match is_path && !of_store {
        true => (PathBuf::from(text), None),
        false => {
            let found = path::find(context, text, platform).map_err(|f| or_a_file(f, text))?;
            (found.path, Some(found.record))
        }
    };
    let file = open_file(&path)?;
    Ok(ImageFile {
        name: text.to_owned(),
        path,
        file,
        record,
    })
}

/// A hint for those who meant a file in the current folder.
fn or_a_file(failure: Failure, text: &str) -> Failure {
    match failure.code == USAGE && Path::new(text).is_file() {
        true => failure.hint(format!("for the file in this folder write ./{text}")),
        false => failure,
    }
}

fn open_file(path: &Path) -> Result<OwnedFd, Failure> {
    let shown = path.display();
    // Without waiting for anybody, should it be a FIFO.
    let flags = OFlag::O_RDONLY | OFlag::O_NONBLOCK | OFlag::O_NOCTTY | OFlag::O_CLOEXEC;
    let file = open(path, flags, Mode::empty()).map_err(|e| {
        let code = match e {
            nix::errno::Errno::EACCES | nix::errno::Errno::EPERM => PERMISSION,
            _ => OTHER,
        };
        Failure::new(
            code,
            format!(
                "cannot open the image `{shown}`: {}",
                e.desc().to_lowercase()
            ),
        )
    })?;
    let kind = fstat(&file).map(|s| SFlag::from_bits_truncate(s.st_mode) & SFlag::S_IFMT);
    match kind {
        Ok(SFlag::S_IFREG) => Ok(file),
        _ => Err(Failure::new(USAGE, format!("`{shown}` is not a file"))
            .hint("give a reference (docker://…) or a SquashFS file")),
    }
}
