//! Saying that all of an image is on this node, and what its place in the cache is worth when it is elsewhere too.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use berth_fuse::chunks::{CHUNK, ChunkStore};
use berth_squashfs::read::ReadAt;

use crate::support::*;

/// How often a store said that it is whole.
fn listen(store: &ChunkStore) -> Arc<AtomicUsize> {
    let told = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&told);
    store.when_whole(move || {
        count.fetch_add(1, Ordering::SeqCst);
    });
    told
}

#[test]
fn the_last_chunk_is_told_once_and_so_is_an_image_that_is_whole_when_opened() {
    let (file, sealed) = sealed_file(2 * BLOCKS_A_CHUNK);
    let dir = tempfile::tempdir().unwrap();
    let source = Memory::new(&file);
    let cache = cache(dir.path(), u64::MAX);
    let store = open(sealed, &source, Some(&cache));
    let told = listen(&store);
    let count = || told.load(Ordering::SeqCst);
    let mut buf = vec![0; CHUNK as usize];
    store.read_exact_at(&mut buf, CHUNK).unwrap();
    assert_eq!(count(), 0, "the first chunk is missing");
    store.read_exact_at(&mut buf, 0).unwrap();
    assert_eq!(count(), 1);
    read_all(&store, &file, &sealed, 10_000);
    assert_eq!(count(), 1);
    // One is lost and comes back.
    let disk = std::fs::OpenOptions::new()
        .write(true)
        .open(file_of(dir.path(), "data"))
        .unwrap();
    std::os::unix::fs::FileExt::write_all_at(&disk, b"\xee", CHUNK + 12_345).unwrap();
    read_all(&store, &file, &sealed, 10_000);
    assert_eq!((count(), store.stats().damaged), (2, 1));
    drop(store);
    let store = open(sealed, &source, Some(&cache));
    assert_eq!(listen(&store).load(Ordering::SeqCst), 1);
}

#[test]
fn what_is_not_kept_is_not_whole() {
    let (file, sealed) = sealed_file(5 * BLOCKS_A_CHUNK);
    let store = open(sealed, &Memory::new(&file), None);
    let told = listen(&store);
    read_all(&store, &file, &sealed, 1 << 20);
    assert_eq!(told.load(Ordering::SeqCst), 0);
    let dir = tempfile::tempdir().unwrap();
    let small = cache(dir.path(), 3 * CHUNK);
    let store = open(sealed, &Memory::new(&file), Some(&small));
    let told = listen(&store);
    for _ in 0..3 {
        read_all(&store, &file, &sealed, 1 << 20);
    }
    assert_eq!(told.load(Ordering::SeqCst), 0);
}

#[test]
fn what_is_elsewhere_too_goes_first_also_after_a_restart_and_a_lower_limit_holds() {
    let images: Vec<_> = [5, 6, 7]
        .map(|chunks| sealed_file(chunks * BLOCKS_A_CHUNK))
        .into();
    let dir = tempfile::tempdir().unwrap();
    let here = |cache: &_, at: usize| {
        let (file, sealed) = &images[at];
        let source = Memory::new(file);
        let store = open(*sealed, &source, Some(cache));
        read_all(&store, file, sealed, 1 << 20);
        (source.bytes() < CHUNK as usize, store)
    };
    let first = cache(dir.path(), 100 * CHUNK);
    drop(here(&first, 0));
    let (_, second) = here(&first, 1);
    second.spare();
    drop((second, first));
    let cache = cache(dir.path(), 100 * CHUNK);
    // Less than all three want, more than two of them.
    cache.set_limit(14 * CHUNK);
    assert_eq!(cache.limit(), 14 * CHUNK);
    drop(here(&cache, 2));
    assert!(here(&cache, 0).0, "the oldest stays");
    assert!(!here(&cache, 1).0, "what is elsewhere too went");
    assert!(cache.used() <= cache.limit());
}
