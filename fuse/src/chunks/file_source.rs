//! Bytes from a file of this node, mostly on the parallel filesystem.
//!
//! A read from a filesystem that does not answer cannot be ended. So no reader does one itself: each fetch has a thread
//! that reads and hands over. Who waits for it gives up in time; the thread stays behind until the filesystem answers,
//! and as long as one does, other sources are asked first.

use std::fs::File;
use std::io::{self, Read};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::{Duration, Instant};

use super::CHUNK;
use super::source::{Source, SourceError};
use crate::near;

/// Threads left behind in the filesystem; with so many, nothing more is asked of it.
const MOST_LEFT: usize = 64;
/// Their stack: a loop around one system call.
const STACK: usize = 64 << 10;

/// The file, opened by somebody who had the right to read it.
#[derive(Debug)]
pub struct FileSource {
    file: Arc<File>,
    name: String,
    /// Threads that wait for the filesystem, and nobody for them.
    left: Arc<AtomicUsize>,
}

impl FileSource {
    /// Takes an open file.
    pub fn new(file: File, name: impl Into<String>) -> Self {
        Self {
            file: Arc::new(file),
            name: name.into(),
            left: Arc::default(),
        }
    }

    fn failed(&self, what: String) -> SourceError {
        SourceError::Failed {
            source_name: self.name.clone(),
            what,
        }
    }
}

impl Source for FileSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_stuck(&self) -> bool {
        self.left.load(Ordering::SeqCst) > 0
    }

    fn open(&self, range: Range<u64>, limit: Duration) -> Result<Box<dyn Read + '_>, SourceError> {
        if self.left.load(Ordering::SeqCst) >= MOST_LEFT {
            return Err(self.failed("its filesystem does not answer".to_owned()));
        }
        // The next part is read while the last one is looked at, and no further.
        let (sender, parts) = sync_channel(0);
        let stay = Arc::new(Stay {
            parted: AtomicBool::new(false),
            left: Arc::clone(&self.left),
        });
        let (file, mine) = (Arc::clone(&self.file), Arc::clone(&stay));
        std::thread::Builder::new()
            .name("file".to_owned())
            .stack_size(STACK)
            .spawn(move || {
                near::anywhere();
                read(&file, range, &sender);
                mine.part_last();
            })
            .map_err(|error| self.failed(error.to_string()))?;
        Ok(Box::new(FileStream {
            parts,
            part: Vec::new(),
            at: 0,
            until: Instant::now() + limit,
            stay,
        }))
    }
}

/// The life of a fetch's thread.
fn read(file: &File, range: Range<u64>, parts: &SyncSender<io::Result<Vec<u8>>>) {
    let mut at = range.start;
    while at < range.end {
        let mut part = vec![0; (range.end - at).min(CHUNK) as usize];
        let read = file.read_exact_at(&mut part, at);
        at += part.len() as u64;
        let failed = read.is_err();
        // Nobody waits any more, or nothing more comes.
        if parts.send(read.map(|()| part)).is_err() || failed {
            return;
        }
    }
}

/// What a fetch's thread and its reader know of each other.
#[derive(Debug)]
struct Stay {
    /// One of the two is gone.
    parted: AtomicBool,
    left: Arc<AtomicUsize>,
}

impl Stay {
    /// The reader goes.
    fn leave(&self) {
        self.left.fetch_add(1, Ordering::SeqCst);
        if self.parted.swap(true, Ordering::SeqCst) {
            self.left.fetch_sub(1, Ordering::SeqCst);
        }
    }

    /// The thread does.
    fn part_last(&self) {
        if self.parted.swap(true, Ordering::SeqCst) {
            self.left.fetch_sub(1, Ordering::SeqCst);
        }
    }
}

struct FileStream {
    parts: Receiver<io::Result<Vec<u8>>>,
    part: Vec<u8>,
    at: usize,
    until: Instant,
    stay: Arc<Stay>,
}

impl Read for FileStream {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        if self.at == self.part.len() {
            let left = self.until.saturating_duration_since(Instant::now());
            match self.parts.recv_timeout(left) {
                Ok(part) => (self.part, self.at) = (part?, 0),
                Err(RecvTimeoutError::Disconnected) => return Ok(0),
                Err(RecvTimeoutError::Timeout) => {
                    let why = "its filesystem does not answer";
                    return Err(io::Error::new(io::ErrorKind::TimedOut, why));
                }
            }
        }
        let take = buf.len().min(self.part.len() - self.at);
        buf[..take].copy_from_slice(&self.part[self.at..][..take]);
        self.at += take;
        Ok(take)
    }
}

impl Drop for FileStream {
    fn drop(&mut self) {
        self.stay.leave();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_comes_whole_and_nobody_is_left_behind() {
        let file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..5 * CHUNK).map(|at| (at / 7) as u8).collect();
        file.write_all_at(&bytes, 0).unwrap();
        let source = FileSource::new(file, "file");
        let limit = Duration::from_secs(20);
        let read = |range: Range<u64>| {
            let mut read = Vec::new();
            let mut stream = source.open(range, limit)?;
            stream
                .read_to_end(&mut read)
                .map(|_| read)
                .map_err(|error| source.failed(error.to_string()))
        };
        let (from, to) = (CHUNK - 3, 4 * CHUNK + 5);
        assert!(read(from..to).unwrap() == bytes[from as usize..to as usize]);
        assert!(!source.is_stuck());
        // A file that was cut off under its readers.
        source.file.set_len(CHUNK).unwrap();
        assert!(read(0..2 * CHUNK).is_err());
        // Whose reader went early is not waited for either, once it has read.
        drop(source.open(0..CHUNK, limit).unwrap());
        let end = Instant::now() + limit;
        while source.is_stuck() {
            assert!(Instant::now() < end, "a thread stays");
            std::thread::yield_now();
        }
    }
}
