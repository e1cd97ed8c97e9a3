//! Right bytes, each fetched once.

use std::sync::Barrier;

use berth_squashfs::read::ReadAt;

use crate::support::*;

#[test]
fn images_of_all_sizes_are_read_right() {
    for blocks in [
        1,
        2,
        BLOCKS_A_CHUNK,
        BLOCKS_A_CHUNK + 1,
        128,
        129,
        128 * 128 + 3,
    ] {
        let (file, sealed) = sealed_file(blocks);
        let dir = tempfile::tempdir().unwrap();
        let source = Memory::new(&file);
        for cache in [None, Some(cache(dir.path(), u64::MAX))] {
            let store = open(sealed, &source, cache.as_ref());
            read_all(&store, &file, &sealed, 300_000);
            let beyond = store.read_exact_at(&mut [0; 2], sealed.hash_offset - 1);
            assert!(beyond.is_err());
            store.read_exact_at(&mut [], sealed.hash_offset).unwrap();
        }
    }
}

#[test]
fn many_readers_fetch_each_byte_once() {
    let (file, sealed) = sealed_file(64 * BLOCKS_A_CHUNK);
    let dir = tempfile::tempdir().unwrap();
    let source = Memory::new(&file);
    let store = open(sealed, &source, Some(&cache(dir.path(), u64::MAX)));
    let start = Barrier::new(8);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                start.wait();
                read_all(&store, &file, &sealed, 131_072);
            });
        }
    });
    assert_eq!(source.bytes(), file.len());
    let stats = store.stats();
    // 64 chunks of data and one of leaves.
    assert_eq!(stats.misses + stats.ahead, 65, "{stats:?}");
    assert_eq!((stats.damaged, stats.not_kept), (0, 0));
}

#[test]
fn who_reads_in_order_is_served_ahead_in_long_fetches() {
    let (file, sealed) = sealed_file(512 * BLOCKS_A_CHUNK);
    let dir = tempfile::tempdir().unwrap();
    let source = Memory::new(&file);
    let store = open(sealed, &source, Some(&cache(dir.path(), u64::MAX)));
    read_all(&store, &file, &sealed, 131_072);
    assert_eq!(source.bytes(), file.len());
    assert!(store.stats().ahead > 0);
    assert!(source.fetches() < 256, "{}", source.fetches());
}
