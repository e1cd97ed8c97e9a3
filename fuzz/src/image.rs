//! Conversions within a target, and what an image holds, read through our own reader.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Seek as _, Write as _};

use berth_convert::job::{Compression, Done, Failure, Limits, Options, Ownership, Policy};
use berth_convert::{Layer, convert};
use berth_image::Digest;
use berth_squashfs::check;
use berth_squashfs::read::{CacheSizes, InodeBody, Reader};
use rustix::fs::MemfdFlags;

/// Small blocks, so that few bytes make many of them.
pub fn options() -> Options {
    Options {
        compression: Compression::Lz4,
        level: 1,
        block_size: 4096,
        policy: Policy {
            ownership: Ownership::Keep,
            keep_setid: false,
            keep_xattrs: vec!["user.".into()],
        },
        salt: "5a".repeat(32),
        uuid: "a5".repeat(16),
        limits: Limits {
            max_bytes: 4 << 20,
            max_entries: 5000,
            max_ratio: 200,
        },
        memory: 4 << 20,
        threads: 1,
    }
}

fn memory_file() -> File {
    let fd = rustix::fs::memfd_create("fuzz", MemfdFlags::CLOEXEC).expect("a memfd");
    File::from(fd)
}

/// Converts blobs with the diff_ids they should have; gives the image file's bytes.
pub fn convert_blobs(
    blobs: &[(Vec<u8>, Digest)],
    options: &Options,
) -> Result<(Vec<u8>, Done), Failure> {
    let layers = (blobs.iter())
        .map(|(blob, diff_id)| {
            let mut input = memory_file();
            input.write_all(blob).expect("memory");
            input.rewind().expect("memory");
            Layer {
                input,
                diff_id: *diff_id,
            }
        })
        .collect();
    let mut output = memory_file();
    let writer = output.try_clone().expect("a descriptor");
    let done = convert(layers, writer, memory_file(), options, &mut |_| {})?;
    output.rewind().expect("memory");
    let mut image = Vec::new();
    output.read_to_end(&mut image).expect("memory");
    Ok((image, done))
}

/// What a conversion makes passes the check before signing, contents read back, and is as large as it says.
pub fn assert_sound(image: &[u8], done: &Done) -> check::Summary {
    assert_eq!(image.len() as u64, done.file_size);
    let limits = check::Limits {
        contents: true,
        ..check::Limits::default()
    };
    let found = check::check(image, &limits).expect("our own image passes our check");
    assert_eq!(found.image_bytes, done.squashfs_size);
    found
}

pub fn open(image: &[u8]) -> Result<Reader<&[u8]>, berth_squashfs::read::ReadError> {
    let caches = CacheSizes {
        metadata: 1 << 20,
        data: 1 << 20,
    };
    Reader::open(image, caches)
}

/// One name: its inode's number, its time, and what it is.
pub type Names = BTreeMap<Vec<u8>, (u32, i64, String)>;

/// Every name in a sound image but the root.
pub fn names(image: &[u8]) -> Names {
    let reader = open(image).expect("a sound image");
    let mut found = Names::new();
    let mut ahead = vec![(Vec::new(), reader.root().expect("a root"))];
    while let Some((path, dir)) = ahead.pop() {
        let mut stream = reader.read_dir(&dir).expect("a folder");
        while let Some(entry) = stream.next_entry().expect("a listing") {
            let mut name: Vec<u8> = path.clone();
            if !name.is_empty() {
                name.push(b'/');
            }
            name.extend_from_slice(&entry.name);
            let inode = reader.inode(entry.inode).expect("an inode");
            let what = match &inode.body {
                InodeBody::Dir(_) => {
                    ahead.push((name.clone(), inode.clone()));
                    "folder".to_owned()
                }
                InodeBody::File(file) => {
                    let mut bytes = vec![0; file.size as usize];
                    let n = reader.read(&inode, 0, &mut bytes).expect("contents");
                    assert_eq!(n, bytes.len());
                    format!("file {}", bytes.escape_ascii())
                }
                InodeBody::Symlink(_) => {
                    format!(
                        "link {}",
                        reader.read_link(&inode).expect("a target").escape_ascii()
                    )
                }
                _ => "other".to_owned(),
            };
            found.insert(name, (entry.number, i64::from(inode.mtime), what));
        }
    }
    found
}
