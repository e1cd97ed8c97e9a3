//! Images made of nothing, and a source that misbehaves when told to.

use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use berth_fuse::chunks::{CHUNK, Cache, ChunkStore, Sealed, Source, SourceError, Sources};
use berth_squashfs::read::ReadAt;
use sha2::{Digest, Sha256};

pub const BLOCK: usize = 4096;

/// Bytes of an image file: data that no two blocks share, and its dm-verity tree, made here from the kernel's
/// documentation and not by the code that the store shares.
pub fn sealed_file(blocks: u64) -> (Arc<Vec<u8>>, Sealed) {
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
pub enum Fault {
    WrongByte,
    Short,
    Refuse,
    Busy,
    /// Nothing until its time is over.
    Hang,
}

#[derive(Debug, Clone)]
pub struct Memory {
    file: Arc<Vec<u8>>,
    pub faults: Arc<Mutex<Vec<Fault>>>,
    pub trace: Arc<Mutex<Option<String>>>,
    pub away: Arc<std::sync::atomic::AtomicBool>,
    fetches: Arc<AtomicUsize>,
    bytes: Arc<AtomicUsize>,
}

impl Memory {
    pub fn new(file: &Arc<Vec<u8>>) -> Self {
        Self {
            file: Arc::clone(file),
            faults: Arc::default(),
            trace: Arc::default(),
            away: Arc::default(),
            fetches: Arc::default(),
            bytes: Arc::default(),
        }
    }

    pub fn fetches(&self) -> usize {
        self.fetches.load(Ordering::SeqCst)
    }

    pub fn bytes(&self) -> usize {
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

    fn trace(&self, _limit: Duration) -> Option<Vec<u8>> {
        self.trace.lock().unwrap().clone().map(String::into_bytes)
    }

    fn send_trace(&self, json: &str, _limit: Duration) -> bool {
        *self.trace.lock().unwrap() = Some(json.to_owned());
        true
    }
}

pub fn sources(all: Vec<Box<dyn Source>>) -> Sources {
    Sources::new(all, Duration::from_secs(20))
}

pub fn cache(folder: &Path, limit: u64) -> Arc<Cache> {
    Cache::open(folder, Some(limit)).unwrap()
}

pub fn open(sealed: Sealed, source: &Memory, cache: Option<&Arc<Cache>>) -> Arc<ChunkStore> {
    ChunkStore::open(sealed, sources(vec![Box::new(source.clone())]), cache).unwrap()
}

pub fn read_all(store: &ChunkStore, file: &[u8], sealed: &Sealed, step: usize) {
    let len = sealed.hash_offset as usize;
    let mut buf = vec![0; step];
    for at in (0..len).step_by(step) {
        let take = step.min(len - at);
        store.read_exact_at(&mut buf[..take], at as u64).unwrap();
        assert!(buf[..take] == file[at..at + take], "bytes at {at}");
    }
}

/// Waits, bounded, for what background threads do.
pub fn wait_until(what: &str, done: impl Fn() -> bool) {
    let end = Instant::now() + Duration::from_secs(30);
    while !done() {
        assert!(Instant::now() < end, "never: {what}");
        std::thread::yield_now();
    }
}

pub fn disk_bytes(folder: &Path) -> u64 {
    let entries = std::fs::read_dir(folder).unwrap();
    let blocks = entries.map(|entry| {
        std::os::unix::fs::MetadataExt::blocks(&entry.unwrap().metadata().unwrap()) * 512
    });
    blocks.sum()
}

pub fn file_of(folder: &Path, ending: &str) -> PathBuf {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut paths = entries.map(|entry| entry.unwrap().path());
    let found = paths.find(|path| path.extension().is_some_and(|e| e == ending));
    found.unwrap()
}

pub const BLOCKS_A_CHUNK: u64 = CHUNK / BLOCK as u64;
