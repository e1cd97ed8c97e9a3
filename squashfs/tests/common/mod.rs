//! Trees on disk, images of them, and both as one comparable list.
#![allow(dead_code, reason = "each suite uses its part")]

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{MetadataExt, PermissionsExt, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use berth_squashfs::read::{InodeBody, ReadAt, Reader};

/// Everything that a file shows. Contents as length and a hash.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Seen {
    pub ino: u64,
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub mtime: i64,
    pub nlink: u64,
    pub size: u64,
    pub rdev: u64,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    pub content: Option<[u8; 32]>,
    pub target: Option<Vec<u8>>,
}

pub type Tree = BTreeMap<Vec<u8>, Seen>;

/// Whether `tool` can be run; its absence fails CI and is told elsewhere.
pub fn have(tool: &str) -> bool {
    let found = std::env::var_os("PATH")
        .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(tool).is_file()));
    if !found {
        assert!(std::env::var_os("CI").is_none(), "{tool} is required in CI");
        eprintln!("left out: {tool} is not installed");
    }
    found
}

/// Runs a command that must succeed.
pub fn run(program: &str, args: &[&OsStr]) {
    let out = Command::new(program).args(args).output().unwrap();
    assert!(
        out.status.success(),
        "{program} {args:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
}

/// Bytes that compress a little and differ by `seed`.
pub fn bytes(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|i| {
            if i % 7 == 0 {
                state ^= state << 13;
                state ^= state >> 7;
                state ^= state << 17;
            }
            (state >> (i % 7 * 8)) as u8 & 0x3f
        })
        .collect()
}

/// A tree with one of everything; as root also devices, owners and trusted xattrs.
pub fn make_tree(root: &Path) {
    let at = |name: &str| root.join(name);
    let user = rustix::process::geteuid().is_root();
    fs::create_dir_all(at("sub/deep/er")).unwrap();
    fs::create_dir(at("empty")).unwrap();
    for (name, len) in [
        ("zero", 0),
        ("one", 1),
        ("small", 5_000),
        ("block", 131_072),
        ("block+1", 131_073),
        ("blocks", 131_072 * 5 + 17),
        ("sub/deep/er/big", 3_000_000),
    ] {
        fs::write(at(name), bytes(len as u64, len)).unwrap();
    }
    let noise: Vec<u8> = (0..400_000u64)
        .map(|i| {
            (i.wrapping_mul(i ^ 0x5bd1_e995)
                .wrapping_mul(0x2545_f491_4f6c_dd1d)
                >> 40) as u8
        })
        .collect();
    fs::write(at("noise"), noise).unwrap();
    // Holes in front, inside and at the end.
    let sparse = fs::File::create(at("sparse")).unwrap();
    sparse.set_len(2_000_000).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&sparse, &bytes(3, 200_000), 700_000).unwrap();
    fs::File::create(at("all-hole"))
        .unwrap()
        .set_len(1 << 20)
        .unwrap();
    fs::hard_link(at("small"), at("sub/hard")).unwrap();
    fs::hard_link(at("blocks"), at("hard2")).unwrap();
    symlink("sub/deep", at("link")).unwrap();
    symlink("x".repeat(4000), at("long-link")).unwrap();
    fs::write(root.join(OsStr::from_bytes(b"n\xff\xfe\n\x01me")), b"odd").unwrap();
    fs::write(at(&"n".repeat(255)), b"long name").unwrap();
    run("mkfifo", &[at("fifo").as_os_str()]);
    fs::set_permissions(at("one"), fs::Permissions::from_mode(0o4711)).unwrap();
    fs::set_permissions(at("sub"), fs::Permissions::from_mode(0o1777)).unwrap();
    fs::create_dir(at("many")).unwrap();
    for i in 0..3_000 {
        fs::write(
            at(&format!("many/entry-{i:05}-with-a-longer-name")),
            format!("{i}"),
        )
        .unwrap();
    }
    let set = |path: &Path, name: &str, value: &[u8]| {
        rustix::fs::lsetxattr(path, name, value, rustix::fs::XattrFlags::empty()).unwrap();
    };
    set(&at("small"), "user.note", b"hello");
    set(&at("block"), "user.note", b"hello");
    set(&at("sub"), "user.bin", &[0, 1, 255]);
    set(&at("sub"), "user.empty", b"");
    set(&at("zero"), "user.long", &bytes(9, 3_000));
    set(&at("one"), "user.long", &bytes(9, 3_000));
    if user {
        for (name, kind, major, minor) in [("null", "c", "1", "3"), ("disk", "b", "259", "70000")] {
            let node = at(name);
            run(
                "mknod",
                &[
                    node.as_os_str(),
                    kind.as_ref(),
                    major.as_ref(),
                    minor.as_ref(),
                ],
            );
        }
        lchown(at("link"), Some(70_000), Some(4_000_000_000)).unwrap();
        lchown(at("many"), Some(1), Some(2)).unwrap();
        set(&at("link"), "trusted.link", b"of a link");
        set(&at("empty"), "trusted.t", b"t");
        set(&at("null"), "trusted.d", b"device");
    }
    for (name, time) in [
        ("small", "@1"),
        ("empty", "@4000000000"),
        ("link", "@86400"),
    ] {
        run(
            "touch",
            &[
                "-h".as_ref(),
                "-d".as_ref(),
                time.as_ref(),
                at(name).as_os_str(),
            ],
        );
    }
}

/// What a mounted or plain tree shows.
pub fn of_folder(root: &Path) -> Tree {
    look(root, true)
}

/// The same without xattrs.
pub fn of_folder_without_xattrs(root: &Path) -> Tree {
    look(root, false)
}

fn look(root: &Path, with_xattrs: bool) -> Tree {
    let mut tree = Tree::new();
    let mut todo = vec![PathBuf::new()];
    while let Some(relative) = todo.pop() {
        let path = root.join(&relative);
        let meta = fs::symlink_metadata(&path).unwrap();
        if meta.is_dir() {
            for entry in fs::read_dir(&path).unwrap() {
                todo.push(relative.join(entry.unwrap().file_name()));
            }
        }
        let mut names = vec![0u8; 65536];
        let len = match rustix::fs::llistxattr(&path, &mut names) {
            // The kernel's answer for an image without xattrs.
            Err(rustix::io::Errno::OPNOTSUPP) => 0,
            _ if !with_xattrs => 0,
            len => len.unwrap(),
        };
        let xattrs = names[..len]
            .split(|b| *b == 0)
            .filter(|name| !name.is_empty());
        let seen = Seen {
            ino: meta.ino(),
            mode: meta.mode(),
            uid: meta.uid(),
            gid: meta.gid(),
            mtime: meta.mtime(),
            nlink: meta.nlink(),
            size: meta.size(),
            rdev: meta.rdev(),
            xattrs: xattrs
                .map(|name| {
                    let mut value = vec![0u8; 65536];
                    let len = rustix::fs::lgetxattr(&path, name, &mut value).unwrap();
                    value.truncate(len);
                    (name.to_vec(), value)
                })
                .collect(),
            content: meta.is_file().then(|| hash(&fs::read(&path).unwrap())),
            target: meta.is_symlink().then(|| {
                fs::read_link(&path)
                    .unwrap()
                    .as_os_str()
                    .as_bytes()
                    .to_vec()
            }),
        };
        tree.insert(relative.as_os_str().as_bytes().to_vec(), seen);
    }
    tree
}

/// What our reader shows.
pub fn of_image<S: ReadAt>(reader: &Reader<S>) -> Tree {
    let mut tree = Tree::new();
    let mut todo = vec![(Vec::new(), reader.root().unwrap())];
    while let Some((path, inode)) = todo.pop() {
        let mut content = None;
        let mut target = None;
        match &inode.body {
            InodeBody::Dir(_) => {
                let mut entries = reader.read_dir(&inode).unwrap();
                while let Some(entry) = entries.next_entry().unwrap() {
                    let child = reader.inode(entry.inode).unwrap();
                    assert_eq!(child.number, entry.number);
                    assert_eq!(child.file_type(), entry.file_type);
                    assert_eq!(
                        reader.find(&inode, &entry.name).unwrap().as_ref(),
                        Some(&entry)
                    );
                    if let Some(exported) = reader.reference_of(child.number).unwrap() {
                        assert_eq!(exported, entry.inode);
                    }
                    let mut below = path.clone();
                    if !below.is_empty() {
                        below.push(b'/');
                    }
                    below.extend_from_slice(&entry.name);
                    todo.push((below, child));
                }
            }
            InodeBody::File(file) => {
                let mut all = vec![0xaa; file.size as usize + 10];
                assert_eq!(
                    reader.read(&inode, 0, &mut all).unwrap(),
                    file.size as usize
                );
                all.truncate(file.size as usize);
                check_pieces(reader, &inode, &all);
                content = Some(hash(&all));
            }
            InodeBody::Symlink(_) => target = Some(reader.read_link(&inode).unwrap()),
            InodeBody::Device(..) | InodeBody::Ipc(..) => {}
        }
        let dev = u64::from(inode.rdev());
        let (major, minor) = ((dev >> 8) & 0xfff, dev & 0xff | dev >> 12 & 0xfff00);
        let seen = Seen {
            ino: u64::from(inode.number),
            mode: inode.mode(),
            uid: inode.uid,
            gid: inode.gid,
            mtime: i64::from(inode.mtime),
            nlink: u64::from(inode.nlink()),
            size: inode.size(),
            rdev: rustix::fs::makedev(major as u32, minor as u32),
            xattrs: reader
                .xattr_names(&inode)
                .unwrap()
                .into_iter()
                .map(|name| {
                    let value = reader.xattr(&inode, &name).unwrap().unwrap();
                    (name, value)
                })
                .collect(),
            content,
            target,
        };
        tree.insert(path, seen);
    }
    tree
}

/// Reads in pieces that do not fit the blocks.
fn check_pieces<S: ReadAt>(reader: &Reader<S>, inode: &berth_squashfs::read::Inode, all: &[u8]) {
    for (offset, len) in [
        (0, 1),
        (1, 4096),
        (131_000, 300),
        (262_000, 140_000),
        (700_001, 131_072),
    ] {
        let mut piece = vec![0; len];
        let got = reader.read(inode, offset as u64, &mut piece).unwrap();
        let expected = all.get(offset..).unwrap_or_default();
        let expected = &expected[..expected.len().min(len)];
        assert_eq!(&piece[..got], expected);
    }
    let end = reader.read(inode, all.len() as u64, &mut [0; 8]).unwrap();
    assert_eq!(end, 0);
}

pub fn hash(bytes: &[u8]) -> [u8; 32] {
    use sha2::Digest;
    sha2::Sha256::digest(bytes).into()
}
