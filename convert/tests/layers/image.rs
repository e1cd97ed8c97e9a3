//! Conversions in this process, and their results looked at through the kernel.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Seek as _, Write as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;

use berth_convert::job::{Compression, Done, Failure, Limits, Options, Ownership, Policy};
use berth_convert::{Layer, convert};
use berth_image::Digest;

pub fn options() -> Options {
    Options {
        compression: Compression::Zstd,
        level: 3,
        block_size: 131_072,
        policy: Policy {
            ownership: Ownership::Keep,
            keep_setid: true,
            keep_xattrs: vec!["user.".into()],
        },
        salt: "5a".repeat(32),
        uuid: "a5".repeat(16),
        limits: Limits {
            max_bytes: 1 << 30,
            max_entries: 1 << 20,
            max_ratio: 200,
        },
        memory: 64 << 20,
        threads: 2,
    }
}

/// Converts layers given as blobs with the digests of their streams.
pub fn convert_blobs(
    blobs: &[(Vec<u8>, Digest)],
    options: &Options,
) -> Result<(File, Done), Failure> {
    let output = tempfile::tempfile().unwrap();
    let layers = (blobs.iter())
        .map(|(blob, diff_id)| {
            let mut input = tempfile::tempfile().unwrap();
            input.write_all(blob).unwrap();
            input.rewind().unwrap();
            Layer {
                input,
                diff_id: *diff_id,
            }
        })
        .collect();
    let spill = tempfile::tempfile().unwrap();
    let done = convert(
        layers,
        output.try_clone().unwrap(),
        spill,
        options,
        &mut |_| {},
    )?;
    Ok((output, done))
}

/// Converts uncompressed layers.
pub fn convert_tars(layers: &[Vec<u8>], options: &Options) -> Result<(File, Done), Failure> {
    let blobs: Vec<_> = layers
        .iter()
        .map(|l| (crate::build::gzip(l), Digest::of(l)))
        .collect();
    convert_blobs(&blobs, options)
}

/// Whether this machine can mount and has these programs; CI must.
pub fn can_mount(programs: &[&str]) -> bool {
    let missing = programs.iter().find(|p| {
        !std::env::var("PATH")
            .unwrap_or_default()
            .split(':')
            .any(|d| Path::new(d).join(p).exists())
    });
    let root = std::fs::metadata("/proc/self").unwrap().uid() == 0;
    if root && missing.is_none() {
        return true;
    }
    assert!(
        std::env::var_os("CI").is_none(),
        "needs root and {programs:?}"
    );
    eprintln!("left out: needs root and {programs:?}");
    false
}

/// An image mounted by the kernel.
pub struct Mounted(pub tempfile::TempDir);

impl Mounted {
    pub fn new(image: &File) -> Self {
        use std::os::fd::AsRawFd as _;
        let dir = tempfile::tempdir().unwrap();
        let source = format!("/proc/{}/fd/{}", std::process::id(), image.as_raw_fd());
        let file = dir.path().join("image");
        std::fs::copy(source, &file).unwrap();
        std::fs::create_dir(dir.path().join("mnt")).unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", "squashfs", "-o", "loop,ro"]);
        mount.arg(&file).arg(dir.path().join("mnt"));
        // A free loop device that was found may be somebody else's a moment later.
        for _ in 0..20 {
            if mount.output().unwrap().status.success() {
                return Self(dir);
            }
        }
        run(&mut mount);
        Self(dir)
    }

    pub fn root(&self) -> PathBuf {
        self.0.path().join("mnt")
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily: whoever looks at all mounts at this moment must not leave it behind.
        run(Command::new("umount").arg("-l").arg(self.root()));
    }
}

pub fn run(command: &mut Command) {
    let out = command.output().unwrap();
    assert!(
        out.status.success(),
        "{command:?}: {}",
        String::from_utf8_lossy(&out.stderr)
    );
}

/// What a person sees of one file, as a line.
pub type Tree = BTreeMap<Vec<u8>, String>;

/// Everything below `root` but devices. Folder times after `now` were made by unpacking and are not compared.
pub fn tree(root: &Path, now: i64) -> Tree {
    let mut found = Tree::new();
    let mut inodes: BTreeMap<u64, Vec<Vec<u8>>> = BTreeMap::new();
    let mut ahead = vec![root.to_owned()];
    while let Some(path) = ahead.pop() {
        let meta = std::fs::symlink_metadata(&path).unwrap();
        let name = path
            .strip_prefix(root)
            .unwrap()
            .as_os_str()
            .as_bytes()
            .to_vec();
        let kind = meta.mode() & 0o170_000;
        if kind == 0o020_000 || kind == 0o060_000 {
            continue;
        }
        let mut line = format!("{:06o} {}:{}", meta.mode(), meta.uid(), meta.gid());
        if meta.is_dir() {
            ahead.extend(std::fs::read_dir(&path).unwrap().map(|e| e.unwrap().path()));
        } else {
            line += &format!(" links {}", meta.nlink());
            inodes.entry(meta.ino()).or_default().push(name.clone());
        }
        if !(meta.is_dir() && (meta.mtime() >= now || meta.mtime() == 0)) {
            line += &format!(" time {}", meta.mtime().clamp(0, i64::from(u32::MAX)));
        }
        if meta.is_symlink() {
            line += &format!(
                " -> {}",
                std::fs::read_link(&path)
                    .unwrap()
                    .as_os_str()
                    .as_bytes()
                    .escape_ascii()
            );
        }
        if meta.is_file() {
            let bytes = std::fs::read(&path).unwrap();
            line += &format!(" {} bytes {}", bytes.len(), Digest::of(&bytes).short());
        }
        for (name, value) in xattrs(&path) {
            line += &format!(" {}={}", name.escape_ascii(), value.escape_ascii());
        }
        found.insert(name, line);
    }
    for mut names in inodes.into_values().filter(|names| names.len() > 1) {
        names.sort();
        for name in &names {
            let line = found.get_mut(name).unwrap();
            *line += &format!(" with {}", names.join(&b',').escape_ascii());
        }
    }
    found
}

/// `user.*` only, sorted.
fn xattrs(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut list = vec![0u8; 65_536];
    let Ok(n) = rustix::fs::llistxattr(path, &mut list[..]) else {
        return Vec::new();
    };
    let mut found: Vec<_> = list[..n]
        .split(|b| *b == 0)
        .filter(|name| name.starts_with(b"user."))
        .map(|name| {
            let mut value = vec![0u8; 65_536];
            let key = std::ffi::OsString::from_vec(name.to_vec());
            let n = rustix::fs::lgetxattr(path, key, &mut value[..]).unwrap();
            (name.to_vec(), value[..n].to_vec())
        })
        .collect();
    found.sort();
    found
}
