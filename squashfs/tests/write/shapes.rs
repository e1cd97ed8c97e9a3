//! Every kind of node and of contents.

use std::os::unix::fs::MetadataExt;

use berth_squashfs::compress::Compression;
use berth_squashfs::write::WriteOptions;

use crate::oracle::{Mounted, Node, Spec, Specs, noise, options, prose, specs, write};

const BLOCK: usize = 128 << 10;

/// One of everything.
pub fn zoo() -> Specs {
    let mut all = specs([
        ("empty", Spec::file("")),
        ("one", Spec::file("x")),
        ("text", Spec::file("hello\n")),
        ("again", Spec::file("hello\n")),
        ("block", Spec::file(prose(1, BLOCK))),
        ("block-1", Spec::file(prose(2, BLOCK - 1))),
        ("block+1", Spec::file(prose(3, BLOCK + 1))),
        ("noise", Spec::file(noise(4, 5 * BLOCK + 77))),
        ("d", Spec::new(Node::Dir)),
        ("d/empty", Spec::new(Node::Dir)),
        ("d/link", Spec::new(Node::Symlink(b"../text".to_vec()))),
        ("d/long", Spec::new(Node::Symlink(vec![b'l'; 4095]))),
        ("d/hard", Spec::new(Node::Hard(b"text".to_vec()))),
        (
            "d/hardlink-to-link",
            Spec::new(Node::Hard(b"d/link".to_vec())),
        ),
        ("null", Spec::new(Node::Char(1, 3))),
        ("big", Spec::new(Node::Char(4095, 1_048_575))),
        ("disk", Spec::new(Node::Block(8, 300))),
        ("fifo", Spec::new(Node::Fifo)),
        ("socket", Spec::new(Node::Socket)),
    ]);
    all.insert(b"not\xff\xfeutf8\n".to_vec(), Spec::file("n"));
    all.insert(vec![b'n'; 255], Spec::file("long name"));
    all.insert(
        b"owned".to_vec(),
        Spec {
            mode: 0o6751,
            uid: 1000,
            gid: u32::MAX - 1,
            mtime: u32::MAX,
            ..Spec::file("o")
        },
    );
    all.insert(
        b"sticky".to_vec(),
        Spec {
            mode: 0o1777,
            mtime: 0,
            ..Spec::new(Node::Dir)
        },
    );
    all
}

fn with_xattrs() -> Specs {
    let mut all = zoo();
    let set = |n: usize| -> Vec<(Vec<u8>, Vec<u8>)> {
        vec![
            (b"user.b".to_vec(), vec![7; n]),
            (b"trusted.a\xff".to_vec(), Vec::new()),
            (b"security.x".to_vec(), b"v".to_vec()),
        ]
    };
    for path in ["one", "text", "d", "block"] {
        all.get_mut(path.as_bytes()).unwrap().xattrs = set(3);
    }
    all.get_mut(&b"noise"[..]).unwrap().xattrs = set(65_536);
    for path in ["d/link", "null", "fifo", "socket", "disk"] {
        // Only these name spaces are allowed on what is neither file nor folder.
        all.get_mut(path.as_bytes()).unwrap().xattrs =
            vec![(b"trusted.t".to_vec(), path.as_bytes().to_vec())];
    }
    all
}

#[test]
fn one_of_everything() {
    write(&zoo(), options(2)).check(&zoo());
}

#[test]
fn one_of_everything_with_gzip_and_small_blocks() {
    let options = WriteOptions {
        compression: Compression::Gzip,
        level: 9,
        block_size: 4096,
        ..options(2)
    };
    write(&zoo(), options).check(&zoo());
}

#[test]
fn one_of_everything_with_lz4_and_the_largest_blocks() {
    let options = WriteOptions {
        compression: Compression::Lz4,
        level: 1,
        block_size: 1 << 20,
        ..options(2)
    };
    write(&zoo(), options).check(&zoo());
}

#[test]
fn xattrs_of_every_kind() {
    let specs = with_xattrs();
    let image = write(&specs, options(2));
    image.verity();
    image.own_check();
    if let Some(mounted) = Mounted::kernel(&image) {
        crate::oracle::compare(&specs, &mounted.0, true);
    }
    image.tar_entries(|_, _| ());
}

#[test]
fn an_image_of_nothing() {
    let image = write(&Specs::new(), options(1));
    image.check(&Specs::new());
    assert_eq!(
        image.done.hash_offset,
        Some(4096),
        "one data block is its own verity root"
    );
}

#[test]
fn without_verity_the_file_ends_with_the_image() {
    let image = write(
        &zoo(),
        WriteOptions {
            verity: None,
            ..options(2)
        },
    );
    assert_eq!(
        image.done.file_size,
        image.done.squashfs_size.next_multiple_of(4096)
    );
    image.check(&zoo());
}

#[test]
fn only_fragments() {
    let files = (0..500).map(|i| {
        (
            format!("f{i}").into_bytes(),
            Spec::file(prose(i, 700 * i as usize % 9000)),
        )
    });
    let specs: Specs = files.collect();
    write(&specs, options(2)).check(&specs);
}

#[test]
fn holes_take_no_space() {
    let at_both_ends = |len: usize| {
        let mut file = vec![0; len];
        (file[0], file[len - 1]) = (1, 1);
        file
    };
    let specs = specs([
        ("nothing", Spec::file(vec![0; 40 * BLOCK])),
        ("nothing and a bit", Spec::file(vec![0; 40 * BLOCK + 5])),
        ("middle", Spec::file(at_both_ends(50 * BLOCK + 9))),
        (
            "end",
            Spec::file([noise(1, BLOCK), vec![0; 10 * BLOCK]].concat()),
        ),
        ("small", Spec::file(vec![0; 500])),
    ]);
    let image = write(&specs, options(2));
    assert!(image.done.squashfs_size < 2 * BLOCK as u64);
    image.check(&specs);
    if let Some(mounted) = Mounted::kernel(&image) {
        let blocks = |name| std::fs::metadata(mounted.0.join(name)).unwrap().blocks();
        assert_eq!(blocks("nothing"), 0);
        assert_eq!(blocks("middle"), (BLOCK as u64 + 9).div_ceil(512));
    }
}

#[test]
fn what_is_there_already_takes_no_space() {
    let long = noise(1, 8 * BLOCK + 100);
    let changed_at = |at: usize| {
        let mut copy = long.clone();
        copy[at] ^= 1;
        copy
    };
    let all = specs([
        ("a", Spec::file(long.clone())),
        ("b the same", Spec::file(long.clone())),
        ("c its beginning", Spec::file(&long[..4 * BLOCK])),
        ("d small", Spec::file(&long[..999])),
        ("e small again", Spec::file(&long[..999])),
    ]);
    let image = write(&all, options(3));
    image.check(&all);
    assert!(
        image.done.squashfs_size < long.len() as u64 + 3000,
        "{}",
        image.done.squashfs_size
    );

    let all = specs([
        ("a", Spec::file(long.clone())),
        ("b other last block", Spec::file(changed_at(8 * BLOCK + 50))),
        ("c the same as b", Spec::file(changed_at(8 * BLOCK + 50))),
        ("d other middle", Spec::file(changed_at(4 * BLOCK))),
        ("e other first", Spec::file(changed_at(0))),
        ("f longer", Spec::file([&long[..], b"more"].concat())),
        (
            "g shuffled",
            Spec::file([&long[BLOCK..3 * BLOCK], &long[..2 * BLOCK]].concat()),
        ),
        (
            "h holes and then the same",
            Spec::file([vec![0; BLOCK], long.clone()].concat()),
        ),
        (
            "i holes and then the same",
            Spec::file([vec![0; BLOCK], long.clone()].concat()),
        ),
    ]);
    for threads in [1, 3] {
        write(&all, options(threads)).check(&all);
    }
}

#[test]
fn deep_folders() {
    let mut all = Specs::new();
    let mut path = Vec::new();
    // As deep as paths can be opened in one piece.
    for _ in 0..1500 {
        path.extend_from_slice(b"d");
        all.insert(path.clone(), Spec::new(Node::Dir));
        path.push(b'/');
    }
    let image = write(&all, options(1));
    if let Some(mounted) = Mounted::kernel(&image) {
        crate::oracle::compare(&all, &mounted.0, true);
    }
}

#[test]
fn a_large_file() {
    let all = specs([("large", Spec::file(prose(9, 64 << 20)))]);
    write(&all, options(2)).check(&all);
}
