//! Bytes as a SquashFS image: reading and checking end, and an image that passes the check, contents included, can be
//! walked and read without an error.

use berth_squashfs::check;
use berth_squashfs::read::{EntryBuffer, InodeBody, ReadError};

use super::Target;
use super::build::{Tar, head};
use crate::image::{convert_blobs, open, options};

pub const TARGET: Target = Target {
    name: "squashfs",
    run,
    seeds,
};

/// Entries walked at most: a tree that is a loop has no end.
const ENTRIES: u32 = 500;

/// Walks all there is and gives the first error; at most [`ENTRIES`] names.
fn walk(image: &[u8]) -> Result<(), String> {
    let text = |e: ReadError| e.to_string();
    let reader = open(image).map_err(text)?;
    let mut first = Ok(());
    let mut note = |result: Result<(), ReadError>| {
        if first.is_ok() {
            first = result.map_err(text);
        }
    };
    let mut unfound = false;
    let mut ahead = vec![reader.root().map_err(text)?];
    let mut buffer = EntryBuffer::default();
    let mut piece = vec![0; 10_000];
    let mut left = ENTRIES;
    while let Some(inode) = ahead.pop() {
        match reader.xattr_names(&inode) {
            Ok(names) => {
                for name in names {
                    note(reader.xattr(&inode, &name).map(drop));
                }
            }
            Err(e) => note(Err(e)),
        }
        match &inode.body {
            InodeBody::Dir(_) => {
                let mut stream = match reader.read_dir(&inode) {
                    Ok(stream) => stream,
                    Err(e) => {
                        note(Err(e));
                        continue;
                    }
                };
                loop {
                    let entry = match stream.next_into(&mut buffer) {
                        Ok(Some(entry)) => entry,
                        Ok(None) => break,
                        Err(e) => {
                            note(Err(e));
                            break;
                        }
                    };
                    left = match left.checked_sub(1) {
                        Some(left) => left,
                        None => return first,
                    };
                    assert!(!entry.name.is_empty() && !entry.name.contains(&b'/'));
                    match reader.find(&inode, entry.name) {
                        Ok(found) => unfound |= found.is_none_or(|f| f.inode != entry.inode),
                        Err(e) => note(Err(e)),
                    }
                    match reader.inode(entry.inode) {
                        Ok(inode) => ahead.push(inode),
                        Err(e) => note(Err(e)),
                    }
                }
            }
            InodeBody::File(file) => {
                for offset in [
                    0,
                    5000,
                    file.size / 2,
                    file.size.saturating_sub(10),
                    file.size,
                ] {
                    note(reader.read(&inode, offset, &mut piece).map(drop));
                }
            }
            InodeBody::Symlink(_) => note(reader.read_link(&inode).map(drop)),
            _ => {}
        }
    }
    match unfound {
        true => first.and(Err("a name is listed but not found".to_owned())),
        false => first,
    }
}

fn run(data: &[u8]) {
    let limits = check::Limits {
        setid: true,
        devices: true,
        xattrs: vec!["user.".into(), "trusted.".into(), "security.".into()],
        contents: true,
        ..check::Limits::default()
    };
    let checked = check::check(data, &limits);
    let walked = walk(data);
    if checked.is_ok() {
        walked.expect("what passed the check can be read");
    }
}

fn seeds() -> Vec<Vec<u8>> {
    let big: Vec<u8> = (0..20_000u32)
        .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    let layer = Tar::new()
        .dir("d")
        .file("d/a", &big[..9000])
        .file("d/zeros", &[0; 9000])
        .hardlink("h", "d/a")
        .symlink("s", "d/a")
        .add(head(b'0', "x").xattr("user.a", "1"))
        .end();
    let digest = berth_image::Digest::of(&layer);
    let (mut image, done) = convert_blobs(&[(layer, digest)], &options()).expect("a good layer");
    image.truncate(done.squashfs_size as usize);
    vec![image]
}
