//! The reader against squashfs-tools and the kernel: images made by mksquashfs, compared entry by entry with what the
//! kernel's own mount of them shows (as root) or with the tree they were made from.

mod common;

use std::ffi::OsStr;
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use berth_squashfs::read::{CacheSizes, Caches, Reader};
use common::{Seen, Tree, have, make_tree, of_folder, of_image, run};

fn mksquashfs(tree: &Path, image: &Path, options: &[&str]) {
    let mut args = vec![tree.as_os_str(), image.as_os_str()];
    args.extend(["-noappend", "-quiet", "-no-progress"].map(OsStr::new));
    args.extend(options.iter().map(OsStr::new));
    run("mksquashfs", &args);
}

fn open(image: &Path) -> Reader<File> {
    Reader::open(File::open(image).unwrap(), CacheSizes::default()).unwrap()
}

/// Inode numbers, folder sizes and folder link counts are the image's own.
fn without_own_numbers(mut tree: Tree) -> Tree {
    let blank = |seen: &mut Seen| {
        seen.ino = 0;
        if seen.mode & 0o170000 == 0o040000 {
            seen.size = 0;
        }
    };
    tree.values_mut().for_each(blank);
    tree
}

/// The kernel's view of an image, if this process may mount.
fn mounted(image: &Path) -> Option<Tree> {
    if !rustix::process::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "CI mounts as root");
        eprintln!("left out: comparing with the kernel's mount needs root");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    run(
        "mount",
        &["-t", "squashfs", "-o", "ro,loop"]
            .map(OsStr::new)
            .into_iter()
            .chain([image.as_os_str(), dir.path().as_os_str()])
            .collect::<Vec<_>>(),
    );
    let tree = std::panic::catch_unwind(|| of_folder(dir.path()));
    run("umount", &[dir.path().as_os_str()]);
    Some(tree.unwrap())
}

#[track_caller]
fn assert_same(ours: &Tree, theirs: &Tree) {
    assert_eq!(
        ours.keys().collect::<Vec<_>>(),
        theirs.keys().collect::<Vec<_>>()
    );
    for (path, seen) in ours {
        assert_eq!(seen, &theirs[path], "{}", String::from_utf8_lossy(path));
    }
}

#[test]
fn images_of_mksquashfs_read_as_the_kernel_reads_them() {
    if !have("mksquashfs") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    make_tree(&tree);
    let source = without_own_numbers(of_folder(&tree));
    for options in [
        &["-comp", "gzip"][..],
        &["-comp", "zstd", "-Xcompression-level", "3"],
        &["-comp", "lz4"],
        &["-comp", "xz", "-b", "1M"],
        &["-comp", "xz", "-Xbcj", "x86", "-b", "64K"],
        &["-comp", "lzo"],
        &["-comp", "zstd", "-no-fragments", "-no-exports"],
        &["-comp", "zstd", "-always-use-fragments", "-b", "4096"],
        &["-comp", "gzip", "-b", "1M"],
        &["-comp", "zstd", "-noI", "-noD", "-noF", "-noX", "-noId"],
        &[
            "-comp",
            "zstd",
            "-no-xattrs",
            "-no-duplicates",
            "-no-sparse",
        ],
    ] {
        let image = dir.path().join("image");
        mksquashfs(&tree, &image, options);
        let reader = open(&image);
        let ours = of_image(&reader);
        if let Some(kernel) = mounted(&image) {
            assert_same(&ours, &kernel);
        }
        if !options.contains(&"-no-xattrs") {
            assert_same(&without_own_numbers(ours), &source);
        }
        eprintln!("same: {}", options.join(" "));
    }
}

#[test]
fn listings_resume_at_every_position() {
    if !have("mksquashfs") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    make_tree(&tree);
    let image = dir.path().join("image");
    mksquashfs(&tree, &image, &["-comp", "zstd"]);
    let reader = open(&image);
    let root = reader.root().unwrap();
    let many = reader.find(&root, b"many").unwrap().unwrap();
    let many = reader.inode(many.inode).unwrap();
    let mut all = Vec::new();
    let mut stream = reader.read_dir(&many).unwrap();
    while let Some(entry) = stream.next_entry().unwrap() {
        all.push(entry);
    }
    assert_eq!(all.len(), 3000);
    let mut stream = reader.read_dir(&many).unwrap();
    for (i, entry) in all.iter().enumerate() {
        stream.seek(entry.next).unwrap();
        let next = stream.next_entry().unwrap();
        assert_eq!(next.as_ref(), all.get(i + 1));
    }
    // Positions that nobody gave out never give a name that is not there.
    for position in (0..stream.position() + 100).step_by(7).rev() {
        stream.seek(position).unwrap();
        if let Some(entry) = stream.next_entry().unwrap() {
            assert!(all.contains(&entry));
        }
    }
    for name in [
        &b"entry"[..],
        b"entry-99999",
        b"",
        b"a",
        b"zzz",
        b".",
        b"..",
        b"x/y",
    ] {
        assert_eq!(reader.find(&many, name).unwrap(), None);
    }
}

#[test]
fn tables_kept_in_a_file_and_caches_that_are_shared_read_the_same() {
    if !have("mksquashfs") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    make_tree(&tree);
    let caches = Arc::new(Caches::new(CacheSizes {
        metadata: 64 << 10,
        data: 1 << 20,
    }));
    let mut readers = Vec::new();
    for options in [&["-comp", "zstd"][..], &["-comp", "gzip", "-noI"]] {
        let image = dir.path().join(format!("image{}", readers.len()));
        mksquashfs(&tree, &image, options);
        let expected = of_image(&open(&image));
        let reader = Reader::open_in(File::open(&image).unwrap(), Arc::clone(&caches)).unwrap();
        readers.push((reader, expected));
    }
    for (reader, expected) in &readers {
        assert_same(&of_image(reader), expected);
        assert!(
            !reader
                .keep_tables_in(&tempfile::tempfile().unwrap(), 10_000)
                .unwrap()
        );
    }
    // While others read.
    std::thread::scope(|scope| {
        for (reader, expected) in &readers {
            for _ in 0..3 {
                scope.spawn(|| assert_same(&of_image(reader), expected));
            }
            scope.spawn(|| {
                let file = tempfile::tempfile().unwrap();
                assert!(reader.keep_tables_in(&file, 1 << 20).unwrap());
                assert!(file.metadata().unwrap().len() > 100_000);
            });
        }
    });
    for (reader, expected) in &readers {
        assert_same(&of_image(reader), expected);
    }
}

#[test]
fn tables_that_do_not_decode_or_do_not_fit_leave_the_reader_as_it_was() {
    if !have("mksquashfs") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let tree = dir.path().join("tree");
    make_tree(&tree);
    let image = dir.path().join("image");
    mksquashfs(&tree, &image, &["-comp", "zstd"]);
    let mut bytes = std::fs::read(&image).unwrap();
    let reader = Reader::open(&bytes, CacheSizes::default()).unwrap();
    let expected = of_image(&reader);
    let full = File::options().write(true).open("/dev/full").unwrap();
    assert!(reader.keep_tables_in(&full, 1 << 20).is_err());
    assert_same(&of_image(&reader), &expected);
    let last_directory_block = reader.superblock().fragment_table as usize - 40;
    bytes[last_directory_block..][..32].fill(0xff);
    let reader = Reader::open(&bytes, CacheSizes::default()).unwrap();
    assert!(
        reader
            .keep_tables_in(&tempfile::tempfile().unwrap(), 1 << 20)
            .is_err()
    );
    assert!(reader.root().is_ok());
}
