//! Every dialect of tar that layers are written in, against umoci; and, where it has none of it or differs from the text,
//! against that text, which each such test names.

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use berth_image::Digest;

use crate::build::{Tar, block, checksum, gzip, head, record};
use crate::image::{Mounted, Tree, can_mount, convert_blobs, convert_tars, options, tree};
use crate::umoci::{TOOLS, compare, now, same, umoci};

fn mounted(layers: &[Vec<u8>]) -> Mounted {
    let (file, _) = convert_tars(layers, &options()).unwrap_or_else(|e| panic!("{e}"));
    Mounted::new(&file)
}

/// One line of what the kernel shows, by name.
#[track_caller]
fn line<'t>(tree: &'t Tree, name: &str) -> &'t str {
    tree.get(name.as_bytes())
        .unwrap_or_else(|| panic!("no {name} in {tree:?}"))
}

/// A folder with files that have holes: one of few parts, one of more than an old header holds, one that ends with a
/// hole, one that is nothing else.
fn holes(folder: &Path) {
    for (name, size, step, parts) in [
        ("few", 1 << 20, 200_000, 3),
        ("many", 8 << 20, 60_000, 70),
        ("tail", 3 << 20, 5_000, 2),
        ("none", 1 << 20, 1, 0),
    ] {
        let file = File::create(folder.join(name)).unwrap();
        file.set_len(size).unwrap();
        for part in 0..parts {
            let bytes = vec![b'a' + (part % 26) as u8; 4096];
            file.write_all_at(&bytes, part * step / 4096 * 4096)
                .unwrap();
        }
    }
}

#[test]
fn sparse_files_as_gnu_tar_writes_them() {
    if !can_mount(&["umoci", "mount", "umount", "tar"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let folder = dir.path().join("d");
    std::fs::create_dir(&folder).unwrap();
    holes(&folder);
    for words in [
        &["--format=gnu"][..],
        &["--format=pax", "--sparse-version=0.0"],
        &["--format=pax", "--sparse-version=0.1"],
        &["--format=pax", "--sparse-version=1.0"],
    ] {
        let out = Command::new("tar")
            .args(["--sparse", "--numeric-owner", "-C"])
            .arg(dir.path())
            .args(words)
            .args(["-cf", "-", "d"])
            .output()
            .unwrap();
        assert!(out.status.success(), "{out:?}");
        // Every hole is left out of the stream, or this test would not be about sparse files.
        assert!(
            out.stdout.len() < 1 << 20,
            "{words:?}: {}",
            out.stdout.len()
        );
        let image = mounted(std::slice::from_ref(&out.stdout));
        for name in ["few", "many", "tail", "none"] {
            assert!(
                std::fs::read(image.root().join("d").join(name)).unwrap()
                    == std::fs::read(folder.join(name)).unwrap(),
                "{words:?}: {name}"
            );
        }
        drop(image);
        // umoci 0.4.7 refuses GNU's own type `S`; image-spec, layer.md, "Tar archive format", asks for no more than
        // that layers are tar archives, and Go's reader, which engines use, reads it.
        if words != ["--format=gnu"] {
            same(&[out.stdout]);
        }
    }
}

/// A header in GNU's dialect; `fields` are offsets and bytes.
fn gnu(kind: u8, name: &[u8], size: u64, fields: &[(usize, &[u8])]) -> [u8; 512] {
    let mut b = block(kind, name, b"", [0o644, 0, 0, size, 1_700_000_000]);
    b[257..265].copy_from_slice(b"ustar  \0");
    for (at, bytes) in fields {
        b[*at..*at + bytes.len()].copy_from_slice(bytes);
    }
    checksum(&mut b);
    b
}

#[test]
fn gnu_long_names_and_links() {
    if !can_mount(TOOLS) {
        return;
    }
    let (name, target) = ("n".repeat(180), "t".repeat(300));
    let mut tar = Tar::new().file("a", b"a");
    let long = |tar: &mut Tar, kind, text: &str| {
        let text = [text.as_bytes(), b"\0"].concat();
        tar.raw(&gnu(kind, b"././@LongLink", text.len() as u64, &[]), &text);
    };
    long(&mut tar, b'L', &name);
    tar.raw(&gnu(b'0', &[b'n'; 100], 4, &[]), b"long");
    long(&mut tar, b'K', &target);
    long(&mut tar, b'L', &format!("{name}-link"));
    tar.raw(&gnu(b'2', b"short", 0, &[]), b"");
    long(&mut tar, b'K', &name);
    tar.raw(&gnu(b'1', b"hard", 0, &[]), b"");
    // The long name of a folder, with its slash.
    long(&mut tar, b'L', &format!("{}/", "d".repeat(150)));
    tar.raw(&gnu(b'5', b"d", 0, &[]), b"");
    same(&[tar.end()]);
}

#[test]
fn numbers_in_base_256() {
    if !can_mount(TOOLS) {
        return;
    }
    let mut tar = Tar::new();
    let ids: &[(usize, &[u8])] = &[
        (108, &[0x80, 0, 0, 0, 0xff, 0xff, 0xff, 0xfe]),
        (116, &[0x80, 0, 0, 0, 0, 1, 0, 0]),
    ];
    tar.raw(&gnu(b'0', b"ids", 0, ids), b"");
    let early: &[(usize, &[u8])] = &[(136, &[0xff; 12])];
    tar.raw(&gnu(b'0', b"before-1970", 0, early), b"");
    let late: &[(usize, &[u8])] = &[(136, &[0x80, 0, 0, 0, 0, 0, 0, 0, 0xf0, 0, 0, 0])];
    tar.raw(&gnu(b'0', b"after-2038", 0, late), b"");
    let size: &[(usize, &[u8])] = &[(124, &[0x80, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5])];
    tar.raw(&gnu(b'0', b"size", 5, size), b"12345");
    same(&[tar.file("after", b"found").end()]);
}

#[test]
fn pax_records_come_before_header_fields() {
    if !can_mount(TOOLS) {
        return;
    }
    let mut tar = Tar::new();
    let pax = |tar: &mut Tar, records: &[(&str, &str)], header: &[u8; 512], contents: &[u8]| {
        let text: Vec<u8> = (records.iter())
            .flat_map(|(k, v)| record(k.as_bytes(), v.as_bytes()))
            .collect();
        tar.raw(
            &block(b'x', b"pax", b"", [0o644, 0, 0, text.len() as u64, 0]),
            &text,
        );
        tar.raw(header, contents);
    };
    let header = block(b'0', b"wrong", b"", [0o640, 1, 2, 0, 99]);
    let records = [
        ("path", "right"),
        ("size", "7"),
        ("uid", "70000"),
        ("gid", "4000000000"),
        ("mtime", "1234567890.987654321"),
        ("atime", "1.5"),
        ("comment", "not for us"),
        ("uname", "nobody"),
    ];
    pax(&mut tar, &records, &header, b"7 bytes");
    // The last of two of one name counts; an empty one takes it back (POSIX, pax Extended Header).
    let twice = [("uid", "5"), ("uid", "6"), ("mtime", "5"), ("mtime", "")];
    pax(
        &mut tar,
        &twice,
        &block(b'0', b"twice", b"", [0o644, 1, 2, 0, 99]),
        b"",
    );
    for (i, mtime) in ["-1.000000001", "-2.5", "0.9", "0.0", "4294967294.5"]
        .iter()
        .enumerate()
    {
        tar = tar.add(head(b'0', format!("time{i}")).mtime(mtime));
    }
    let link = [("linkpath", "a target that is not the header's")];
    pax(
        &mut tar,
        &link,
        &block(b'2', b"link", b"header", [0o777, 0, 0, 0, 9]),
        b"",
    );
    same(&[tar.end()]);
}

/// POSIX.1-2017, pax, "pax Header Block": records of a global header "shall affect all subsequent files". Go's tar, and
/// so umoci, hands them on as an entry of their own and applies none: there the text decides.
#[test]
fn global_headers_hold_for_all_that_follow() {
    if !can_mount(TOOLS) {
        return;
    }
    let global = |tar: &mut Tar, records: &[(&str, &str)]| {
        let text: Vec<u8> = (records.iter())
            .flat_map(|(k, v)| record(k.as_bytes(), v.as_bytes()))
            .collect();
        tar.raw(
            &block(
                b'g',
                b"pax_global_header",
                b"",
                [0o644, 0, 0, text.len() as u64, 0],
            ),
            &text,
        );
    };
    let mut tar = Tar::new().file("before", b"");
    global(&mut tar, &[("uid", "77"), ("mtime", "1000")]);
    tar = tar
        .file("after", b"")
        .add(head(b'0', "own").pax("uid", "5"));
    // git archive's: a comment, which changes nothing.
    global(
        &mut tar,
        &[("comment", "4b825dc642cb6eb9a060e54bf8d69288fbee4904")],
    );
    tar = tar.file("still", b"");
    global(&mut tar, &[("mtime", "2000")]);
    let layer = tar.file("last", b"").end();
    let found = tree(&mounted(&[layer]).root(), now());
    assert!(
        line(&found, "before").contains(" 0:0 links 1 time 1700000000"),
        "{found:?}"
    );
    for name in ["after", "still"] {
        assert!(
            line(&found, name).contains(" 77:0 links 1 time 1000"),
            "{found:?}"
        );
    }
    assert!(
        line(&found, "own").contains(" 5:0 links 1 time 1000"),
        "{found:?}"
    );
    assert!(
        line(&found, "last").contains(" 77:0 links 1 time 2000"),
        "{found:?}"
    );
}

#[test]
fn names_in_every_encoding() {
    if !can_mount(TOOLS) {
        return;
    }
    let mut tar = Tar::new();
    for name in [
        &b"\xff\xfe"[..],
        b"caf\xe9",
        "café".as_bytes(),
        b"a\nb",
        b"\x01",
        b" ",
        b"back\\slash",
    ] {
        tar.raw(&block(b'0', name, b"", [0o644, 0, 0, 0, 9]), b"");
    }
    tar = tar.add(head(b'2', b"to\xff").link(b"\xff\xfe"));
    tar = tar.add(head(b'1', b"hard\xff").link(b"caf\xe9"));
    // Ustar's prefix, and a header without any magic whose slash says what it is.
    let mut prefixed = block(b'0', b"name", b"", [0o644, 0, 0, 0, 9]);
    prefixed[345..351].copy_from_slice(b"some/p");
    checksum(&mut prefixed);
    tar.raw(&prefixed, b"");
    let mut v7 = block(0, b"v7/", b"", [0o755, 0, 0, 0, 9]);
    v7[257..].fill(0);
    checksum(&mut v7);
    tar.raw(&v7, b"");
    same(&[tar.end()]);
    // umoci 0.4.7 refuses type `7`; POSIX.1-2017, ustar Interchange Format: where it means nothing it is a file.
    let mut tar = Tar::new();
    tar.raw(&block(b'7', b"contiguous", b"", [0o644, 0, 0, 2, 9]), b"ok");
    let image = mounted(&[tar.end()]);
    assert_eq!(
        std::fs::read(image.root().join("contiguous")).unwrap(),
        b"ok"
    );
}

#[test]
fn whiteouts_before_between_and_after_what_they_hide() {
    if !can_mount(TOOLS) {
        return;
    }
    let base = Tar::new()
        .dir("d")
        .file("d/old", b"old")
        .dir("d/sub")
        .file("d/sub/x", b"x")
        .file("f", b"f")
        .end();
    let adds = [
        ("d", b'5', ""),
        ("d/new", b'0', "new"),
        ("d/sub", b'5', ""),
        ("d/sub/y", b'0', "y"),
    ];
    let hides = ["d/.wh..wh..opq", ".wh.f"];
    // Every place that the two whiteouts can take among the four entries.
    for first in 0..=adds.len() {
        for second in 0..=adds.len() {
            let mut tar = Tar::new();
            for at in 0..=adds.len() {
                for (place, hide) in [(first, hides[0]), (second, hides[1])] {
                    if place == at {
                        tar = tar.file(hide, b"");
                    }
                }
                if let Some((name, kind, contents)) = adds.get(at) {
                    tar.push(head(*kind, name), contents.as_bytes());
                }
            }
            same(&[base.clone(), tar.end()]);
        }
    }
}

#[test]
fn hard_links_to_what_is_replaced_later() {
    if !can_mount(TOOLS) {
        return;
    }
    let base = Tar::new()
        .file("a", b"first a")
        .hardlink("b", "a")
        .file("a", b"second a")
        .hardlink("c", "a")
        .dir("d")
        .file("d/x", b"x")
        .hardlink("e", "d/x")
        .end();
    // A file takes the place of the folder that held a link's target; a link takes a folder's place.
    let upper = Tar::new()
        .hardlink("kept", "d/x")
        .file("d", b"a file now")
        .dir("a")
        .file("a/in", b"in")
        .hardlink("b2", "b")
        .file("b", b"third")
        .end();
    let top = Tar::new().hardlink("a", "kept").file("c", b"").end();
    same(&[base.clone(), upper.clone()]);
    same(&[base, upper, top]);
}

#[test]
fn zstd_layers_are_what_gzip_layers_are() {
    if !can_mount(TOOLS) {
        return;
    }
    let noise: Vec<u8> = (0..200_000u32)
        .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    let base = Tar::new()
        .dir("d")
        .file("d/a", &noise)
        .file("gone", b"g")
        .end();
    let upper = Tar::new()
        .file("d/b", &noise[..70_000])
        .file(".wh.gone", b"")
        .end();
    let layers = [base, upper];
    // umoci 0.4.7 has no zstd: it gets the same streams as gzip.
    let now = now();
    let expected = umoci(&layers, now).unwrap();
    let zstd = |layer: &[u8], level| zstd::encode_all(layer, level).unwrap();
    let skippable =
        |frame: Vec<u8>| [&[0x50, 0x2a, 0x4d, 0x18, 3, 0, 0, 0, 1, 2, 3][..], &frame].concat();
    let halves = |layer: &[u8]| {
        let (a, b) = layer.split_at(layer.len() / 2);
        [zstd(a, 1), skippable(zstd(b, 19))].concat()
    };
    type Pack<'p> = &'p dyn Fn(&[u8]) -> Vec<u8>;
    let packs: [Pack<'_>; 3] = [&|l| zstd(l, 3), &|l| skippable(zstd(l, 1)), &halves];
    for pack in packs {
        let blobs: Vec<_> = layers.iter().map(|l| (pack(l), Digest::of(l))).collect();
        let (file, _) = convert_blobs(&blobs, &options()).unwrap_or_else(|e| panic!("{e}"));
        compare(&expected, &tree(&Mounted::new(&file).root(), now), "zstd");
    }
    // One of each, and one that is not compressed.
    let mixed = [
        (zstd(&layers[0], 3), Digest::of(&layers[0])),
        (gzip(&layers[1]), Digest::of(&layers[1])),
    ];
    let plain: Vec<_> = layers.iter().map(|l| (l.clone(), Digest::of(l))).collect();
    for blobs in [&mixed[..], &plain] {
        let (file, _) = convert_blobs(blobs, &options()).unwrap_or_else(|e| panic!("{e}"));
        compare(&expected, &tree(&Mounted::new(&file).root(), now), "mixed");
    }
}

/// Many owners, sets of xattrs and files of one size at once; the writer's own tests have 300,000 of them.
#[test]
fn large_numbers_of_everything() {
    const OWNERS: u32 = 65_000;
    const SETS: u32 = 1024;
    if !can_mount(&["mount", "umount"]) {
        return;
    }
    let mut tar = Tar::new();
    let contents = |i: u32| [i.to_le_bytes(), i.wrapping_mul(2_654_435_761).to_le_bytes()].concat();
    for i in 0..OWNERS {
        let mut head = head(b'0', format!("d{}/f{i}", i % 100)).owner(u64::from(i), 0);
        if i < 2 * SETS {
            head = head.xattr("user.n", (i % SETS).to_string());
        }
        tar.push(head, &contents(i));
    }
    let image = mounted(&[tar.end()]);
    let mut value = [0; 8];
    for i in (0..OWNERS).filter(|i| *i < 2 * SETS || i % 7 == 0) {
        use std::os::unix::fs::MetadataExt as _;
        let path = image.root().join(format!("d{}/f{i}", i % 100));
        assert_eq!(std::fs::metadata(&path).unwrap().uid(), i);
        assert_eq!(std::fs::read(&path).unwrap(), contents(i), "{i}");
        if i < 2 * SETS {
            let n = rustix::fs::lgetxattr(&path, "user.n", &mut value[..]).unwrap();
            assert_eq!(value[..n], *(i % SETS).to_string().as_bytes());
        }
    }
}
