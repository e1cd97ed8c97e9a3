//! What cannot be written is refused, and nothing hangs.

use std::fs::File;
use std::io::{self, Read};

use berth_squashfs::compress::Compression;
use berth_squashfs::write::{ImageWriter, Kind, Meta, Tree, TreeError, WriteError, WriteOptions};

use crate::oracle::{noise, options};

fn tree() -> Tree {
    Tree::new(Meta::default())
}

fn writer(options: WriteOptions) -> ImageWriter {
    ImageWriter::new(tempfile::tempfile().unwrap(), options).unwrap()
}

#[test]
fn a_full_disk_is_told_to_everyone() {
    let full = File::options()
        .read(true)
        .write(true)
        .open("/dev/full")
        .unwrap();
    let mut writer = ImageWriter::new(full, options(2)).unwrap();
    let mut lane = writer.lane();
    let told = (0..200).find_map(|i| lane.add_file(&noise(i, 1 << 20)[..]).err());
    assert!(matches!(told, Some(WriteError::Io { .. })), "{told:?}");
    drop(lane);
    assert!(matches!(writer.finish(tree()), Err(WriteError::Io { .. })));
}

#[test]
fn a_lane_that_waits_is_let_go_when_the_image_fails() {
    let full = File::options()
        .read(true)
        .write(true)
        .open("/dev/full")
        .unwrap();
    let mut writer = ImageWriter::new(
        full,
        WriteOptions {
            ahead: 1000,
            ..options(1)
        },
    )
    .unwrap();
    let (mut first, mut second) = (writer.lane(), writer.lane());
    let fill = |lane: &mut berth_squashfs::write::Lane| {
        assert!((0..200).any(|i| lane.add_file(&noise(i, 1 << 20)[..]).is_err()));
    };
    std::thread::scope(|scope| {
        scope.spawn(|| fill(&mut second));
        fill(&mut first);
    });
}

#[test]
fn giving_up_ends_the_threads() {
    let mut writer = writer(options(3));
    let mut lane = writer.lane();
    lane.add_file(&noise(1, 3 << 20)[..]).unwrap();
    drop(writer);
    assert!((0..200).any(|i| lane.add_file(&noise(i, 1 << 20)[..]).is_err()));
}

#[test]
fn an_open_lane_is_noticed() {
    let mut writer = writer(options(1));
    let _open = writer.lane();
    assert!(matches!(writer.finish(tree()), Err(WriteError::LaneOpen)));
}

#[test]
fn a_reader_that_fails_fails_the_file() {
    struct Broken;
    impl Read for Broken {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::other("torn"))
        }
    }
    let mut writer = writer(options(1));
    let told = writer
        .lane()
        .add_file(noise(1, 300_000).chain(Broken))
        .unwrap_err();
    assert_eq!(told.to_string(), "contents of a file: torn");
}

#[test]
fn options_are_checked() {
    let refused = |options| ImageWriter::new(tempfile::tempfile().unwrap(), options).unwrap_err();
    assert!(matches!(
        refused(WriteOptions {
            block_size: 5000,
            ..options(1)
        }),
        WriteError::Options { .. }
    ));
    assert!(matches!(refused(options(0)), WriteError::Options { .. }));
    assert!(matches!(
        refused(WriteOptions {
            compression: Compression::Xz,
            ..options(1)
        }),
        WriteError::Compress(_)
    ));
    assert!(matches!(
        refused(WriteOptions {
            level: 99,
            ..options(1)
        }),
        WriteError::Compress(_)
    ));
}

#[test]
fn a_handle_of_another_image_is_refused() {
    let mut other = writer(options(1));
    let mut lane = other.lane();
    lane.end_file().unwrap();
    let handle = lane.end_file().unwrap();
    lane.close().unwrap();
    let mut tree = tree();
    tree.add(tree.root(), b"x", Kind::File(handle), Meta::default())
        .unwrap();
    assert!(matches!(
        writer(options(1)).finish(tree),
        Err(WriteError::UnknownHandle)
    ));
}

#[test]
fn too_many_owners_are_refused() {
    let mut tree = tree();
    for uid in 0..65_536u32 {
        tree.add(
            tree.root(),
            uid.to_string().as_bytes(),
            Kind::Fifo,
            Meta {
                uid,
                ..Meta::default()
            },
        )
        .unwrap();
    }
    let told = writer(options(1)).finish(tree).unwrap_err();
    assert_eq!(
        told.to_string(),
        "the image has more different owners and groups than the format holds (65535)"
    );
}

#[test]
fn two_nodes_of_one_name_are_refused() {
    let mut tree = tree();
    for _ in 0..2 {
        tree.add(tree.root(), b"twin\n", Kind::Fifo, Meta::default())
            .unwrap();
    }
    let told = writer(options(1)).finish(tree).unwrap_err();
    assert_eq!(
        told.to_string(),
        "two entries of one folder are named twin\\n"
    );
}

#[test]
fn what_a_tree_cannot_hold() {
    let mut tree = tree();
    let (root, meta) = (tree.root(), Meta::default());
    for name in [&b""[..], b".", b"..", b"a/b", b"a\0b", &[b'x'; 256]] {
        assert!(matches!(
            tree.add(root, name, Kind::Dir, meta),
            Err(TreeError::Name(_))
        ));
    }
    assert!(matches!(
        tree.add(root, b"l", Kind::Symlink(&[b'x'; 4096]), meta),
        Err(TreeError::Symlink(4096))
    ));
    assert!(matches!(
        tree.add(root, b"l", Kind::Symlink(b""), meta),
        Err(TreeError::Symlink(0))
    ));
    let device = Kind::CharDevice {
        major: 4096,
        minor: 0,
    };
    assert!(matches!(
        tree.add(root, b"c", device, meta),
        Err(TreeError::Device(4096, 0))
    ));
    let fifo = tree.add(root, b"fifo", Kind::Fifo, meta).unwrap();
    assert!(matches!(
        tree.add(fifo, b"x", Kind::Fifo, meta),
        Err(TreeError::Kind(_))
    ));
    assert!(matches!(
        tree.link(root, b"again", root),
        Err(TreeError::Kind(_))
    ));
    assert!(matches!(
        tree.xattrs(&[(b"system.posix_acl_access", b"")]),
        Err(TreeError::XattrName(_))
    ));
    assert!(matches!(
        tree.xattrs(&[(b"user.a", b"1"), (b"user.a", b"2")]),
        Err(TreeError::XattrTwice(_))
    ));
    assert!(matches!(
        tree.xattrs(&[(b"user.a", &[0; 65_537])]),
        Err(TreeError::XattrValue(65_537))
    ));
}
