//! The same layers through umoci and through us: one tree. umoci is only fed well-formed layers.

use std::path::Path;
use std::process::Command;

use crate::build::{self, Tar, head};
use crate::image::{self, can_mount, convert_tars, options};
use crate::umoci::{TOOLS, compare, now, ours, same, umoci};

#[test]
fn metadata_of_every_kind() {
    if !can_mount(TOOLS) {
        return;
    }
    let long = format!("{}/{}", "d".repeat(120), "n".repeat(200));
    let layer = Tar::new()
        .dir("./")
        .add(head(b'5', "dir").mode(0o1777).owner(5, 6).mtime("5.25"))
        .file("dir/empty", b"")
        .file(b"dir/not-\xff-utf8", b"x")
        .dir(long.rsplit_once('/').unwrap().0)
        .file(&long, b"long")
        .add(
            head(b'2', "dir/link")
                .link("../no such/file")
                .owner(70_000, 3_000_000_000),
        )
        .add(head(b'6', "fifo").mode(0o600))
        .add(head(b'3', "null").mode(0o666))
        .add(head(b'0', "setid").mode(0o6755).owner(1, 2))
        .add(head(b'0', "early").mtime("-1.5"))
        .add(head(b'0', "late").mtime("4294967295.9"))
        .add(
            head(b'0', "attrs")
                .xattr("user.a", b"1")
                .xattr("user.bé", b"=\0\n"),
        )
        .add(head(b'0', "big-id").owner(4_294_967_294, 65_536))
        .end();
    same(&[layer]);
}

#[test]
fn whiteouts_in_any_order() {
    if !can_mount(TOOLS) {
        return;
    }
    let base = Tar::new()
        .dir("a")
        .file("a/1", b"one")
        .file("a/2", b"two")
        .dir("b")
        .file("b/1", b"one")
        .dir("b/deep")
        .file("b/deep/x", b"x")
        .dir("c")
        .file("c/1", b"one")
        .file("gone", b"g")
        .end();
    let upper = Tar::new()
        .dir("a")
        .file("a/3", b"three")
        .file("a/.wh..wh..opq", b"")
        .dir("b")
        .file("b/.wh.deep", b"")
        .file("b/.wh.1", b"")
        .file("b/1", b"new one")
        .file(".wh.c", b"")
        .file(".wh.gone", b"")
        .file(".wh.never-there", b"")
        .end();
    let top = Tar::new()
        .dir("c")
        .file("c/2", b"two")
        .dir("b")
        .file("b/.wh..wh..opq", b"")
        .file("b/2", b"2")
        .end();
    same(&[base.clone(), upper.clone()]);
    same(&[base, upper, top]);
}

#[test]
fn kinds_replace_each_other() {
    if !can_mount(TOOLS) {
        return;
    }
    let base = Tar::new()
        .dir("dir")
        .file("dir/inside", b"i")
        .file("file", b"f")
        .symlink("link", "dir")
        .symlink("into", "dir")
        .end();
    let upper = Tar::new()
        .file("dir", b"now a file")
        .dir("file")
        .file("file/inside", b"j")
        .dir("link")
        .file("link/inside", b"k")
        .end();
    same(&[base.clone(), upper]);
    same(&[base, Tar::new().file("into/through", b"t").end()]);
}

#[test]
fn hard_links_within_and_across_layers() {
    if !can_mount(TOOLS) {
        return;
    }
    let base = Tar::new()
        .dir("d")
        .file("d/a", b"contents of a")
        .hardlink("d/b", "d/a")
        .hardlink("c", "/d/b")
        .symlink("s", "d/a")
        .hardlink("t", "s")
        .file("hidden", b"only its link stays")
        .hardlink("kept", "hidden")
        .end();
    let upper = Tar::new()
        .hardlink("across", "d/a")
        .file("d/a", b"another a")
        .hardlink("newer", "d/a")
        .file(".wh.hidden", b"")
        .end();
    let top = Tar::new()
        .file("c", b"broken off")
        .hardlink("last", "across")
        .end();
    same(&[base.clone(), upper.clone()]);
    same(&[base, upper, top]);
}

/// A small generator of layer stacks; the same seed gives the same stack. It keeps a rough picture of the tree, so
/// that most links have a target and most parents are folders.
struct Dice {
    state: u64,
    seen: std::collections::BTreeMap<String, u8>,
}

impl Dice {
    fn new(seed: u64) -> Self {
        Self {
            state: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15),
            seen: Default::default(),
        }
    }

    fn roll(&mut self, sides: u64) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        (self.state >> 11) % sides
    }

    /// A path whose parents are not known to be files.
    fn path(&mut self) -> String {
        let mut path = String::new();
        for _ in 0..=self.roll(3) {
            if self.seen.get(&path) == Some(&b'0') {
                break;
            }
            if !path.is_empty() {
                path.push('/');
            }
            path += ["a", "b", "c", "d"][self.roll(4) as usize];
        }
        path
    }

    fn dressed(&mut self, kind: u8, path: &str) -> build::Head {
        let h = head(kind, path)
            .mode(0o400 | self.roll(0o400) as u32)
            .owner(self.roll(3), self.roll(3))
            .mtime(&(1_000_000 + self.roll(100)).to_string());
        match self.roll(5) {
            0 => h.xattr("user.x", self.roll(3).to_string()),
            _ => h,
        }
    }

    fn put(&mut self, path: &str, kind: u8) {
        if kind != b'5' {
            self.forget(path);
        }
        self.seen.insert(path.to_owned(), kind);
    }

    fn forget(&mut self, path: &str) {
        let below = format!("{path}/");
        self.seen.retain(|p, _| p != path && !p.starts_with(&below));
    }

    fn layer(&mut self) -> Vec<u8> {
        let mut tar = Tar::new();
        // Whiteouts come first: where they follow entries that came through a symlink which they take away, umoci and
        // the text of the image-spec differ. Other orders are in `whiteouts_in_any_order`.
        for _ in 0..self.roll(4) {
            let path = self.path();
            // A tool that writes whiteouts writes the folders they lie in.
            let (parent, name) = path.rsplit_once('/').unwrap_or(("", &path));
            for (end, _) in path.match_indices('/') {
                tar = tar.dir(&path[..end]);
                self.put(&path[..end], b'5');
            }
            let (name, gone) = match self.roll(3) {
                0 => (".wh..wh..opq".to_owned(), parent),
                _ => (format!(".wh.{name}"), &path[..]),
            };
            tar = tar.file(format!("{parent}/{name}"), b"");
            self.forget(gone);
        }
        for _ in 0..=self.roll(12) {
            let path = self.path();
            match self.roll(10) {
                0..=3 => {
                    tar.push(self.dressed(b'5', &path), b"");
                    self.put(&path, b'5');
                }
                4..=6 => {
                    let contents = vec![b'x'; self.roll(3000) as usize];
                    tar.push(self.dressed(b'0', &path), &contents);
                    self.put(&path, b'0');
                }
                7 => {
                    let target = ["a", "b/c", "../d", "/a/b", "nowhere"][self.roll(5) as usize];
                    tar = tar.symlink(&path, target);
                    self.put(&path, b'2');
                }
                _ => {
                    let files = self.seen.iter().filter(|(_, kind)| **kind != b'5');
                    let files: Vec<String> = files.map(|(path, _)| path.clone()).collect();
                    if !files.is_empty() {
                        let target = &files[self.roll(files.len() as u64) as usize];
                        if *target != path {
                            tar = tar.hardlink(&path, target);
                            self.put(&path, b'0');
                        }
                    }
                }
            }
        }
        tar.end()
    }
}

/// What GNU tar says about the layers, for a person who looks for the reason.
fn listing(layers: &[Vec<u8>]) -> String {
    let list = |(i, layer): (usize, &Vec<u8>)| {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), layer).unwrap();
        let out = Command::new("tar")
            .arg("-tvf")
            .arg(file.path())
            .output()
            .unwrap();
        format!("layer {i}\n{}", String::from_utf8_lossy(&out.stdout))
    };
    layers.iter().enumerate().map(list).collect()
}

#[test]
fn generated_stacks() {
    if !can_mount(TOOLS) {
        return;
    }
    let cases: u64 = std::env::var("BERTH_CASES").map_or(100, |n| n.parse().unwrap());
    let mut compared = 0;
    for seed in 1..=cases {
        let mut dice = Dice::new(seed);
        let layers: Vec<_> = (0..=dice.roll(4)).map(|_| dice.layer()).collect();
        let now = now();
        // What umoci refuses (a link to nothing, a name below a file) is no oracle.
        let Ok(expected) = umoci(&layers, now) else {
            continue;
        };
        compared += 1;
        compare(
            &expected,
            &ours(&layers, now),
            &format!("seed {seed}\n{}", listing(&layers)),
        );
    }
    assert!(
        compared > cases / 4,
        "only {compared} of {cases} stacks were well-formed"
    );
}

#[test]
fn the_seal_is_what_veritysetup_wants() {
    if !can_mount(&["veritysetup"]) {
        return;
    }
    let layer = Tar::new().file("f", &vec![7; 3 << 20]).end();
    let (file, done) = convert_tars(&[layer], &options()).unwrap();
    use std::os::fd::AsRawFd as _;
    let path = format!("/proc/{}/fd/{}", std::process::id(), file.as_raw_fd());
    assert!(Path::new(&path).exists());
    image::run(
        Command::new("veritysetup")
            .args(["verify", &path, &path, &done.verity_root])
            .arg(format!("--hash-offset={}", done.hash_offset)),
    );
}

/// The image of the README's first command: Debian with Python, in two layers of gzip.
#[test]
fn a_real_image() {
    // What scripts/demo-image needs besides.
    if !can_mount(TOOLS) || !can_mount(&["debootstrap"]) {
        return;
    }
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../scripts/demo-image");
    let made = Command::new(script).arg("python").output().unwrap();
    let said = String::from_utf8_lossy(&made.stdout);
    let error = String::from_utf8_lossy(&made.stderr);
    let folder = said.trim().strip_prefix("oci:");
    let folder = folder.and_then(|name| name.strip_suffix(":1"));
    let folder = Path::new(folder.unwrap_or_else(|| panic!("{error}")));
    let read = |digest: &serde_json::Value| {
        let name = digest.as_str().unwrap().replace(':', "/");
        std::fs::read(folder.join("blobs").join(name)).unwrap()
    };
    let json = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).unwrap();
    let index = json(&std::fs::read(folder.join("index.json")).unwrap());
    let manifest = json(&read(&index["manifests"][0]["digest"]));
    let layers: Vec<Vec<u8>> = (manifest["layers"].as_array().unwrap().iter())
        .map(|layer| build::gunzip(&read(&layer["digest"])))
        .collect();
    assert!(layers.len() >= 2);
    same(&layers);
}
