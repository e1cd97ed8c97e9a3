//! Writing an image from a stream of file contents and, at the end, a tree.
//!
//! ```text
//! caller's threads          workers              appender                       writer
//! Lane: cut into blocks ──► hash, compress ──►   order, share, pack fragments ─► verity leaves, write
//!                            ▲                       │
//!                            └───── fragment blocks ─┘
//! ```
//! - [`ImageWriter::lane`] gives a stream of contents. Lanes are appended in the order they were made:
//!   everything of the first, then everything of the second. Several may be filled at once by different
//!   threads; what comes early waits, up to [`WriteOptions::ahead`] bytes in memory, then in
//!   [`WriteOptions::spill`], and without such a file the lane's thread blocks until it is its turn.
//! - [`ImageWriter::open_lane`] gives one whose files may turn out not to be wanted: nothing of it is
//!   appended before [`Lane::settle`] has named those. They stay aside, and a later lane may still
//!   [bring them back](Lane::bring_back).
//! - [`Lane`] takes the contents of one file after another and gives a [`FileHandle`] for each. Handles
//!   are valid whatever happens later; contents whose handle is never put into the tree are wasted bytes.
//! - [`ImageWriter::finish`] takes the [`Tree`] and writes everything else, the first block last.
//!
//! **The same bytes, always.** Where a block goes is decided by the appender from the order of lanes and
//! calls alone. Threads, buffers and timing only decide when.
//!
//! **Sharing.** Blocks and small files are known by BLAKE3-256. A file whose blocks are, from the first
//! on, those of an earlier file (wholly or as its beginning) takes no space; a file smaller than a block
//! that equals an earlier one shares its place in a fragment. A block that was seen before is not
//! compressed again.
//!
//! **Memory**: about `(2 * threads + 10 + 32) * 2.1 * block_size` for buffers and 8 MiB for output,
//! `ahead`, 100 bytes a file, 130 bytes a data block, 1/128 of the image for verity (16 MiB with a spill
//! file), and the tree.
//!
//! ```no_run
//! use berth_squashfs::write::{ImageWriter, Kind, Meta, Tree, WriteOptions};
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let file = std::fs::File::options().read(true).write(true).create_new(true).open("x.squashfs")?;
//! let mut writer = ImageWriter::new(file, WriteOptions::default())?;
//! let mut lane = writer.lane();
//! let hello = lane.add_file(&b"hello\n"[..])?;
//! lane.close()?;
//! let mut tree = Tree::new(Meta { mode: 0o755, ..Meta::default() });
//! let bin = tree.add(tree.root(), b"bin", Kind::Dir, Meta { mode: 0o755, ..Meta::default() })?;
//! let a = tree.add(bin, b"hello", Kind::File(hello), Meta { mode: 0o644, ..Meta::default() })?;
//! tree.link(bin, b"again", a)?;
//! let finished = writer.finish(tree)?;
//! println!("{} bytes", finished.file_size);
//! # Ok(())
//! # }
//! ```

mod ahead;
mod append;
mod contents;
mod error;
mod finish;
mod inodes;
mod lane;
mod metadata;
mod output;
mod plan;
mod share;
mod tree;
mod worker;
mod xattr;

use std::fs::File;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;

use crossbeam_channel::{Sender, unbounded};

pub use error::{TreeError, WriteError};
pub use lane::Lane;
pub use tree::{Kind, Meta, NodeId, Tree, clamp_mtime};
pub use xattr::XattrSet;

use crate::compress::{Compression, Compressor};
use crate::format::{MAX_BLOCK_SIZE, MIN_BLOCK_SIZE};
use crate::spill::Spill;
use crate::verity::{DIGEST, Leaves, VerityOptions};
use ahead::Ahead;
use append::{Appender, Arrival};
use contents::Appended;
use lane::Gate;
use output::Output;
use worker::Pool;

/// How an image is written. Only the first five decide its bytes.
#[derive(Debug)]
pub struct WriteOptions {
    /// zstd, gzip or lz4.
    pub compression: Compression,
    /// The compressor's level.
    pub level: i32,
    /// Bytes of a data block: a power of two, 4 KiB to 1 MiB.
    pub block_size: u32,
    /// The time in the superblock.
    pub mkfs_time: u32,
    /// Appends a dm-verity tree.
    pub verity: Option<VerityOptions>,
    /// Threads that compress, 1 to 256. The lanes' threads, the appender and the writer come on top.
    pub threads: usize,
    /// Bytes that lanes whose turn has not come may keep in memory.
    pub ahead: u64,
    /// Where they keep the rest, and the verity leaves of a large image (1/128 of it): an unlinked file, open
    /// for reading and writing, that is never shrunk.
    pub spill: Option<Arc<Spill>>,
}

impl Default for WriteOptions {
    /// zstd level 3, 128 KiB blocks, time 0, no verity, a thread for each core, 32 MiB ahead, no spill file.
    fn default() -> Self {
        Self {
            compression: Compression::Zstd,
            level: 3,
            block_size: 128 << 10,
            mkfs_time: 0,
            verity: None,
            threads: std::thread::available_parallelism().map_or(1, |n| n.get()),
            ahead: 32 << 20,
            spill: None,
        }
    }
}

/// The contents of one file in the image, as given out by [`Lane`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct FileHandle {
    lane: u32,
    index: u32,
}

impl FileHandle {
    /// A file without contents: no lane has this number.
    const EMPTY: Self = Self {
        lane: u32::MAX,
        index: u32::MAX,
    };

    fn to_raw(self) -> u64 {
        u64::from(self.lane) << 32 | u64::from(self.index)
    }

    fn from_raw(raw: u64) -> Self {
        Self {
            lane: (raw >> 32) as u32,
            index: raw as u32,
        }
    }
}

/// An image that is complete but for `fsync`, which is the caller's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    /// Bytes the file system uses (not a multiple of anything).
    pub squashfs_size: u64,
    /// Where the verity superblock begins: `squashfs_size` rounded up to 4,096. `None` without verity.
    pub hash_offset: Option<u64>,
    /// Root digest of the verity tree.
    pub verity_root: Option<[u8; DIGEST]>,
    /// Bytes of the file.
    pub file_size: u64,
    /// Inodes in it.
    pub inodes: u32,
}

/// Bytes of verity leaves (1/128 of the image) that stay in memory when there is a spill file.
const LEAVES_KEPT: usize = 8 << 20;

/// What all threads of one writer see.
#[derive(Debug, Default)]
struct Shared {
    failure: Mutex<Option<WriteError>>,
    bytes_out: AtomicU64,
    gate: Gate,
}

impl Shared {
    /// Keeps the first failure.
    fn fail(&self, error: WriteError) {
        self.failure
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .get_or_insert(error);
    }

    fn failure(&self) -> WriteError {
        self.failure
            .lock()
            .unwrap_or_else(|e| e.into_inner())
            .clone()
            .unwrap_or(WriteError::Aborted)
    }
}

/// Lets everyone go who waits for the appender, when it has ended, well or not.
struct OnEnd {
    shared: Arc<Shared>,
    _alive: Sender<()>,
}

impl Drop for OnEnd {
    fn drop(&mut self) {
        self.shared.gate.open_for_all();
    }
}

/// One image that is being written.
#[derive(Debug)]
pub struct ImageWriter {
    shared: Arc<Shared>,
    pool: Pool,
    arrivals: Sender<Arrival>,
    appender: Option<JoinHandle<Option<Appended>>>,
    workers: Vec<JoinHandle<()>>,
    options: Settings,
    lanes: u32,
}

/// The options that decide the file system's bytes.
#[derive(Debug, Clone, Copy)]
struct Settings {
    compression: Compression,
    level: i32,
    block_size: u32,
    mkfs_time: u32,
}

impl ImageWriter {
    /// Starts an image in `file`, which must be empty and open for reading and writing (reading: when
    /// bytes already written are needed again).
    pub fn new(file: File, options: WriteOptions) -> Result<Self, WriteError> {
        let WriteOptions {
            compression,
            level,
            block_size,
            mkfs_time,
            verity,
            threads,
            ahead,
            spill,
        } = options;
        if !block_size.is_power_of_two() || !(MIN_BLOCK_SIZE..=MAX_BLOCK_SIZE).contains(&block_size)
        {
            return Err(WriteError::Options {
                what: "block size",
                value: u64::from(block_size),
            });
        }
        if !(1..=256).contains(&threads) {
            return Err(WriteError::Options {
                what: "number of threads",
                value: threads as u64,
            });
        }
        let settings = Settings {
            compression,
            level,
            block_size,
            mkfs_time,
        };
        let compressors = (0..threads)
            .map(|_| Compressor::new(compression, level))
            .collect::<Result<Vec<_>, _>>()?;
        let shared = Arc::new(Shared::default());
        let leaves = verity.map(|verity| Leaves::new(verity, LEAVES_KEPT, spill.clone()));
        let mut output = Output::start(file, leaves, Arc::clone(&shared))?;
        output.append(&finish::opening(&settings))?;

        let (arrivals, arrived) = unbounded();
        // Dropped by the appender, whatever way it ends: everyone else stops then.
        let (alive, stop) = crossbeam_channel::bounded(0);
        let known = Arc::new(share::KnownBlocks::default());
        let (pool, jobs) = Pool::new(block_size as usize, 2 * threads + 8, stop);
        let workers = compressors
            .into_iter()
            .map(|compressor| {
                worker::start(
                    compressor,
                    jobs.clone(),
                    pool.stop.clone(),
                    arrivals.clone(),
                    Arc::clone(&known),
                )
            })
            .collect::<Result<Vec<_>, _>>()?;
        let appender = Appender::new(
            output,
            settings,
            known,
            pool.clone(),
            arrived,
            Arc::clone(&shared),
            Ahead::new(Arc::clone(&shared), ahead, spill),
        );
        let on_end = OnEnd {
            shared: Arc::clone(&shared),
            _alive: alive,
        };
        let appender = std::thread::Builder::new()
            .name("squashfs-append".into())
            .spawn(move || {
                let on_end = on_end;
                appender
                    .run()
                    .map_err(|error| on_end.shared.fail(error))
                    .ok()
            })
            .map_err(WriteError::io("start a thread"))?;
        Ok(Self {
            shared,
            pool,
            arrivals,
            appender: Some(appender),
            workers,
            options: settings,
            lanes: 0,
        })
    }

    /// The next stream of contents. What it is given comes after everything of the lanes before it.
    pub fn lane(&mut self) -> Lane {
        self.make_lane(true)
    }

    /// Like [`Self::lane`], but nothing of it is appended before it is [settled](Lane::settle).
    pub fn open_lane(&mut self) -> Lane {
        self.make_lane(false)
    }

    fn make_lane(&mut self, settled: bool) -> Lane {
        let lane = Lane::new(
            (self.lanes, settled),
            self.options.block_size as usize,
            self.pool.clone(),
            self.arrivals.clone(),
            &self.shared,
        );
        if !settled {
            // When nobody hears it, the image has failed, and the lane will learn that.
            let lane = self.lanes;
            let _ = self.arrivals.send(Arrival::Opened { lane });
        }
        self.lanes += 1;
        lane
    }

    /// Bytes written so far, for progress.
    pub fn bytes_out(&self) -> u64 {
        self.shared.bytes_out.load(Ordering::Relaxed)
    }

    /// Writes all tables, the verity tree and, last, the first block. Every lane must be closed.
    pub fn finish(mut self, tree: Tree) -> Result<Finished, WriteError> {
        let _ = self.arrivals.send(Arrival::Finish { lanes: self.lanes });
        let appended = self.join().ok_or_else(|| self.shared.failure())?;
        finish::finish(&self.options, appended, tree)
    }

    fn join(&mut self) -> Option<Appended> {
        let appended = self.appender.take()?.join().ok().flatten();
        for worker in self.workers.drain(..) {
            if worker.join().is_err() {
                self.shared.fail(WriteError::Aborted);
            }
        }
        appended
    }
}

impl Drop for ImageWriter {
    /// Without `finish`: ends the threads; the file holds no image.
    fn drop(&mut self) {
        let _ = self.arrivals.send(Arrival::Failed(WriteError::Aborted));
        self.join();
    }
}
