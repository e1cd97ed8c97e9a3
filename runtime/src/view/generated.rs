//! The files a view has of its own, in place of the image's: who the user is, and how the node reaches others.
//!
//! They lie in the container's own layer. Lines of ours come first, since lookups take the first match.

use std::fs::File;
use std::io::Read;
use std::os::fd::BorrowedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::{FileType, OFlags};

use super::place::{Atlas, Walk};
use super::{ViewError, ViewSpec, inside};
use crate::opener::Opener;

/// Largest account file of an image that is kept; one beyond it is replaced by ours alone.
const LARGEST: u64 = 4 << 20;

/// Files that the view has from the node.
pub(super) const OF_THE_NODE: [&str; 2] = ["/etc/hosts", "/etc/resolv.conf"];

/// A file of the view's own.
pub(super) struct GeneratedFile {
    /// Without links, relative to the root.
    pub(super) path: PathBuf,
    pub(super) content: Vec<u8>,
}

/// All of them; none when the image's `/etc` is covered or not a folder.
pub(super) fn files(
    spec: &ViewSpec,
    atlas: &Atlas<'_>,
    image: BorrowedFd<'_>,
    opener: &mut Opener,
) -> Result<Vec<GeneratedFile>, ViewError> {
    let etc = match atlas.walk(Path::new("/etc"), true)? {
        Walk::Found(path, FileType::Directory) | Walk::Absent(path) => path,
        Walk::Found(..) | Walk::Below(_) => return Ok(Vec::new()),
    };
    let mut files = Vec::with_capacity(5);
    let mut add = |name: &str, content: Vec<u8>| {
        files.push(GeneratedFile {
            path: etc.join(name),
            content,
        });
    };
    add("passwd", passwd(spec, image, &etc));
    add("group", group(spec, image, &etc));
    for path in OF_THE_NODE {
        if let Ok(content) = opener.read(Path::new(path)) {
            add(path.trim_start_matches("/etc/"), content);
        }
    }
    let mut hostname = rustix::system::uname().nodename().to_bytes().to_vec();
    hostname.push(b'\n');
    add("hostname", hostname);
    Ok(files)
}

fn passwd(spec: &ViewSpec, image: BorrowedFd<'_>, etc: &Path) -> Vec<u8> {
    let name = field(spec.account.name.as_bytes());
    let shell = match inside(image, "bin/bash", OFlags::PATH) {
        Ok(_) => "/bin/bash",
        Err(_) => "/bin/sh",
    };
    let home = field(spec.account.home.as_os_str().as_bytes());
    let (uid, gid) = (spec.user.uid, spec.user.gid);
    let mut text = format!("{name}:x:{uid}:{gid}:{name}:{home}:{shell}\n").into_bytes();
    for (name, uid, gid) in &spec.account.others {
        let name = field(name.as_bytes());
        text.extend(format!("{name}:x:{uid}:{gid}:{name}:/:/bin/false\n").into_bytes());
    }
    text.extend(of_image(image, &etc.join("passwd")));
    text
}

fn group(spec: &ViewSpec, image: BorrowedFd<'_>, etc: &Path) -> Vec<u8> {
    let user = field(spec.account.name.as_bytes());
    let mut text = Vec::new();
    for (gid, name) in &spec.account.groups {
        let name = field(name.as_bytes());
        text.extend(format!("{name}:x:{gid}:{user}\n").into_bytes());
    }
    text.extend(of_image(image, &etc.join("group")));
    text
}

/// One field of a line: what would end it is left out.
fn field(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    text.chars()
        .filter(|c| *c != ':' && !c.is_control())
        .collect()
}

/// The image's own lines, or nothing.
fn of_image(image: BorrowedFd<'_>, path: &Path) -> Vec<u8> {
    let mut text = Vec::new();
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY;
    if let Ok(file) = inside(image, path, flags) {
        let read = File::from(file).take(LARGEST + 1).read_to_end(&mut text);
        if read.is_err() || text.len() as u64 > LARGEST {
            text.clear();
        }
    }
    text
}
