//! The same input gives the same bytes, whoever computes them and whenever.

use std::sync::{Arc, Barrier};

use berth_squashfs::compress::Compression;
use berth_squashfs::spill::Spill;
use berth_squashfs::write::{FileHandle, Kind, Lane, Meta, Tree, WriteOptions};

use crate::oracle::{Image, Spec, Specs, image, noise, options, prose, write};
use crate::shapes::zoo;

const BLOCK: usize = 128 << 10;

/// Files of all sizes, some of them twice, some of them alike at first.
fn mix(seed: u64) -> Vec<Vec<u8>> {
    let size =
        |i: u64| [0, 40, 3000, 70_000, BLOCK, 3 * BLOCK + 17, 900][(i % 7) as usize] + i as usize;
    let mut files: Vec<_> = (0..150).map(|i| prose(seed * 1000 + i, size(i))).collect();
    files.extend((0..150).step_by(11).map(|i| prose(1000 + i, size(i))));
    files.push([prose(seed * 1000 + 5, 3 * BLOCK), noise(seed, 2 * BLOCK)].concat());
    files.push(vec![0; 7 * BLOCK]);
    files
}

fn names(lanes: Vec<Vec<FileHandle>>) -> Tree {
    let mut tree = Tree::new(Meta {
        mode: 0o755,
        ..Meta::default()
    });
    for (l, handles) in lanes.into_iter().enumerate() {
        for (i, handle) in handles.into_iter().enumerate() {
            tree.add(
                tree.root(),
                format!("{l}-{i}").as_bytes(),
                Kind::File(handle),
                Meta::default(),
            )
            .unwrap();
        }
    }
    tree
}

fn fill(mut lane: Lane, files: &[Vec<u8>]) -> Vec<FileHandle> {
    let handles = files
        .iter()
        .map(|file| lane.add_file(&file[..]).unwrap())
        .collect();
    lane.close().unwrap();
    handles
}

/// Several lanes, each filled by a thread of its own; `backwards`: the last lane is full before the first
/// one begins.
fn lanes(options: WriteOptions, count: u64, backwards: bool) -> Image {
    let contents: Vec<_> = (0..count).map(mix).collect();
    image(
        options,
        |writer| {
            let lanes: Vec<_> = contents.iter().map(|_| writer.lane()).collect();
            if backwards {
                let mut handles: Vec<_> = lanes
                    .into_iter()
                    .zip(&contents)
                    .rev()
                    .map(|(l, c)| fill(l, c))
                    .collect();
                handles.reverse();
                return handles;
            }
            let together = Barrier::new(lanes.len());
            std::thread::scope(|scope| {
                let threads: Vec<_> = lanes
                    .into_iter()
                    .zip(&contents)
                    .map(|(lane, files)| {
                        let together = &together;
                        scope.spawn(move || {
                            together.wait();
                            fill(lane, files)
                        })
                    })
                    .collect();
                threads.into_iter().map(|t| t.join().unwrap()).collect()
            })
        },
        names,
    )
}

fn spill() -> Option<Arc<Spill>> {
    Some(Arc::new(Spill::new(tempfile::tempfile().unwrap())))
}

#[test]
fn any_number_of_threads_gives_the_same_bytes() {
    let digests: Vec<_> = [1, 2, 7]
        .map(|threads| lanes(options(threads), 1, false).digest())
        .to_vec();
    assert!(digests.iter().all(|d| *d == digests[0]), "{digests:?}");
}

#[test]
fn any_order_in_time_gives_the_same_bytes() {
    let one = lanes(options(2), 4, false);
    let digest = one.digest();
    one.verity();
    let tiny = |threads| WriteOptions {
        ahead: 4096,
        ..options(threads)
    };
    let none = |threads| WriteOptions {
        ahead: 0,
        ..options(threads)
    };
    assert_eq!(
        lanes(tiny(3), 4, false).digest(),
        digest,
        "waiting for their turn"
    );
    assert_eq!(lanes(none(1), 4, false).digest(), digest, "never ahead");
    assert_eq!(
        lanes(options(7), 4, true).digest(),
        digest,
        "backwards in memory"
    );
    assert_eq!(
        lanes(
            WriteOptions {
                spill: spill(),
                ..none(2)
            },
            4,
            true
        )
        .digest(),
        digest,
        "backwards on disk"
    );
}

/// Every third file of each lane is not wanted, and every fifteenth wanted after all; lanes know when they are made
/// (`open` false) or when all of them are full.
fn some_unwanted(options: WriteOptions, open: bool) -> Image {
    let contents: Vec<_> = (0..3).map(mix).collect();
    image(
        options,
        |writer| {
            let mut lanes: Vec<_> = (0..3)
                .map(|_| match open {
                    true => writer.open_lane(),
                    false => writer.lane(),
                })
                .collect();
            let mut handles = vec![Vec::new(); 3];
            let mut unwanted = vec![Vec::new(); 3];
            for (l, lane) in lanes.iter_mut().enumerate().rev() {
                for (i, file) in contents[l].iter().enumerate() {
                    if i % 3 == 0 {
                        let handle = open.then(|| lane.add_file(&file[..]).unwrap());
                        unwanted[l].push((i, handle));
                    } else {
                        handles[l].push(lane.add_file(&file[..]).unwrap());
                    }
                }
            }
            for (l, mut lane) in lanes.into_iter().enumerate() {
                if open {
                    lane.settle(unwanted[l].iter().filter_map(|u| u.1).collect())
                        .unwrap();
                }
                // Lanes may go on.
                handles[l].push(lane.add_file(&b"the last"[..]).unwrap());
                lane.close().unwrap();
            }
            let mut late = writer.lane();
            let mut back = Vec::new();
            for (l, files) in unwanted.iter().enumerate() {
                for &(i, handle) in files.iter().filter(|u| u.0 % 15 == 0) {
                    back.push(match handle {
                        Some(handle) => late.bring_back(handle).unwrap(),
                        None => late.add_file(&contents[l][i][..]).unwrap(),
                    });
                }
            }
            late.close().unwrap();
            handles.push(back);
            handles
        },
        names,
    )
}

#[test]
fn what_is_wanted_may_be_said_late() {
    let image = some_unwanted(options(1), false);
    image.verity();
    let digest = image.digest();
    for threads in [1, 2, 8] {
        let tiny = WriteOptions {
            ahead: 4096,
            spill: spill(),
            ..options(threads)
        };
        assert_eq!(some_unwanted(tiny, true).digest(), digest, "{threads}");
    }
    let roomy = WriteOptions {
        ahead: 1 << 30,
        ..options(2)
    };
    assert_eq!(some_unwanted(roomy, true).digest(), digest, "in memory");
}

#[test]
fn how_contents_are_handed_over_does_not_matter() {
    let files = mix(3);
    let whole = image(options(2), |w| vec![fill(w.lane(), &files)], names).digest();
    let pieces = image(
        options(2),
        |w| {
            let mut lane = w.lane();
            let handles = files.iter().map(|file| {
                if file.len() > BLOCK && file.iter().all(|&b| b == 0) {
                    lane.write_hole(file.len() as u64).unwrap();
                } else {
                    file.chunks(1234).for_each(|part| lane.write(part).unwrap());
                }
                lane.end_file().unwrap()
            });
            let handles = vec![handles.collect()];
            lane.close().unwrap();
            handles
        },
        names,
    );
    assert_eq!(pieces.digest(), whole);
}

#[test]
fn the_order_of_the_tree_does_not_matter() {
    let build = |backwards: bool| {
        image(
            options(1),
            |_| (),
            |()| {
                let mut tree = Tree::new(Meta::default());
                let mut names: Vec<_> = (0..500).map(|i| i.to_string()).collect();
                if backwards {
                    names.reverse();
                }
                for name in names {
                    let uid = name.len() as u32;
                    let xattrs = tree.xattrs(&[(b"user.x", name.as_bytes())]).unwrap();
                    tree.add(
                        tree.root(),
                        name.as_bytes(),
                        Kind::Fifo,
                        Meta {
                            uid,
                            xattrs,
                            ..Meta::default()
                        },
                    )
                    .unwrap();
                }
                tree
            },
        )
        .digest()
    };
    assert_eq!(build(true), build(false));
}

/// What these images were when this test was written. A change here means that the same layers give
/// another image than before: say so in the changelog.
#[test]
fn pinned_bytes() {
    let small: Specs = [(b"hello".to_vec(), Spec::file("hello, world\n"))]
        .into_iter()
        .collect();
    let with = |compression, level| WriteOptions {
        compression,
        level,
        ..options(2)
    };
    let digests = [
        write(&small, options(2)).digest(),
        write(&zoo(), with(Compression::Zstd, 3)).digest(),
        write(&zoo(), with(Compression::Gzip, 6)).digest(),
        write(&zoo(), with(Compression::Lz4, 1)).digest(),
    ];
    assert_eq!(
        digests.each_ref().map(|d| &d[..16]),
        [
            "9a1359fede7a797f",
            "27b653b79122723a",
            "f5dcf60ec787a30b",
            "4c7c3cd095aee275"
        ]
    );
}
