//! What is kept on the node: damaged, killed, too small, full.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use berth_fuse::chunks::{CHUNK, Cache, ChunkStore, Sealed};
use berth_squashfs::read::ReadAt;

use crate::support::*;

#[test]
fn a_restart_fetches_nothing_and_needs_no_source() {
    let (file, sealed) = sealed_file(3 * BLOCKS_A_CHUNK + 7);
    let dir = tempfile::tempdir().unwrap();
    let source = Memory::new(&file);
    let first = open(sealed, &source, Some(&cache(dir.path(), u64::MAX)));
    read_all(&first, &file, &sealed, 1 << 20);
    drop(first);
    let cache = cache(dir.path(), u64::MAX);
    let store = ChunkStore::open(sealed, sources(vec![]), Some(&cache)).unwrap();
    read_all(&store, &file, &sealed, 100_000);
    let stats = store.stats();
    assert_eq!((stats.misses, stats.damaged), (0, 0), "{stats:?}");
}

#[test]
fn damage_on_the_local_disk_is_seen_and_fetched_anew_also_while_it_is_used() {
    let (file, sealed) = sealed_file(3 * BLOCKS_A_CHUNK);
    let dir = tempfile::tempdir().unwrap();
    let source = Memory::new(&file);
    let cache = cache(dir.path(), u64::MAX);
    let mut store = open(sealed, &source, Some(&cache));
    read_all(&store, &file, &sealed, 1 << 20);
    let disk = std::fs::OpenOptions::new()
        .write(true)
        .open(file_of(dir.path(), "data"))
        .unwrap();
    for restart in [false, true] {
        if restart {
            drop(store);
            store = open(sealed, &source, Some(&cache));
        }
        let (bytes, damaged) = (source.bytes(), store.stats().damaged);
        // One byte of the second data chunk, and one of the leaves.
        for at in [CHUNK + 12_345, sealed.hash_offset + BLOCK as u64 + 100] {
            std::os::unix::fs::FileExt::write_all_at(&disk, b"\xee", at).unwrap();
        }
        read_all(&store, &file, &sealed, 1 << 20);
        assert_eq!(store.stats().damaged - damaged, 2);
        assert_eq!(source.bytes() - bytes, CHUNK as usize + BLOCK);
        assert!(cache.used() <= file.len() as u64);
    }
}

/// A map may say anything after a crash: its promise is checked.
#[test]
fn a_map_that_promises_what_is_not_there_is_not_believed() {
    let (file, sealed) = sealed_file(20 * BLOCKS_A_CHUNK);
    let dir = tempfile::tempdir().unwrap();
    let source = Memory::new(&file);
    let touch = || {
        let store = open(sealed, &source, Some(&cache(dir.path(), u64::MAX)));
        store.read_exact_at(&mut [0; 8], 0).unwrap();
    };
    touch();
    let map = file_of(dir.path(), "map");
    let whole = std::fs::read(&map).unwrap();
    let mut all = whole.clone();
    all[64..].fill(1);
    let mut other = whole.clone();
    other[20] ^= 1;
    let cut = whole[..whole.len() - 1].to_vec();
    for wrong in [all, other, cut, Vec::new(), vec![0xff; whole.len() + 9]] {
        std::fs::write(&map, wrong).unwrap();
        let store = open(sealed, &source, Some(&cache(dir.path(), u64::MAX)));
        read_all(&store, &file, &sealed, 1 << 20);
        drop(store);
        std::fs::remove_file(file_of(dir.path(), "data")).unwrap();
        touch();
    }
}

/// A tree of one level or none has no digests in its head that would tell a wrong salt.
#[test]
fn a_salt_that_is_damaged_or_made_up_is_seen_however_small_the_image_is() {
    for blocks in [1, 5, 128, 129] {
        let (file, sealed) = sealed_file(blocks);
        let dir = tempfile::tempdir().unwrap();
        let salt = sealed.hash_offset + 88;
        let cache = cache(dir.path(), u64::MAX);
        let source = Memory::new(&file);
        read_all(
            &open(sealed, &source, Some(&cache)),
            &file,
            &sealed,
            1 << 20,
        );
        let disk = std::fs::OpenOptions::new()
            .write(true)
            .open(file_of(dir.path(), "data"))
            .unwrap();
        std::os::unix::fs::FileExt::write_all_at(&disk, b"\xee", salt).unwrap();
        read_all(
            &open(sealed, &source, Some(&cache)),
            &file,
            &sealed,
            1 << 20,
        );
        // What was put right stays right.
        let store = ChunkStore::open(sealed, sources(vec![]), Some(&cache)).unwrap();
        read_all(&store, &file, &sealed, 1 << 20);
        let mut lie = file.to_vec();
        lie[salt as usize] ^= 1;
        let liar = Memory::new(&Arc::new(lie));
        let both = sources(vec![Box::new(liar), Box::new(source)]);
        read_all(
            &ChunkStore::open(sealed, both, None).unwrap(),
            &file,
            &sealed,
            1 << 20,
        );
    }
}

const KILLED: &str = "BERTH_TEST_KILLED_IN";

/// Not a test of its own: what [`killed_at_any_moment`] kills.
#[test]
fn reads_until_it_is_killed() {
    let Some(folder) = std::env::var_os(KILLED) else {
        return;
    };
    let (file, sealed) = sealed_file(256 * BLOCKS_A_CHUNK);
    let cache = cache(Path::new(&folder), 8 << 20);
    println!("reading");
    loop {
        let store = open(sealed, &Memory::new(&file), Some(&cache));
        read_all(&store, &file, &sealed, 200_000);
    }
}

#[test]
fn killed_at_any_moment_it_goes_on_with_right_bytes() {
    let dir = tempfile::tempdir().unwrap();
    let (file, sealed) = sealed_file(256 * BLOCKS_A_CHUNK);
    for round in 0..12u64 {
        let mut child = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "cache::reads_until_it_is_killed", "--nocapture"])
            .env(KILLED, dir.path())
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let out = BufReader::new(child.stdout.take().unwrap());
        assert!(out.lines().any(|line| line.unwrap().contains("reading")));
        // Not a wait for anything: where in its work it dies shall differ.
        std::thread::sleep(Duration::from_millis(7 * round));
        child.kill().unwrap();
        child.wait().unwrap();
        let cache = cache(dir.path(), 8 << 20);
        let store = open(sealed, &Memory::new(&file), Some(&cache));
        read_all(&store, &file, &sealed, 333_333);
        assert!(cache.used() <= 8 << 20);
    }
}

#[test]
fn a_small_cache_is_shared_by_images_and_stays_small() {
    let images: Vec<_> = [200, 230]
        .map(|chunks| sealed_file(chunks * BLOCKS_A_CHUNK + 1))
        .into();
    let dir = tempfile::tempdir().unwrap();
    let cache = cache(dir.path(), 4 << 20);
    let open_all = || -> Vec<_> {
        let open = |(file, sealed): &(Arc<Vec<u8>>, Sealed)| {
            open(*sealed, &Memory::new(file), Some(&cache))
        };
        images.iter().map(open).collect()
    };
    let stores = open_all();
    std::thread::scope(|scope| {
        for thread in 0..4usize {
            let ((file, sealed), store) = (&images[thread % 2], &stores[thread % 2]);
            scope.spawn(move || {
                let mut buf = vec![0; 50_000];
                for round in 0..400usize {
                    let most = sealed.hash_offset as usize - buf.len();
                    let at = (round * 7_654_321 + thread * 1_234_567) % most;
                    store.read_exact_at(&mut buf, at as u64).unwrap();
                    assert!(buf == file[at..at + buf.len()], "bytes at {at}");
                }
            });
        }
    });
    assert!(cache.evicted() > 0);
    assert!(cache.used() <= cache.limit());
    // Heads, maps and blocks of the filesystem come on top.
    assert!(disk_bytes(dir.path()) <= cache.limit() + (1 << 20));
    // An image that nobody reads goes first, and whole.
    drop(stores);
    let mut stores = open_all();
    drop(stores.remove(0));
    let (file, sealed) = &images[1];
    read_all(&stores[0], file, sealed, 1 << 20);
    let maps = std::fs::read_dir(dir.path()).unwrap();
    let maps = maps.filter(|e| {
        e.as_ref()
            .unwrap()
            .path()
            .extension()
            .is_some_and(|e| e == "map")
    });
    assert_eq!(maps.count(), 1);
}

#[test]
fn a_cache_in_use_is_left_alone_and_free_when_its_server_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let first = cache(dir.path(), u64::MAX);
    assert!(Cache::open(dir.path(), None).is_err());
    drop(first);
    assert!(Cache::open(dir.path(), None).unwrap().limit() > 0);
}

/// A cache on a filesystem of 2 MiB, which root can make.
#[test]
fn a_full_disk_means_going_on_without() {
    if !rustix::process::geteuid().is_root() {
        assert!(std::env::var_os("CI").is_none(), "CI mounts as root");
        eprintln!("left out: making a small filesystem needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let small = dir.path().to_str().unwrap();
    let mount = ["-t", "tmpfs", "-o", "size=2m", "tmpfs", small];
    let run = |program: &str, args: &[&str]| {
        let status = std::process::Command::new(program).args(args).status();
        assert!(status.unwrap().success(), "{program}");
    };
    run("mount", &mount);
    let result = std::panic::catch_unwind(|| {
        let (file, sealed) = sealed_file(96 * BLOCKS_A_CHUNK);
        let source = Memory::new(&file);
        let cache = cache(dir.path(), u64::MAX);
        let store = open(sealed, &source, Some(&cache));
        read_all(&store, &file, &sealed, 200_000);
        assert!(store.stats().not_kept >= 60, "{:?}", store.stats());
        // What did fit is there, and its room is known once what is fetched ahead has found none.
        let until = Instant::now() + Duration::from_secs(60);
        while cache.used() > 2 << 20 && Instant::now() < until {
            std::thread::yield_now();
        }
        assert!(cache.used() > 1 << 20 && cache.used() <= 2 << 20);
    });
    // Lazily: who fetched ahead may have a file open for a moment more.
    run("umount", &["--lazy", small]);
    result.unwrap();
}
