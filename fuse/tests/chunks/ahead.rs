//! What is fetched before somebody reads it.

use std::sync::atomic::Ordering;
use std::time::Duration;

use berth_fuse::chunks::{CHUNK, ChunkStore, Pace, Policy};
use berth_squashfs::read::ReadAt;

use crate::support::*;

#[test]
fn a_trace_brings_what_a_start_reads_and_nothing_else() {
    let (file, sealed) = sealed_file(600 * BLOCKS_A_CHUNK);
    let source = Memory::new(&file);
    let start = |store: &ChunkStore| {
        for chunk in [500, 3, 4, 5, 77, 300, 301, 302, 2] {
            let mut buf = [0; 100];
            store.read_exact_at(&mut buf, chunk * CHUNK).unwrap();
        }
    };
    let (first_dir, second_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let first = open(sealed, &source, Some(&cache(first_dir.path(), u64::MAX)));
    first.record();
    start(&first);
    let trace = first.recorded().unwrap().unwrap();
    assert_eq!(trace.bytes(), 9 * CHUNK);
    let source = Memory::new(&file);
    let second = open(sealed, &source, Some(&cache(second_dir.path(), u64::MAX)));
    second.replay(&trace, Pace::default());
    // Nine chunks, and those of leaves that they need: 2,048 blocks' digests are in one.
    wait_until("all is there", || second.stats().ahead == 9 + 3);
    start(&second);
    let stats = second.stats();
    assert_eq!((stats.misses, stats.ahead), (0, 12), "{stats:?}");
    assert!(source.bytes() < 14 * CHUNK as usize);
}

#[test]
fn an_image_is_filled_in_the_background_also_when_its_source_was_away() {
    let (file, sealed) = sealed_file(100 * BLOCKS_A_CHUNK);
    let source = Memory::new(&file);
    let dir = tempfile::tempdir().unwrap();
    let store = open(sealed, &source, Some(&cache(dir.path(), u64::MAX)));
    source.faults.lock().unwrap().push(Fault::Refuse);
    store.fill(Pace {
        bytes_per_s: Some(1 << 30),
        last: true,
    });
    wait_until("all is there", || store.stats().ahead >= 101);
    source.away.store(true, Ordering::SeqCst);
    read_all(&store, &file, &sealed, 1 << 20);
}

#[test]
fn the_first_start_is_recorded_for_the_next_ones() {
    let (file, sealed) = sealed_file(600 * BLOCKS_A_CHUNK);
    let source = Memory::new(&file);
    let start = |store: &ChunkStore| {
        for place in (0..20).map(|step| step * 29) {
            let mut buf = [0; 100];
            store.read_exact_at(&mut buf, place * CHUNK).unwrap();
        }
    };
    let policy = Policy {
        record: Some(Duration::from_millis(500)),
        fill: None,
    };
    let dir = tempfile::tempdir().unwrap();
    let first = open(sealed, &source, Some(&cache(dir.path(), u64::MAX)));
    first.follow(policy);
    start(&first);
    wait_until("a trace is sent", || source.trace.lock().unwrap().is_some());
    let trace = source.trace.lock().unwrap().clone();
    for wrong in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let next = open(sealed, &source, Some(&cache(dir.path(), u64::MAX)));
        if wrong {
            // Of another image: it is not used, and starts go on without.
            let other = trace.as_deref().unwrap().replacen("runs", "ways", 1);
            *source.trace.lock().unwrap() = Some(other);
            next.follow(Policy::default());
            start(&next);
            assert_eq!(next.stats().ahead, 0);
            continue;
        }
        next.follow(policy);
        // Twenty chunks, and the five of leaves that they need.
        wait_until("all is there", || next.stats().ahead == 25);
        start(&next);
        assert_eq!(next.stats().misses, 0);
    }
}
