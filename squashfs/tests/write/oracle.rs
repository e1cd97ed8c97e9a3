//! Trees described in the test, written by the writer, and looked at by programs that are not ours:
//! the kernel, unsquashfs, sqfs2tar, squashfuse, veritysetup.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use berth_squashfs::check::{Limits, check};
use berth_squashfs::verity::VerityOptions;
use berth_squashfs::write::{
    FileHandle, Finished, ImageWriter, Kind, Meta, NodeId, Tree, WriteOptions,
};
use tempfile::TempDir;

/// What a path is to be.
#[derive(Debug, Clone)]
pub enum Node {
    Dir,
    File(Vec<u8>),
    Symlink(Vec<u8>),
    /// Another path's node.
    Hard(Vec<u8>),
    Char(u32, u32),
    Block(u32, u32),
    Fifo,
    Socket,
}

/// A path with its metadata.
#[derive(Debug, Clone)]
pub struct Spec {
    pub node: Node,
    pub mode: u16,
    pub uid: u32,
    pub gid: u32,
    pub mtime: u32,
    pub xattrs: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Spec {
    pub fn new(node: Node) -> Self {
        let mode = if matches!(node, Node::Dir) {
            0o755
        } else {
            0o644
        };
        Self {
            node,
            mode,
            uid: 0,
            gid: 0,
            mtime: 1_700_000_000,
            xattrs: Vec::new(),
        }
    }

    pub fn file(contents: impl Into<Vec<u8>>) -> Self {
        Self::new(Node::File(contents.into()))
    }
}

/// Paths without a leading slash; every folder above a path is in it too (`dirs_above`).
pub type Specs = BTreeMap<Vec<u8>, Spec>;

pub fn specs<const N: usize>(list: [(&str, Spec); N]) -> Specs {
    list.into_iter()
        .map(|(path, spec)| (path.as_bytes().to_vec(), spec))
        .collect()
}

/// Bytes that look like nothing, the same for the same seed.
pub fn noise(seed: u64, len: usize) -> Vec<u8> {
    let mut out = vec![0; len];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut out);
    out
}

/// Bytes that compress about as programs do.
pub fn prose(seed: u64, len: usize) -> Vec<u8> {
    let words = noise(seed, 512);
    noise(seed ^ 1, len.div_ceil(8))
        .into_iter()
        .flat_map(|w| words[w as usize..][..8].to_vec())
        .take(len)
        .collect()
}

pub struct Image {
    pub folder: TempDir,
    pub path: PathBuf,
    pub done: Finished,
}

pub const VERITY: VerityOptions = VerityOptions {
    salt: [0x5a; 32],
    uuid: *b"berth test uuid!",
};

pub fn options(threads: usize) -> WriteOptions {
    WriteOptions {
        threads,
        verity: Some(VERITY),
        ..WriteOptions::default()
    }
}

/// Writes an image: contents through `fill`, then the tree.
pub fn image<H>(
    options: WriteOptions,
    fill: impl FnOnce(&mut ImageWriter) -> H,
    tree: impl FnOnce(H) -> Tree,
) -> Image {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("image");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&path)
        .unwrap();
    let mut writer = ImageWriter::new(file, options).unwrap();
    let handles = fill(&mut writer);
    let done = writer.finish(tree(handles)).unwrap();
    Image { folder, path, done }
}

pub fn write(specs: &Specs, options: WriteOptions) -> Image {
    image(
        options,
        |writer| {
            let mut lane = writer.lane();
            let handles = add_files(specs, |contents| lane.add_file(contents).unwrap());
            lane.close().unwrap();
            handles
        },
        |handles| tree(specs, &handles),
    )
}

pub fn add_files(
    specs: &Specs,
    mut add: impl FnMut(&[u8]) -> FileHandle,
) -> BTreeMap<Vec<u8>, FileHandle> {
    let files = specs.iter().filter_map(|(path, spec)| match &spec.node {
        Node::File(contents) => Some((path.clone(), add(contents))),
        _ => None,
    });
    files.collect()
}

pub fn tree(specs: &Specs, handles: &BTreeMap<Vec<u8>, FileHandle>) -> Tree {
    let mut tree = Tree::new(Meta {
        mode: 0o755,
        mtime: 1_700_000_000,
        ..Meta::default()
    });
    let mut nodes: BTreeMap<&[u8], NodeId> = BTreeMap::from([(&b""[..], tree.root())]);
    let mut links = Vec::new();
    for (path, spec) in specs {
        let (parent, name) = split(path);
        let parent = nodes[parent];
        let xattrs: Vec<_> = spec.xattrs.iter().map(|(n, v)| (&n[..], &v[..])).collect();
        let xattrs = tree.xattrs(&xattrs).unwrap();
        let meta = Meta {
            mode: spec.mode,
            uid: spec.uid,
            gid: spec.gid,
            mtime: spec.mtime,
            xattrs,
        };
        let kind = match &spec.node {
            Node::Dir => Kind::Dir,
            Node::File(_) => Kind::File(handles[path]),
            Node::Symlink(target) => Kind::Symlink(target),
            Node::Char(major, minor) => Kind::CharDevice {
                major: *major,
                minor: *minor,
            },
            Node::Block(major, minor) => Kind::BlockDevice {
                major: *major,
                minor: *minor,
            },
            Node::Fifo => Kind::Fifo,
            Node::Socket => Kind::Socket,
            Node::Hard(target) => {
                links.push((parent, name, target));
                continue;
            }
        };
        nodes.insert(path, tree.add(parent, name, kind, meta).unwrap());
    }
    for (parent, name, target) in links {
        tree.link(parent, name, nodes[&target[..]]).unwrap();
    }
    tree
}

fn split(path: &[u8]) -> (&[u8], &[u8]) {
    match path.iter().rposition(|&b| b == b'/') {
        Some(at) => (&path[..at], &path[at + 1..]),
        None => (b"", path),
    }
}

/// Whether a program is here; a missing one is said, and fails CI.
pub fn have(program: &str) -> bool {
    let found = Command::new("sh")
        .args(["-c", &format!("command -v {program} >/dev/null")])
        .status()
        .unwrap()
        .success();
    missing(found, program)
}

fn missing(found: bool, what: &str) -> bool {
    assert!(
        found || std::env::var_os("CI").is_none(),
        "{what} is needed"
    );
    if !found {
        eprintln!("left out: no {what}");
    }
    found
}

pub fn is_root() -> bool {
    missing(rustix::process::geteuid().is_root(), "root")
}

fn run(command: &mut Command) {
    let out = command.output().unwrap();
    assert!(
        out.status.success(),
        "{command:?}: {}{}",
        String::from_utf8_lossy(&out.stdout),
        String::from_utf8_lossy(&out.stderr)
    );
}

/// A mount that goes with this value.
pub struct Mounted(pub PathBuf);

impl Mounted {
    pub fn kernel(image: &Image) -> Option<Self> {
        if !is_root() {
            return None;
        }
        let at = image.folder.path().join("kernel");
        fs::create_dir_all(&at).unwrap();
        run(Command::new("mount")
            .args(["-t", "squashfs", "-o", "loop,ro"])
            .arg(&image.path)
            .arg(&at));
        Some(Self(at))
    }

    pub fn fuse(image: &Image) -> Option<Self> {
        if !have("squashfuse")
            || !missing(
                File::options().write(true).open("/dev/fuse").is_ok(),
                "/dev/fuse",
            )
        {
            return None;
        }
        let at = image.folder.path().join("fuse");
        fs::create_dir(&at).unwrap();
        run(Command::new("squashfuse").arg(&image.path).arg(&at));
        Some(Self(at))
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

impl Image {
    pub fn digest(&self) -> String {
        blake3::hash(&fs::read(&self.path).unwrap())
            .to_hex()
            .to_string()
    }

    /// Everything that must hold of any image, by every program there is.
    pub fn check(&self, specs: &Specs) {
        self.verity();
        self.own_check();
        if let Some(mounted) = Mounted::kernel(self) {
            compare(specs, &mounted.0, true);
        }
        if let Some(mounted) = Mounted::fuse(self) {
            compare(specs, &mounted.0, false);
        }
        if have("unsquashfs") && is_root() {
            let at = self.folder.path().join("unsquashfs");
            run(Command::new("unsquashfs")
                .args(["-q", "-n", "-d"])
                .arg(&at)
                .arg(&self.path));
            compare(specs, &at, true);
            fs::remove_dir_all(&at).unwrap();
        }
        self.tar_entries(|_, _| ());
    }

    /// The walk that every image must pass before it is signed.
    pub fn own_check(&self) {
        let limits = Limits {
            setid: true,
            devices: true,
            xattrs: ["user.", "trusted.", "security."]
                .map(str::to_owned)
                .to_vec(),
            contents: true,
            ..Limits::default()
        };
        let summary = check(File::open(&self.path).unwrap(), &limits).unwrap();
        assert_eq!(summary.inodes, self.done.inodes);
    }

    pub fn verity(&self) {
        assert_eq!(fs::metadata(&self.path).unwrap().len(), self.done.file_size);
        assert!(self.done.file_size.is_multiple_of(4096));
        let (Some(offset), Some(root)) = (self.done.hash_offset, self.done.verity_root) else {
            return;
        };
        assert_eq!(offset, self.done.squashfs_size.next_multiple_of(4096));
        if have("veritysetup") {
            let root: String = root.iter().map(|b| format!("{b:02x}")).collect();
            let offset = format!("--hash-offset={offset}");
            run(Command::new("veritysetup")
                .args(["verify", &offset])
                .args([&self.path, &self.path])
                .arg(root));
        }
    }

    /// Names and contents of all plain files, as sqfs2tar gives them.
    pub fn tar_entries(&self, mut each: impl FnMut(&[u8], &[u8])) -> usize {
        if !have("sqfs2tar") {
            return 0;
        }
        let mut command = Command::new("sqfs2tar");
        command
            .arg("--no-xattr")
            .arg(&self.path)
            .stdout(Stdio::piped());
        let out = command.output().unwrap();
        assert!(
            out.status.success(),
            "{}",
            String::from_utf8_lossy(&out.stderr)
        );
        let (mut at, mut count) = (0, 0);
        while let Some(header) = out.stdout.get(at..at + 512).filter(|h| h[0] != 0) {
            let size = std::str::from_utf8(&header[124..135]).unwrap();
            let size = usize::from_str_radix(size.trim_matches(['\0', ' ']), 8).unwrap();
            if header[156] == b'0' {
                let name = header[..100].split(|&b| b == 0).next().unwrap();
                each(name, &out.stdout[at + 512..at + 512 + size]);
                count += 1;
            }
            at += 512 + size.next_multiple_of(512);
        }
        count
    }
}

/// Compares a tree on disk with what it should be. `exact`: link counts, special files and xattrs too.
pub fn compare(specs: &Specs, root: &Path, exact: bool) {
    let mut seen = 0;
    walk(root, &mut |path| {
        let relative = path.strip_prefix(root).unwrap().as_os_str().as_bytes();
        let spec = specs
            .get(relative)
            .unwrap_or_else(|| panic!("{path:?} should not be there"));
        compare_one(specs, spec, path, exact);
        seen += 1;
    });
    assert_eq!(seen, specs.len(), "entries in {root:?}");
}

fn compare_one(specs: &Specs, spec: &Spec, path: &Path, exact: bool) {
    let stat = fs::symlink_metadata(path).unwrap();
    let spec = match &spec.node {
        Node::Hard(target) => &specs[target],
        _ => spec,
    };
    let kind = stat.file_type();
    match &spec.node {
        Node::Dir => assert!(kind.is_dir(), "{path:?}"),
        Node::File(contents) => {
            assert!(kind.is_file(), "{path:?}");
            assert_eq!(stat.size(), contents.len() as u64, "{path:?}");
            assert!(fs::read(path).unwrap() == *contents, "contents of {path:?}");
        }
        Node::Symlink(target) => {
            assert_eq!(
                fs::read_link(path).unwrap().as_os_str().as_bytes(),
                target,
                "{path:?}"
            );
        }
        Node::Char(major, minor) | Node::Block(major, minor) => {
            let is_char = matches!(spec.node, Node::Char(..));
            assert!(
                if is_char {
                    kind.is_char_device()
                } else {
                    kind.is_block_device()
                },
                "{path:?}"
            );
            let rdev = stat.rdev();
            assert_eq!(
                (rustix::fs::major(rdev), rustix::fs::minor(rdev)),
                (*major, *minor),
                "{path:?}"
            );
        }
        Node::Fifo => assert!(kind.is_fifo(), "{path:?}"),
        Node::Socket => assert!(kind.is_socket(), "{path:?}"),
        Node::Hard(_) => unreachable!("a hard link to a hard link"),
    }
    assert_eq!(
        (stat.uid(), stat.gid(), stat.mtime()),
        (spec.uid, spec.gid, i64::from(spec.mtime)),
        "{path:?}"
    );
    if !kind.is_symlink() {
        assert_eq!(stat.mode() & 0o7777, u32::from(spec.mode), "{path:?}");
    }
    if exact && !kind.is_dir() {
        let own = specs
            .iter()
            .find(|(_, s)| std::ptr::eq(*s, spec))
            .unwrap()
            .0;
        let links = specs
            .values()
            .filter(|s| matches!(&s.node, Node::Hard(target) if target == own))
            .count();
        assert_eq!(stat.nlink(), links as u64 + 1, "{path:?}");
    }
    if exact {
        compare_xattrs(spec, path);
    }
}

fn compare_xattrs(spec: &Spec, path: &Path) {
    let mut value = vec![0; 70_000];
    for (name, expected) in &spec.xattrs {
        let len = rustix::fs::lgetxattr(path, &name[..], &mut value[..]).unwrap();
        assert_eq!(&value[..len], expected, "{path:?}");
    }
    let len = match rustix::fs::llistxattr(path, &mut value[..]) {
        // The kernel's answer for an image without any.
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        len => len.unwrap(),
    };
    let count = value[..len]
        .split_inclusive(|&b| b == 0)
        .filter(|n| !n.starts_with(b"security.selinux"))
        .count();
    assert_eq!(count, spec.xattrs.len(), "{path:?}");
}

fn walk(folder: &Path, each: &mut impl FnMut(&Path)) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        each(&entry.path());
        if entry.file_type().unwrap().is_dir() {
            walk(&entry.path(), each);
        }
    }
}
