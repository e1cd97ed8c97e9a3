//! Sources that are slow, short, wrong, busy, gone and back: right bytes, or an error in time.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use berth_fuse::chunks::{CHUNK, ChunkStore, Sources};
use berth_squashfs::read::ReadAt;

use crate::support::*;

#[test]
fn sources_that_misbehave_are_survived() {
    let (file, sealed) = sealed_file(40 * BLOCKS_A_CHUNK);
    let source = Memory::new(&file);
    let store = open(sealed, &source, None);
    let faults = [
        Fault::WrongByte,
        Fault::Short,
        Fault::Refuse,
        Fault::Busy,
        Fault::WrongByte,
    ];
    *source.faults.lock().unwrap() = faults.to_vec();
    read_all(&store, &file, &sealed, 1 << 20);
    assert_eq!(store.sources().wrong(), 2);
}

#[test]
fn a_source_that_is_always_wrong_gives_an_error_in_time_and_another_one_is_asked() {
    let (file, sealed) = sealed_file(40 * BLOCKS_A_CHUNK);
    let mut wrong = (*file).clone();
    for byte in wrong[..sealed.hash_offset as usize]
        .iter_mut()
        .step_by(BLOCK)
    {
        *byte ^= 1;
    }
    let liar = Memory::new(&Arc::new(wrong));
    let only = Sources::new(vec![Box::new(liar.clone())], Duration::from_millis(300));
    let store = ChunkStore::open(sealed, only, None).unwrap();
    assert!(store.read_exact_at(&mut [0; 8], 0).is_err());
    let both = sources(vec![Box::new(liar), Box::new(Memory::new(&file))]);
    let store = ChunkStore::open(sealed, both, None).unwrap();
    read_all(&store, &file, &sealed, 1 << 20);
    assert!(store.sources().fetched()[1].1 >= sealed.hash_offset);
}

#[test]
fn a_source_that_hangs_does_not_take_all_the_time_and_alone_it_gives_an_error() {
    let (file, sealed) = sealed_file(40 * BLOCKS_A_CHUNK);
    let hanging = Memory::new(&file);
    let good = Memory::new(&file);
    let patience = Duration::from_millis(600);
    let both = Sources::new(vec![Box::new(hanging.clone()), Box::new(good)], patience);
    let store = ChunkStore::open(sealed, both, None).unwrap();
    *hanging.faults.lock().unwrap() = vec![Fault::Hang; 100];
    read_all(&store, &file, &sealed, 1 << 20);
    let alone = Sources::new(vec![Box::new(hanging.clone())], patience);
    hanging.faults.lock().unwrap().clear();
    let store = ChunkStore::open(sealed, alone, None).unwrap();
    *hanging.faults.lock().unwrap() = vec![Fault::Hang; 100];
    // Many want the same: each has its own end.
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert!(store.read_exact_at(&mut [0; 8], 0).is_err()));
        }
    });
}

#[test]
fn a_source_that_goes_and_comes_back_is_waited_for() {
    let (file, sealed) = sealed_file(40 * BLOCKS_A_CHUNK);
    let source = Memory::new(&file);
    let store = open(sealed, &source, None);
    source.away.store(true, Ordering::SeqCst);
    std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let mut buf = [0; 8];
            store.read_exact_at(&mut buf, 5 * CHUNK).map(|()| buf)
        });
        let refused = source.fetches() + 3;
        wait_until("it asks again", || source.fetches() >= refused);
        source.away.store(false, Ordering::SeqCst);
        let at = 5 * CHUNK as usize;
        assert_eq!(reader.join().unwrap().unwrap(), file[at..at + 8]);
    });
}

#[test]
fn another_trees_root_opens_nothing() {
    let (file, mut sealed) = sealed_file(200 * 128);
    sealed.root[0] ^= 1;
    let only = Sources::new(
        vec![Box::new(Memory::new(&file))],
        Duration::from_millis(200),
    );
    assert!(ChunkStore::open(sealed, only, None).is_err());
    for offset in [0, 1, u64::MAX, 1 << 60] {
        sealed.hash_offset = offset;
        assert!(ChunkStore::open(sealed, sources(vec![]), None).is_err());
    }
}
