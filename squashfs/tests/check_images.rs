//! The check before signing: what mksquashfs makes passes it, and single damages to an image do not, or do no harm.

mod common;

use std::ffi::OsStr;
use std::path::Path;

use berth_squashfs::check::{Limits, check};
use berth_squashfs::read::{CacheSizes, EntryBuffer, InodeBody, ReadError, Reader};
use berth_squashfs::write::{ImageWriter, Kind, Meta, Tree, WriteOptions};
use common::{bytes, have, make_tree, run};

fn image_of(tree: &Path, options: &[&str]) -> Vec<u8> {
    let image = tree.with_extension("image");
    let mut args = vec![tree.as_os_str(), image.as_os_str()];
    args.extend(["-noappend", "-quiet", "-no-progress", "-nopad"].map(OsStr::new));
    args.extend(options.iter().map(OsStr::new));
    run("mksquashfs", &args);
    std::fs::read(image).unwrap()
}

fn lenient() -> Limits {
    Limits {
        setid: true,
        devices: true,
        xattrs: ["user.", "trusted.", "security."]
            .map(str::to_owned)
            .to_vec(),
        contents: true,
        ..Limits::default()
    }
}

/// A capability is a set-id bit by another name: a prefix alone does not let it through.
#[test]
fn capabilities_need_more_than_their_prefix() {
    let file = tempfile::tempfile().unwrap();
    let writer = ImageWriter::new(file.try_clone().unwrap(), WriteOptions::default()).unwrap();
    let mut tree = Tree::new(Meta::default());
    let xattrs = tree.xattrs(&[(b"security.capability", b"x")]).unwrap();
    let meta = Meta {
        xattrs,
        ..Meta::default()
    };
    tree.add(tree.root(), b"f", Kind::EmptyFile, meta).unwrap();
    writer.finish(tree).unwrap();
    check(&file, &lenient()).unwrap();
    let limits = Limits {
        setid: false,
        ..lenient()
    };
    let refused = check(&file, &limits).unwrap_err();
    assert!(
        refused.to_string().contains("security.capability"),
        "{refused}"
    );
}

#[test]
fn images_of_mksquashfs_pass() {
    if !have("mksquashfs") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    make_tree(&tree);
    for options in [
        &["-comp", "gzip"][..],
        &["-comp", "zstd"],
        &["-comp", "lz4", "-no-exports"],
        &["-comp", "zstd", "-no-fragments", "-no-xattrs"],
        &["-comp", "gzip", "-b", "4096", "-noI", "-noId"],
    ] {
        let image = image_of(&tree, options);
        let summary = check(&image, &lenient()).unwrap_or_else(|e| panic!("{options:?}: {e:?}"));
        assert_eq!(summary.image_bytes, image.len() as u64);
        assert!(summary.files > 3000 && summary.folders >= 5, "{summary:?}");
    }
    // The tree holds a set-id file: the defaults must refuse it.
    let error = check(image_of(&tree, &[]), &Limits::default()).unwrap_err();
    assert!(error.to_string().contains("not allowed"), "{error}");
}

/// A small tree, so that each byte of an image's metadata can be damaged.
fn small_tree(root: &Path) {
    std::fs::create_dir_all(root.join("a/b")).unwrap();
    std::fs::create_dir(root.join("c")).unwrap();
    for i in 0..20 {
        std::fs::write(root.join(format!("a/file{i}")), bytes(i, 100 * i as usize)).unwrap();
    }
    std::fs::write(root.join("c/blocks"), bytes(5, 30_000)).unwrap();
    std::fs::hard_link(root.join("c/blocks"), root.join("a/b/hard")).unwrap();
    std::os::unix::fs::symlink("a/b", root.join("link")).unwrap();
    for (name, value) in [("user.a", &b"1"[..]), ("user.b", b"22")] {
        let path = root.join("c/blocks");
        rustix::fs::lsetxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
    }
}

/// Walks all there is, for at most `budget` entries; gives whether that was enough.
fn walk(image: &[u8], budget: &mut u64) -> Result<bool, ReadError> {
    let caches = CacheSizes {
        metadata: 1 << 20,
        data: 1 << 20,
    };
    let reader = Reader::open(image, caches)?;
    let mut todo = vec![reader.root()?];
    let mut name = EntryBuffer::default();
    let mut piece = vec![0u8; 16384];
    while let Some(inode) = todo.pop() {
        let _ = reader.xattr_names(&inode).map(|names| {
            names
                .iter()
                .for_each(|name| drop(reader.xattr(&inode, name)));
        });
        match &inode.body {
            InodeBody::Dir(_) => {
                let Ok(mut stream) = reader.read_dir(&inode) else {
                    continue;
                };
                while let Ok(Some(entry)) = stream.next_into(&mut name) {
                    let Some(left) = budget.checked_sub(1) else {
                        return Ok(false);
                    };
                    *budget = left;
                    let _ = reader.find(&inode, entry.name);
                    todo.extend(reader.inode(entry.inode));
                }
            }
            InodeBody::File(file) => {
                for offset in [0, 12_345, file.size.saturating_sub(10)] {
                    let _ = reader.read(&inode, offset, &mut piece);
                }
            }
            InodeBody::Symlink(_) => drop(reader.read_link(&inode)),
            _ => {}
        }
    }
    Ok(true)
}

/// Flips bytes one and two at a time. With stored (uncompressed) metadata every flip reaches the parser.
#[test]
fn damaged_images_neither_panic_nor_run_away() {
    if !have("mksquashfs") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    small_tree(&tree);
    let mut seed = 0x1234_5678_9abc_def1u64;
    let mut random = move || {
        seed ^= seed << 13;
        seed ^= seed >> 7;
        seed ^= seed << 17;
        seed
    };
    for options in [
        &[
            "-comp", "zstd", "-b", "4096", "-noI", "-noId", "-noX", "-noF",
        ][..],
        &["-comp", "gzip", "-b", "4096"],
        &["-comp", "zstd"],
    ] {
        let image = image_of(&tree, options);
        check(&image, &lenient()).unwrap();
        let (mut refused, mut tried) = (0, 0);
        let mut damaged = image.clone();
        for round in 0..12_000usize {
            damaged.copy_from_slice(&image);
            // Every byte of the superblock and of the tables gets its turn; the rest by chance.
            let tail = image.len() - image.len().min(6000);
            let at = match round {
                0..96 => round,
                96..6096 => (tail + round - 96).min(image.len() - 1),
                _ => random() as usize % image.len(),
            };
            damaged[at] = match random() % 4 {
                0 => damaged[at] ^ (1 << (random() % 8)),
                1 => 0xff,
                2 => 0,
                _ => random() as u8,
            };
            if random() % 3 == 0 {
                let also = random() as usize % image.len();
                damaged[also] ^= 1 << (random() % 8);
            }
            if damaged == image {
                continue;
            }
            tried += 1;
            let passed = check(&damaged, &lenient()).is_ok();
            refused += usize::from(!passed);
            // A tree that is a loop has no end; any that passed the check has.
            let enough = walk(&damaged, &mut 2_000);
            if passed {
                assert!(matches!(enough, Ok(true)), "byte {at}: {enough:?}");
            }
        }
        // Times, modes, data and the like may be damaged without harm.
        assert!(refused * 20 > tried, "{refused} of {tried} refused");
        eprintln!("{options:?}: {refused} of {tried} damaged images refused");
        for len in (0..image.len()).step_by(97) {
            assert!(check(&image[..len], &lenient()).is_err());
        }
    }
}
