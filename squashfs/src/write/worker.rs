//! The workers: hash and compress what lanes and the appender send them, in any order.
//!
//! Buffers come in pairs (raw, packed) from a pool of fixed size and travel together until the appender
//! is done with them, which bounds what is in flight. No deadlock: a buffer that waits for an earlier one
//! waits for one that is already on its way.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread::JoinHandle;

use crossbeam_channel::{Receiver, Sender, select, unbounded};

use super::WriteError;
use super::append::{Arrival, Step};
use super::share::{Hash, KnownBlocks};
use crate::compress::{CompressError, Compressor};

/// A pair of buffers.
#[derive(Debug, Default)]
pub(super) struct Slot {
    /// A block's length, always; the first `used` bytes count.
    pub(super) raw: Vec<u8>,
    pub(super) used: usize,
    /// The compressed form, when there is one.
    pub(super) packed: Vec<u8>,
    /// Whether the pool counts it.
    pooled: bool,
}

#[derive(Debug)]
pub(super) enum Job {
    Lane {
        lane: u32,
        sequence: u64,
        slot: Slot,
        work: Work,
    },
    Fragment {
        index: u32,
        slot: Slot,
    },
}

#[derive(Debug)]
pub(super) enum Work {
    /// One block of a file.
    Block,
    /// Whole small files, one behind another.
    Small { lengths: Vec<u32> },
}

/// How a block goes into the image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// Only zeros: takes no space.
    Hole,
    /// `packed` is it.
    Packed,
    /// `raw` is it.
    Raw,
    /// An equal block is in the image already.
    Known,
}

/// The free buffers and the way to the workers.
#[derive(Debug, Clone)]
pub(super) struct Pool {
    block_size: usize,
    free: Receiver<Slot>,
    give: Sender<Slot>,
    jobs: Sender<Job>,
    pub(super) stop: Receiver<()>,
    /// Slots to drop instead of giving them back.
    surplus: Arc<AtomicUsize>,
}

impl Pool {
    /// `slots` pairs; memory is taken at first use.
    pub(super) fn new(
        block_size: usize,
        slots: usize,
        stop: Receiver<()>,
    ) -> (Self, Receiver<Job>) {
        let (give, free) = unbounded();
        let (jobs, queue) = unbounded();
        let pool = Self {
            block_size,
            free,
            give,
            jobs,
            stop,
            surplus: Arc::default(),
        };
        pool.grow(slots);
        (pool, queue)
    }

    pub(super) fn grow(&self, slots: usize) {
        (0..slots).for_each(|_| {
            self.give_back(Slot {
                pooled: true,
                ..Slot::default()
            })
        });
    }

    pub(super) fn shrink(&self, slots: usize) {
        self.surplus.fetch_add(slots, Ordering::AcqRel);
    }

    /// An empty pair; waits for one. `None` when the image has failed.
    pub(super) fn take(&self) -> Option<Slot> {
        let mut slot = select! {
            recv(self.free) -> slot => slot.ok()?,
            recv(self.stop) -> _ => return None,
        };
        slot.raw.resize(self.block_size, 0);
        slot.used = 0;
        Some(slot)
    }

    /// Takes back a pair; one that did not come from here is dropped.
    pub(super) fn give_back(&self, slot: Slot) {
        if !slot.pooled {
            return;
        }
        let less_one = |n: usize| n.checked_sub(1);
        if self
            .surplus
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, less_one)
            .is_err()
        {
            // The receiver lives in this very struct.
            let _ = self.give.send(slot);
        }
    }

    /// Never blocks. `None` when the image has failed.
    pub(super) fn submit(&self, job: Job) -> Option<()> {
        self.jobs.send(job).ok()
    }
}

/// Starts a worker. It ends when `stop` does.
pub(super) fn start(
    mut compressor: Compressor,
    jobs: Receiver<Job>,
    stop: Receiver<()>,
    arrivals: Sender<Arrival>,
    known: Arc<KnownBlocks>,
) -> Result<JoinHandle<()>, WriteError> {
    let run = move || {
        loop {
            let job = select! {
                recv(jobs) -> job => job,
                recv(stop) -> _ => return,
            };
            let Ok(job) = job else { return };
            let done = catch_unwind(AssertUnwindSafe(|| work(&mut compressor, &known, job)));
            let arrival = match done {
                Ok(Ok(arrival)) => arrival,
                Ok(Err(e)) => Arrival::Failed(e.into()),
                Err(_) => Arrival::Failed(WriteError::Aborted),
            };
            if arrivals.send(arrival).is_err() {
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("squashfs-pack".into())
        .spawn(run)
        .map_err(WriteError::io("start a thread"))
}

fn work(
    compressor: &mut Compressor,
    known: &KnownBlocks,
    job: Job,
) -> Result<Arrival, CompressError> {
    let (lane, sequence, mut slot, work) = match job {
        Job::Lane {
            lane,
            sequence,
            slot,
            work,
        } => (lane, sequence, slot, work),
        Job::Fragment { index, mut slot } => {
            let form = pack(compressor, &mut slot)?;
            return Ok(Arrival::Fragment { index, slot, form });
        }
    };
    let step = match work {
        Work::Block if is_zero(&slot.raw[..slot.used]) => Step::Block {
            slot,
            hash: share_of_hole(),
            form: Form::Hole,
        },
        Work::Block => {
            let hash: Hash = *blake3::hash(&slot.raw[..slot.used]).as_bytes();
            let form = if known.contains(&hash) {
                Form::Known
            } else {
                pack(compressor, &mut slot)?
            };
            Step::Block { slot, hash, form }
        }
        Work::Small { lengths } => {
            let mut at = 0;
            let files = lengths
                .into_iter()
                .map(|len| {
                    let file = &slot.raw[at..at + len as usize];
                    at += len as usize;
                    (len, *blake3::hash(file).as_bytes())
                })
                .collect();
            Step::Small { slot, files }
        }
    };
    Ok(Arrival::Step {
        lane,
        sequence,
        step,
    })
}

fn pack(compressor: &mut Compressor, slot: &mut Slot) -> Result<Form, CompressError> {
    Ok(
        if compressor.compress(&slot.raw[..slot.used], &mut slot.packed)? {
            Form::Packed
        } else {
            Form::Raw
        },
    )
}

/// What stands for a block of zeros in a file's chain of hashes.
pub(super) fn share_of_hole() -> Hash {
    [0; 32]
}

fn is_zero(bytes: &[u8]) -> bool {
    bytes
        .chunks(4096)
        .all(|part| part.iter().fold(0, |a, b| a | b) == 0)
}
