//! Large numbers: of files, names, owners, xattr sets, links.

use std::collections::HashMap;
use std::os::unix::fs::MetadataExt;

use berth_squashfs::write::{FileHandle, Kind, Meta, Tree};

use crate::oracle::{Mounted, Node, Spec, Specs, compare, image, noise, options, write};

fn root() -> Tree {
    Tree::new(Meta {
        mode: 0o755,
        ..Meta::default()
    })
}

#[test]
fn three_hundred_thousand_files_of_one_size_keep_their_contents() {
    const FILES: u64 = 300_000;
    let image = image(
        options(2),
        |writer| {
            let mut lane = writer.lane();
            let handles: Vec<FileHandle> = (0..FILES)
                .map(|i| lane.add_file(&noise(i, 64)[..]).unwrap())
                .collect();
            lane.close().unwrap();
            handles
        },
        |handles| {
            let mut tree = root();
            let mut folder = tree.root();
            for (i, handle) in handles.into_iter().enumerate() {
                if i % 1000 == 0 {
                    folder = tree
                        .add(
                            tree.root(),
                            format!("d{i}").as_bytes(),
                            Kind::Dir,
                            Meta::default(),
                        )
                        .unwrap();
                }
                tree.add(
                    folder,
                    i.to_string().as_bytes(),
                    Kind::File(handle),
                    Meta::default(),
                )
                .unwrap();
            }
            tree
        },
    );
    image.verity();
    image.own_check();
    let mut seen = 0u64;
    image.tar_entries(|name, contents| {
        let number = name.rsplit(|&b| b == b'/').next().unwrap();
        let number: u64 = std::str::from_utf8(number).unwrap().parse().unwrap();
        assert!(contents == noise(number, 64), "file {number}");
        seen += 1;
    });
    assert_eq!(seen, FILES);
}

#[test]
fn a_folder_of_256k_names_is_searched_by_its_index() {
    const NAMES: u32 = 256 << 10;
    let name = |i: u32| format!("name-{:08x}", i.wrapping_mul(2_654_435_761));
    let image = image(
        options(2),
        |_| (),
        |()| {
            let mut tree = root();
            let folder = tree
                .add(
                    tree.root(),
                    b"many",
                    Kind::Dir,
                    Meta {
                        mode: 0o755,
                        ..Meta::default()
                    },
                )
                .unwrap();
            for i in 0..NAMES {
                tree.add(
                    folder,
                    name(i).as_bytes(),
                    Kind::EmptyFile,
                    Meta {
                        mtime: i,
                        ..Meta::default()
                    },
                )
                .unwrap();
            }
            tree
        },
    );
    let Some(mounted) = Mounted::kernel(&image) else {
        return;
    };
    let folder = mounted.0.join("many");
    assert_eq!(std::fs::read_dir(&folder).unwrap().count(), NAMES as usize);
    for i in (0..NAMES).step_by(9973) {
        let found = std::fs::metadata(folder.join(name(i))).unwrap();
        assert_eq!(found.mtime(), i64::from(i));
        assert!(std::fs::metadata(folder.join(name(i) + "x")).is_err());
    }
}

#[test]
fn sixty_five_thousand_owners() {
    const OWNERS: u32 = 65_000;
    let image = image(
        options(2),
        |_| (),
        |()| {
            let mut tree = root();
            let mut folder = tree.root();
            for i in 0..OWNERS {
                if i % 500 == 0 {
                    let name = format!("d{i}");
                    folder = tree
                        .add(tree.root(), name.as_bytes(), Kind::Dir, Meta::default())
                        .unwrap();
                }
                let meta = Meta {
                    uid: i * 3,
                    gid: OWNERS * 3 - i * 3,
                    ..Meta::default()
                };
                tree.add(folder, i.to_string().as_bytes(), Kind::EmptyFile, meta)
                    .unwrap();
            }
            tree
        },
    );
    let Some(mounted) = Mounted::kernel(&image) else {
        return;
    };
    for i in (0..OWNERS).step_by(7) {
        let stat = std::fs::metadata(mounted.0.join(format!("d{}/{i}", i / 500 * 500))).unwrap();
        assert_eq!((stat.uid(), stat.gid()), (i * 3, OWNERS * 3 - i * 3));
    }
}

#[test]
fn exact_multiples_of_512_xattr_sets() {
    for sets in [511, 512, 513, 1024, 1536] {
        let spec = |i: u32| Spec {
            xattrs: vec![(b"user.n".to_vec(), i.to_string().into_bytes())],
            ..Spec::file("")
        };
        // Every set twice: the second use must find the first.
        let specs: Specs = (0..2 * sets)
            .map(|i| (i.to_string().into_bytes(), spec(i % sets)))
            .collect();
        let image = write(&specs, options(1));
        image.own_check();
        image.tar_entries(|_, _| ());
        let superblock = std::fs::read(&image.path).unwrap();
        let at = u64::from_le_bytes(superblock[56..64].try_into().unwrap()) as usize;
        assert_eq!(superblock[at + 8..at + 12], sets.to_le_bytes());
        if let Some(mounted) = Mounted::kernel(&image) {
            compare(&specs, &mounted.0, false);
            let mut value = [0; 8];
            for (name, spec) in &specs {
                let path = mounted.0.join(std::str::from_utf8(name).unwrap());
                let len = rustix::fs::lgetxattr(path, "user.n", &mut value[..]).unwrap();
                assert_eq!(value[..len], spec.xattrs[0].1);
            }
        }
    }
}

#[test]
fn names_of_one_node_far_apart() {
    // 70,000 inodes between a node's names: the differences in listings are 16 bits.
    let mut specs: Specs = HashMap::from([(b"a".to_vec(), Spec::file("first"))])
        .into_iter()
        .collect();
    specs.insert(b"m".to_vec(), Spec::new(Node::Dir));
    for i in 0..70_000 {
        if i % 500 == 0 {
            specs.insert(format!("m/{}", i / 500).into_bytes(), Spec::new(Node::Dir));
        }
        specs.insert(
            format!("m/{}/{i}", i / 500).into_bytes(),
            Spec::new(Node::Fifo),
        );
    }
    specs.insert(b"z".to_vec(), Spec::new(Node::Dir));
    for i in 0..300 {
        specs.insert(
            format!("z/{i}").into_bytes(),
            Spec::new(Node::Hard(if i % 2 == 0 {
                b"a".to_vec()
            } else {
                b"m/0/7".to_vec()
            })),
        );
    }
    let image = write(&specs, options(1));
    if let Some(mounted) = Mounted::kernel(&image) {
        compare(&specs, &mounted.0, false);
        assert_eq!(std::fs::metadata(mounted.0.join("a")).unwrap().nlink(), 151);
    }
}
