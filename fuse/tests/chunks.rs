//! The chunk store against origins that misbehave, a cache that is damaged, full or too small, and restarts.

use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier, Mutex};
use std::time::Duration;

use berth_fuse::chunks::{
    CacheFile, ChunkStore, HttpOrigin, Origin, OriginError, Origins, PIECE, Sealed,
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

/// What an origin does with its next fetches, one after another; then it is good.
#[derive(Debug, Clone, Copy)]
enum Fault {
    WrongByte,
    Refuse,
    Busy,
}

#[derive(Debug, Clone)]
struct Memory {
    file: Arc<Vec<u8>>,
    faults: Arc<Mutex<Vec<Fault>>>,
    fetches: Arc<AtomicUsize>,
}

impl Memory {
    fn new(file: &Arc<Vec<u8>>) -> Self {
        Self {
            file: Arc::clone(file),
            faults: Arc::default(),
            fetches: Arc::default(),
        }
    }

    fn fetches(&self) -> usize {
        self.fetches.load(Ordering::SeqCst)
    }
}

impl Origin for Memory {
    fn name(&self) -> &str {
        "memory"
    }

    fn fetch(&self, offset: u64, buf: &mut [u8], _limit: Duration) -> Result<(), OriginError> {
        self.fetches.fetch_add(1, Ordering::SeqCst);
        let fault = self.faults.lock().unwrap().pop();
        let from = offset as usize;
        buf.copy_from_slice(&self.file[from..from + buf.len()]);
        let origin = "memory".to_owned();
        match fault {
            None => Ok(()),
            Some(Fault::WrongByte) => {
                buf[buf.len() / 2] ^= 1;
                Ok(())
            }
            Some(Fault::Refuse) => Err(OriginError::Failed {
                origin,
                what: "refused".to_owned(),
            }),
            Some(Fault::Busy) => Err(OriginError::Busy {
                origin,
                wait: Duration::from_millis(5),
            }),
        }
    }
}

fn origins(all: Vec<Box<dyn Origin>>) -> Origins {
    Origins::new(all, Duration::from_secs(20))
}

fn open(sealed: Sealed, origin: &Memory, folder: Option<&Path>, limit: u64) -> ChunkStore {
    ChunkStore::open(
        sealed,
        origins(vec![Box::new(origin.clone())]),
        |pieces| folder.map(|folder| CacheFile::open(folder, &sealed.root, pieces)),
        limit,
    )
    .unwrap()
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

const BLOCKS_A_PIECE: u64 = PIECE / BLOCK as u64;

#[test]
fn images_of_all_sizes_are_read_right() {
    for blocks in [
        1,
        2,
        128,
        129,
        BLOCKS_A_PIECE,
        BLOCKS_A_PIECE + 1,
        128 * 128 + 3,
    ] {
        let (file, sealed) = sealed_file(blocks);
        let dir = tempfile::tempdir().unwrap();
        let origin = Memory::new(&file);
        for folder in [None, Some(dir.path())] {
            let store = open(sealed, &origin, folder, u64::MAX);
            read_all(&store, &file, &sealed, 300_000);
            assert!(
                store
                    .read_exact_at(&mut [0; 2], sealed.hash_offset - 1)
                    .is_err()
            );
        }
    }
}

#[test]
fn many_readers_fetch_each_piece_once() {
    let (file, sealed) = sealed_file(8 * BLOCKS_A_PIECE);
    let dir = tempfile::tempdir().unwrap();
    let origin = Memory::new(&file);
    let store = open(sealed, &origin, Some(dir.path()), u64::MAX);
    let start = Barrier::new(8);
    std::thread::scope(|scope| {
        for _ in 0..8 {
            scope.spawn(|| {
                start.wait();
                read_all(&store, &file, &sealed, 131_072);
            });
        }
    });
    // Eight pieces of data, one of leaves, the head of the tree.
    assert_eq!(origin.fetches(), 10);
}

#[test]
fn a_restart_fetches_nothing_and_needs_no_origin() {
    let (file, sealed) = sealed_file(3 * BLOCKS_A_PIECE + 7);
    let dir = tempfile::tempdir().unwrap();
    let origin = Memory::new(&file);
    read_all(
        &open(sealed, &origin, Some(dir.path()), u64::MAX),
        &file,
        &sealed,
        1 << 20,
    );
    let cache = |pieces| Some(CacheFile::open(dir.path(), &sealed.root, pieces));
    let store = ChunkStore::open(sealed, origins(vec![]), cache, u64::MAX).unwrap();
    read_all(&store, &file, &sealed, 100_000);
    assert_eq!((store.stats().fetched, store.stats().damaged), (0, 0));
}

#[test]
fn damage_on_the_local_disk_is_seen_and_fetched_anew() {
    let (file, sealed) = sealed_file(3 * BLOCKS_A_PIECE);
    let dir = tempfile::tempdir().unwrap();
    let origin = Memory::new(&file);
    read_all(
        &open(sealed, &origin, Some(dir.path()), u64::MAX),
        &file,
        &sealed,
        1 << 20,
    );
    let data = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let data = data.filter(|path| path.extension().is_some_and(|e| e == "data"));
    let disk = std::fs::OpenOptions::new()
        .write(true)
        .open(data.last().unwrap())
        .unwrap();
    // One byte of the second data piece, and one of the leaves.
    for at in [PIECE + 12_345, sealed.hash_offset + 3 * BLOCK as u64 + 100] {
        std::os::unix::fs::FileExt::write_all_at(&disk, b"\xee", at).unwrap();
    }
    let before = origin.fetches();
    let store = open(sealed, &origin, Some(dir.path()), u64::MAX);
    read_all(&store, &file, &sealed, 1 << 20);
    assert_eq!(store.stats().damaged, 2);
    assert_eq!(origin.fetches() - before, 2);
}

#[test]
fn wrong_bytes_refusals_and_busy_origins_are_survived() {
    let (file, sealed) = sealed_file(4 * BLOCKS_A_PIECE);
    let origin = Memory::new(&file);
    let store = open(sealed, &origin, None, 0);
    let faults = [
        Fault::WrongByte,
        Fault::Refuse,
        Fault::Busy,
        Fault::WrongByte,
    ];
    *origin.faults.lock().unwrap() = faults.to_vec();
    read_all(&store, &file, &sealed, 1 << 20);
    // An origin that is always wrong gives an error in time, never bytes.
    let mut wrong = (*file).clone();
    wrong[100] ^= 1;
    let liar = Memory::new(&Arc::new(wrong));
    let patience = Duration::from_millis(200);
    let only = Origins::new(vec![Box::new(liar.clone())], patience);
    let store = ChunkStore::open(sealed, only, |_| None, 0).unwrap();
    assert!(store.read_exact_at(&mut [0; 8], 0).is_err());
    // With a good one behind it, nobody notices.
    let both = origins(vec![Box::new(liar), Box::new(origin)]);
    let store = ChunkStore::open(sealed, both, |_| None, 0).unwrap();
    read_all(&store, &file, &sealed, 1 << 20);
    assert!(store.origins().fetched()[1].1 >= PIECE);
}

#[test]
fn another_trees_root_opens_nothing() {
    let (file, mut sealed) = sealed_file(200 * 128);
    sealed.root[0] ^= 1;
    let only = Origins::new(
        vec![Box::new(Memory::new(&file))],
        Duration::from_millis(200),
    );
    assert!(ChunkStore::open(sealed, only, |_| None, 0).is_err());
    for offset in [0, 1, u64::MAX, 1 << 60] {
        sealed.hash_offset = offset;
        assert!(ChunkStore::open(sealed, origins(vec![]), |_| None, 0).is_err());
    }
}

#[test]
fn a_small_cache_evicts_and_stays_small() {
    let (file, sealed) = sealed_file(12 * BLOCKS_A_PIECE);
    let dir = tempfile::tempdir().unwrap();
    let origin = Memory::new(&file);
    let store = open(sealed, &origin, Some(dir.path()), 4 * PIECE);
    std::thread::scope(|scope| {
        for thread in 0..4usize {
            let (store, file) = (&store, &file);
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
    assert!(store.stats().evicted > 0);
    let used: u64 = std::fs::read_dir(dir.path())
        .unwrap()
        .map(|entry| {
            std::os::unix::fs::MetadataExt::blocks(&entry.unwrap().metadata().unwrap()) * 512
        })
        .sum();
    // The limit, and pieces that four threads were writing.
    assert!(used <= 9 * PIECE, "{used}");
}

#[test]
fn a_cache_in_use_is_left_alone() {
    let (file, sealed) = sealed_file(BLOCKS_A_PIECE);
    let dir = tempfile::tempdir().unwrap();
    let origin = Memory::new(&file);
    let first = open(sealed, &origin, Some(dir.path()), u64::MAX);
    let second = open(sealed, &origin, Some(dir.path()), u64::MAX);
    read_all(&first, &file, &sealed, 1 << 20);
    read_all(&second, &file, &sealed, 1 << 20);
    assert_eq!(first.stats().not_kept, 0);
    assert!(second.stats().not_kept > 0);
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
            Some("hang up") => return None,
            _ => {
                write!(stream, "{head}Content-Length: {}\r\n\r\n", body.len()).ok()?;
                stream.write_all(body).ok()?;
            }
        }
    }
}

#[test]
fn ranges_by_http_survive_all_that_servers_do() {
    let (file, sealed) = sealed_file(6 * BLOCKS_A_PIECE + 5);
    let faults = vec![
        "short", "busy", "whole", "hang up", "redirect", "busy", "short",
    ];
    let url = http(Arc::clone(&file), faults);
    let origin = HttpOrigin::new(url, None).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let store = ChunkStore::open(
        sealed,
        origins(vec![Box::new(origin)]),
        |pieces| Some(CacheFile::open(dir.path(), &sealed.root, pieces)),
        u64::MAX,
    )
    .unwrap();
    read_all(&store, &file, &sealed, 700_000);
    assert_eq!(store.stats().fetched, 8);
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
    assert!(
        std::process::Command::new("mount")
            .args(mount)
            .status()
            .unwrap()
            .success()
    );
    let result = std::panic::catch_unwind(|| {
        let (file, sealed) = sealed_file(6 * BLOCKS_A_PIECE);
        let origin = Memory::new(&file);
        let store = open(sealed, &origin, Some(dir.path()), u64::MAX);
        read_all(&store, &file, &sealed, 200_000);
        assert!(store.stats().not_kept >= 4, "{:?}", store.stats());
    });
    assert!(
        std::process::Command::new("umount")
            .arg(small)
            .status()
            .unwrap()
            .success()
    );
    result.unwrap();
}
