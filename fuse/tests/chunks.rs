//! The chunk store against sources that misbehave, a cache that is damaged, full or too small, and restarts.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::{Duration, Instant};

use berth_fuse::chunks::{
    CHUNK, Cache, ChunkStore, HttpSource, Pace, Sealed, Source, SourceError, Sources,
};
use berth_squashfs::read::ReadAt;
use sha2::{Digest, Sha256};

const BLOCK: usize = 4096;

/// Bytes of an image file: data that no two blocks share, and its dm-verity tree, made here from the kernel's
/// documentation and not by the code that the store shares.
fn sealed_file(blocks: u64) -> (Arc<Vec<u8>>, Sealed) {
    let mut file = Vec::new();
    for block in 0..blocks {
        let start = file.len();
        file.resize(start + BLOCK, block as u8);
        file[start..start + 8].copy_from_slice(&block.to_le_bytes());
    }
    let hash_offset = file.len() as u64;
    let salt = [3u8; 32];
    let digests_of = |level: &[u8]| -> Vec<u8> {
        let blocks = level.chunks_exact(BLOCK);
        let digest = |block: &[u8]| {
            Sha256::new()
                .chain_update(salt)
                .chain_update(block)
                .finalize()
        };
        blocks.flat_map(digest).collect()
    };
    let mut levels = Vec::new();
    let mut top = digests_of(&file);
    while top.len() > 32 {
        top.resize(top.len().next_multiple_of(BLOCK), 0);
        let above = digests_of(&top);
        levels.push(std::mem::replace(&mut top, above));
    }
    let mut superblock = Vec::new();
    superblock.extend_from_slice(b"verity\0\0");
    superblock.extend_from_slice(&[1, 0, 0, 0, 1, 0, 0, 0]);
    superblock.extend_from_slice(&[9; 16]);
    superblock.extend_from_slice(b"sha256");
    superblock.resize(64, 0);
    superblock.extend_from_slice(&4096u32.to_le_bytes());
    superblock.extend_from_slice(&4096u32.to_le_bytes());
    superblock.extend_from_slice(&blocks.to_le_bytes());
    superblock.extend_from_slice(&32u64.to_le_bytes());
    superblock.extend_from_slice(&salt);
    superblock.resize(BLOCK, 0);
    file.extend_from_slice(&superblock);
    levels
        .iter()
        .rev()
        .for_each(|level| file.extend_from_slice(level));
    let root = top.try_into().unwrap();
    (Arc::new(file), Sealed { root, hash_offset })
}

/// What a source does with its next fetches, the last of the list first; then it is good.
#[derive(Debug, Clone, Copy)]
enum Fault {
    WrongByte,
    Short,
    Refuse,
    Busy,
    /// Nothing until its time is over.
    Hang,
}

#[derive(Debug, Clone)]
struct Memory {
    file: Arc<Vec<u8>>,
    faults: Arc<Mutex<Vec<Fault>>>,
    away: Arc<std::sync::atomic::AtomicBool>,
    fetches: Arc<AtomicUsize>,
    bytes: Arc<AtomicUsize>,
}

impl Memory {
    fn new(file: &Arc<Vec<u8>>) -> Self {
        Self {
            file: Arc::clone(file),
            faults: Arc::default(),
            away: Arc::default(),
            fetches: Arc::default(),
            bytes: Arc::default(),
        }
    }

    fn fetches(&self) -> usize {
        self.fetches.load(Ordering::SeqCst)
    }

    fn bytes(&self) -> usize {
        self.bytes.load(Ordering::SeqCst)
    }
}

impl Source for Memory {
    fn name(&self) -> &str {
        "memory"
    }

    fn open(&self, range: Range<u64>, limit: Duration) -> Result<Box<dyn Read + '_>, SourceError> {
        self.fetches.fetch_add(1, Ordering::SeqCst);
        let mut fault = self.faults.lock().unwrap().pop();
        if self.away.load(Ordering::SeqCst) {
            fault = Some(Fault::Refuse);
        }
        let mut bytes = self.file[range.start as usize..range.end as usize].to_vec();
        let source_name = "memory".to_owned();
        match fault {
            None => {}
            Some(Fault::WrongByte) => {
                let middle = bytes.len() / 2;
                bytes[middle] ^= 1;
            }
            Some(Fault::Short) => bytes.truncate(bytes.len() / 2),
            Some(Fault::Hang) => {
                std::thread::sleep(limit);
                bytes.clear();
            }
            Some(Fault::Refuse) => {
                return Err(SourceError::Failed {
                    source_name,
                    what: "refused".to_owned(),
                });
            }
            Some(Fault::Busy) => {
                return Err(SourceError::Busy {
                    source_name,
                    wait: Duration::from_millis(5),
                });
            }
        }
        self.bytes.fetch_add(bytes.len(), Ordering::SeqCst);
        Ok(Box::new(std::io::Cursor::new(bytes)))
    }
}

fn sources(all: Vec<Box<dyn Source>>) -> Sources {
    Sources::new(all, Duration::from_secs(20))
}

fn cache(folder: &Path, limit: u64) -> Arc<Cache> {
    Cache::open(folder, Some(limit)).unwrap()
}

fn open(sealed: Sealed, source: &Memory, cache: Option<&Arc<Cache>>) -> Arc<ChunkStore> {
    ChunkStore::open(sealed, sources(vec![Box::new(source.clone())]), cache).unwrap()
}

fn read_all(store: &ChunkStore, file: &[u8], sealed: &Sealed, step: usize) {
    let len = sealed.hash_offset as usize;
    let mut buf = vec![0; step];
    for at in (0..len).step_by(step) {
        let take = step.min(len - at);
        store.read_exact_at(&mut buf[..take], at as u64).unwrap();
        assert!(buf[..take] == file[at..at + take], "bytes at {at}");
    }
}

/// Waits, bounded, for what background threads do.
fn wait_until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::yield_now();
    }
}

fn disk_bytes(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).unwrap();
    let blocks = entries.map(|entry| {
        std::os::unix::fs::MetadataExt::blocks(&entry.unwrap().metadata().unwrap()) * 512
    });
    blocks.sum()
}

fn file_of(folder: &Path, ending: &str) -> PathBuf {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut paths = entries.map(|entry| entry.unwrap().path());
    let found = paths.find(|path| path.extension().is_some_and(|e| e == ending));
    found.unwrap()
}

const BLOCKS_A_CHUNK: u64 = CHUNK / BLOCK as u64;

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
            .args(["--exact", "reads_until_it_is_killed", "--nocapture"])
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
    let before = source.bytes();
    let second = open(sealed, &source, Some(&cache(second_dir.path(), u64::MAX)));
    second.replay(&trace, Pace::default());
    // Nine chunks, and those of leaves that they need: 2,048 blocks' digests are in one.
    wait_until("all is there", || second.stats().ahead == 9 + 3);
    start(&second);
    let stats = second.stats();
    assert_eq!((stats.misses, stats.ahead), (0, 12), "{stats:?}");
    assert!(source.bytes() - before < 14 * CHUNK as usize);
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

/// A small HTTP server: `faults` for its first answers, then ranges of `file`.
fn http(file: Arc<Vec<u8>>, faults: Vec<&'static str>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}/image", listener.local_addr().unwrap());
    let faults = Arc::new(Mutex::new(faults));
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let (file, faults) = (Arc::clone(&file), Arc::clone(&faults));
            std::thread::spawn(move || answer(stream.unwrap(), &file, &faults));
        }
    });
    url
}

fn answer(stream: TcpStream, file: &[u8], faults: &Mutex<Vec<&'static str>>) -> Option<()> {
    let mut lines = BufReader::new(stream.try_clone().ok()?).lines();
    let mut stream = stream;
    loop {
        let mut range = None;
        loop {
            let line = lines.next()?.ok()?;
            if line.is_empty() {
                break;
            }
            if line.starts_with("GET /absolute") {
                // A proxy is not told which server it is.
                return None;
            }
            if let Some(value) = line.to_ascii_lowercase().strip_prefix("range: bytes=") {
                let (from, to) = value.split_once('-')?;
                range = Some((from.parse::<usize>().ok()?, to.parse::<usize>().ok()?));
            }
        }
        let (from, to) = range?;
        let total = file.len();
        let head =
            format!("HTTP/1.1 206 Partial Content\r\nContent-Range: bytes {from}-{to}/{total}\r\n");
        let body = &file[from..=to];
        let fault = faults.lock().unwrap().pop();
        match fault {
            Some("busy") => {
                let busy =
                    "HTTP/1.1 429 Too Many Requests\r\nRetry-After: 0\r\nContent-Length: 0\r\n\r\n";
                stream.write_all(busy.as_bytes()).ok()?;
            }
            Some("whole") => {
                let whole = format!("HTTP/1.1 200 OK\r\nContent-Length: {total}\r\n\r\n");
                stream.write_all(whole.as_bytes()).ok()?;
                stream.write_all(file).ok()?;
            }
            Some("short") => {
                write!(stream, "{head}Content-Length: {}\r\n\r\n", body.len()).ok()?;
                stream.write_all(&body[..body.len() / 2]).ok()?;
                return None;
            }
            Some("redirect") => {
                let away = "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:1/\r\nContent-Length: 0\r\n\r\n";
                stream.write_all(away.as_bytes()).ok()?;
            }
            Some("other range") => {
                let length = body.len();
                write!(stream, "HTTP/1.1 206 Partial Content\r\nContent-Range: bytes 0-{}/{total}\r\nContent-Length: {length}\r\n\r\n", length - 1).ok()?;
                stream.write_all(&file[..length]).ok()?;
            }
            Some("hang up") => return None,
            _ => {
                write!(stream, "{head}Content-Length: {}\r\n\r\n", body.len()).ok()?;
                stream.write_all(body).ok()?;
            }
        }
    }
}

fn http_store(file: &Arc<Vec<u8>>, sealed: Sealed, source: HttpSource, folder: &Path) {
    let sources = sources(vec![Box::new(source)]);
    let store = ChunkStore::open(sealed, sources, Some(&cache(folder, u64::MAX))).unwrap();
    read_all(&store, file, &sealed, 700_000);
    let given: u64 = store
        .sources()
        .fetched()
        .iter()
        .map(|(_, bytes)| bytes)
        .sum();
    assert_eq!(given, file.len() as u64);
}

#[test]
fn ranges_by_http_survive_all_that_servers_do() {
    let (file, sealed) = sealed_file(96 * BLOCKS_A_CHUNK + 5);
    let faults = vec![
        "short",
        "busy",
        "whole",
        "hang up",
        "redirect",
        "busy",
        "short",
        "other range",
    ];
    let url = http(Arc::clone(&file), faults);
    let dir = tempfile::tempdir().unwrap();
    let source = HttpSource::new(&url, None, None).unwrap();
    http_store(&file, sealed, source, dir.path());
}

#[test]
fn a_proxy_is_asked_in_absolute_form() {
    let (file, sealed) = sealed_file(20 * BLOCKS_A_CHUNK);
    // The server that is named does not exist: only the proxy is spoken to.
    let proxy = http(Arc::clone(&file), vec![]).replace("/image", "");
    let dir = tempfile::tempdir().unwrap();
    let at = "http://image.invalid:7/absolute/image";
    let source = HttpSource::new(at, Some("secret"), Some(&proxy)).unwrap();
    assert!(!format!("{source:?}").contains("secret"));
    http_store(&file, sealed, source, dir.path());
    for wrong in ["ftp://x", "http://", "nonsense"] {
        assert!(HttpSource::new(at, None, Some(wrong)).is_err(), "{wrong}");
    }
    assert!(HttpSource::new("file:///x", None, None).is_err());
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
        // What did fit is there, and its room is known.
        assert!(cache.used() > 1 << 20 && cache.used() <= 2 << 20);
    });
    run("umount", &[small]);
    result.unwrap();
}
