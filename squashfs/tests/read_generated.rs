//! The reader against three others over trees that chance made: the kernel's driver, squashfuse_ll and unsquashfs.

mod common;

use std::ffi::{OsStr, OsString};
use std::fs;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::{FileExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use berth_squashfs::read::{CacheSizes, Reader};
use common::{Seen, Tree, bytes, have, of_folder, of_folder_without_xattrs, of_image, run};

/// Numbers that look like chance and are the same every time.
struct Dice(u64);

impl Dice {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % bound
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }

    /// A name of any bytes but those that no name has.
    fn name(&mut self) -> OsString {
        let len = 1 + self.below(24);
        let name: Vec<u8> = (0..len)
            .map(|_| match self.below(256) as u8 {
                0 | b'/' => b'_',
                byte => byte,
            })
            .collect();
        match name.as_slice() {
            b"." | b".." => "dots".into(),
            _ => OsString::from_vec(name),
        }
    }
}

/// A tree of a few hundred names; sizes lie around the edges of blocks and fragments.
fn grow(root: &Path, dice: &mut Dice) {
    let mut folders = vec![root.to_owned()];
    let mut files: Vec<PathBuf> = Vec::new();
    for _ in 0..dice.below(400) {
        let folder = &folders[dice.below(folders.len() as u64) as usize];
        let path = folder.join(dice.name());
        if fs::symlink_metadata(&path).is_ok() {
            continue;
        }
        match dice.below(10) {
            0 | 1 => {
                fs::create_dir(&path).unwrap();
                folders.push(path.clone());
            }
            2 => symlink(dice.name(), &path).unwrap(),
            3 if !files.is_empty() => {
                let other = &files[dice.below(files.len() as u64) as usize];
                fs::hard_link(other, &path).unwrap();
            }
            4 => {
                let file = fs::File::create(&path).unwrap();
                file.set_len(dice.below(700_000)).unwrap();
                file.write_all_at(&bytes(dice.below(9), 5000), dice.below(600_000))
                    .unwrap();
                files.push(path.clone());
            }
            _ => {
                let near = dice.pick(&[0, 1, 40, 300, 4096, 8192, 65_536, 131_072, 262_144]);
                let len = (near + dice.below(3)).saturating_sub(1);
                fs::write(&path, bytes(dice.below(20), len as usize)).unwrap();
                files.push(path.clone());
            }
        }
        for at in 0..dice.below(8).saturating_sub(5) {
            let name = OsString::from(format!("user.{at}.{}", dice.below(30)));
            let value = bytes(dice.below(6), dice.pick(&[0, 1, 64, 5000]));
            let flags = rustix::fs::XattrFlags::empty();
            // Links have none, and a file's own file system may have no room for more.
            let _ = rustix::fs::lsetxattr(&path, name.as_os_str(), &value, flags);
        }
    }
}

/// What every one of them must show alike: inode numbers and folder sizes are the image's own.
fn without_own_numbers(mut tree: Tree) -> Tree {
    let blank = |seen: &mut Seen| {
        seen.ino = 0;
        if seen.mode & 0o170000 == 0o040000 {
            (seen.size, seen.nlink) = (0, 0);
        }
    };
    tree.values_mut().for_each(blank);
    tree
}

#[track_caller]
fn assert_same(ours: &Tree, theirs: &Tree, who: &str) {
    let names = |tree: &Tree| tree.keys().cloned().collect::<Vec<_>>();
    assert!(names(ours) == names(theirs), "other names than {who}");
    for (path, seen) in ours {
        let name = String::from_utf8_lossy(path);
        assert_eq!(seen, &theirs[path], "{name} is not as {who} shows it");
    }
}

/// What a program shows that mounts the image on the folder it is given.
fn mounted(program: &str, options: &[&str], image: &Path, look: fn(&Path) -> Tree) -> Tree {
    let dir = tempfile::tempdir().unwrap();
    let mut args: Vec<&OsStr> = options.iter().map(OsStr::new).collect();
    args.extend([image.as_os_str(), dir.path().as_os_str()]);
    run(program, &args);
    let tree = std::panic::catch_unwind(|| look(dir.path()));
    run("umount", &[dir.path().as_os_str()]);
    tree.unwrap()
}

fn root() -> bool {
    let root = rustix::process::geteuid().is_root();
    if !root {
        assert!(std::env::var_os("CI").is_none(), "CI mounts as root");
        eprintln!("left out: mounting needs root");
    }
    root
}

/// Makes an image and has unsquashfs unpack it. Now and then mksquashfs 4.5 writes blocks that neither unsquashfs nor
/// the kernel can decompress: then it tries again.
fn make_and_unpack(tree: &Path, image: &Path, unpacked: &Path, options: &[&str]) {
    for _ in 0..5 {
        let mut args = vec![tree.as_os_str(), image.as_os_str()];
        args.extend(options.iter().map(OsStr::new));
        run("mksquashfs", &args);
        let unpack = Command::new("unsquashfs")
            .args(["-quiet", "-no-progress", "-force", "-dest"])
            .args([unpacked, image])
            .output()
            .unwrap();
        if unpack.status.success() {
            return;
        }
        fs::remove_dir_all(unpacked).unwrap();
    }
    panic!("unsquashfs unpacks nothing that mksquashfs makes with {options:?}");
}

#[test]
fn generated_trees_read_as_three_others_read_them() {
    if !root()
        || !["mksquashfs", "unsquashfs", "squashfuse_ll"]
            .map(have)
            .iter()
            .all(|have| *have)
    {
        return;
    }
    for seed in 1..=12 {
        let mut dice = Dice(seed);
        let dir = tempfile::tempdir().unwrap();
        let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
        fs::create_dir(&tree).unwrap();
        grow(&tree, &mut dice);
        let mut options = vec!["-noappend", "-quiet", "-no-progress"];
        options.extend(["-comp", dice.pick(&["gzip", "zstd", "lz4", "xz", "lzo"])]);
        options.extend(["-b", dice.pick(&["4K", "64K", "128K", "1M"])]);
        for option in ["-no-fragments", "-no-exports", "-noI", "-noX", "-tailends"] {
            if dice.below(4) == 0 {
                options.push(option);
            }
        }
        let unpacked = dir.path().join("unpacked");
        make_and_unpack(&tree, &image, &unpacked, &options);
        let bytes = fs::read(&image).unwrap();
        let reader = Reader::open(
            &bytes,
            CacheSizes {
                metadata: 32 << 10,
                data: 1 << 20,
            },
        )
        .unwrap();
        let ours = of_image(&reader);
        let kernel = mounted(
            "mount",
            &["-t", "squashfs", "-o", "ro,loop"],
            &image,
            of_folder,
        );
        assert_same(&ours, &kernel, "the kernel");
        let mut ours = without_own_numbers(ours);
        assert_same(
            &ours,
            &without_own_numbers(of_folder(&unpacked)),
            "unsquashfs",
        );
        // squashfuse 0.1 lists xattrs that it then says are not there.
        ours.values_mut().for_each(|seen| seen.xattrs.clear());
        let theirs = mounted("squashfuse_ll", &[], &image, of_folder_without_xattrs);
        assert_same(&ours, &without_own_numbers(theirs), "squashfuse_ll");
        eprintln!("seed {seed}: {} names, {}", ours.len(), options.join(" "));
    }
}

#[test]
fn a_folder_of_a_quarter_million_names() {
    const NAMES: u32 = 262_144;
    if !root() || !have("mksquashfs") {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let (tree, image) = (dir.path().join("tree"), dir.path().join("image"));
    fs::create_dir(&tree).unwrap();
    // Links of 16 files: as many names, far fewer inodes to make.
    for number in 0..NAMES {
        let path = tree.join(format!("name-{number:06}"));
        match number.checked_sub(16) {
            None => fs::write(path, format!("{number}")).unwrap(),
            Some(_) => fs::hard_link(tree.join(format!("name-{:06}", number % 16)), path).unwrap(),
        }
    }
    run(
        "mksquashfs",
        &[
            tree.as_os_str(),
            image.as_os_str(),
            "-noappend".as_ref(),
            "-quiet".as_ref(),
            "-no-progress".as_ref(),
        ],
    );
    let reader = Reader::open(fs::read(&image).unwrap(), CacheSizes::default()).unwrap();
    assert!(
        reader
            .keep_tables_in(&tempfile::tempfile().unwrap(), 64 << 20)
            .unwrap()
    );
    let root = reader.root().unwrap();
    let mut listing = reader.read_dir(&root).unwrap();
    let mut positions = Vec::new();
    for number in 0..NAMES {
        let entry = listing.next_entry().unwrap().unwrap();
        assert_eq!(entry.name, format!("name-{number:06}").into_bytes());
        positions.push(entry.next);
    }
    assert_eq!(listing.next_entry().unwrap(), None);
    let mut dice = Dice(7);
    for _ in 0..500 {
        let number = dice.below(u64::from(NAMES) - 1) as u32;
        listing.seek(positions[number as usize]).unwrap();
        let next = listing.next_entry().unwrap().unwrap();
        assert_eq!(next.name, format!("name-{:06}", number + 1).into_bytes());
        assert_eq!(reader.find(&root, &next.name).unwrap(), Some(next));
    }
    let missing = reader.find(&root, b"name-262144").unwrap();
    assert_eq!(missing, None);
}
