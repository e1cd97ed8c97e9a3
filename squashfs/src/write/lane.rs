//! A lane: cuts the contents of one file after another into blocks, on the caller's thread.
//!
//! Small files are laid one behind another into one buffer and travel together; a file that fills a
//! buffer by itself gives blocks. Everything sent has a sequence number, by which the appender restores
//! the lane's order.

use std::io::{ErrorKind, Read};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use crossbeam_channel::Sender;

use super::append::{Arrival, Step};
use super::worker::{Job, Pool, Slot, Work};
use super::{FileHandle, Shared, WriteError};

/// A stream of contents; see the module above. Dropping it closes it.
#[derive(Debug)]
pub struct Lane {
    number: u32,
    block_size: usize,
    pool: Pool,
    arrivals: Sender<Arrival>,
    shared: Arc<Shared>,
    sequence: u64,
    files: u32,
    /// The buffer that is being filled: small files that are complete, then the file in hand.
    buffer: Option<Slot>,
    /// Lengths of the complete small files in `buffer`, which are its first `packed` bytes.
    small: Vec<u32>,
    packed: usize,
    /// Bytes of the file in hand that are sent as blocks.
    sent: u64,
    open: bool,
    /// Whether the pool has been given this lane's slots.
    joined: bool,
    /// Whether it is known which files are wanted.
    settled: bool,
}

/// Buffers a lane may hold while it waits for its caller; the pool has them beyond those in flight.
const SLOTS_A_LANE: usize = 2;

impl Lane {
    pub(super) fn new(
        (number, settled): (u32, bool),
        block_size: usize,
        pool: Pool,
        arrivals: Sender<Arrival>,
        shared: &Arc<Shared>,
    ) -> Self {
        Self {
            number,
            block_size,
            pool,
            arrivals,
            shared: Arc::clone(shared),
            sequence: 0,
            files: 0,
            buffer: None,
            small: Vec::new(),
            packed: 0,
            sent: 0,
            open: true,
            joined: false,
            settled,
        }
    }

    /// Adds a whole file from a reader. When it fails, by the reader or the image, the part that was
    /// read is in the lane as the beginning of a file: close the lane and give up the image.
    pub fn add_file(&mut self, mut contents: impl Read) -> Result<FileHandle, WriteError> {
        loop {
            match contents.read(self.room()?) {
                Ok(0) => return self.end_file(),
                Ok(read) => self.advance(read)?,
                Err(e) if e.kind() == ErrorKind::Interrupted => {}
                Err(e) => return Err(WriteError::Contents(Arc::new(e))),
            }
        }
    }

    /// Appends bytes to the file in hand; begins one when there is none.
    pub fn write(&mut self, mut bytes: &[u8]) -> Result<(), WriteError> {
        while !bytes.is_empty() {
            let room = self.room()?;
            let take = room.len().min(bytes.len());
            room[..take].copy_from_slice(&bytes[..take]);
            self.advance(take)?;
            bytes = &bytes[take..];
        }
        Ok(())
    }

    /// Appends `len` zeros to the file in hand; whole blocks of them cost next to nothing.
    pub fn write_hole(&mut self, mut len: u64) -> Result<(), WriteError> {
        while len > 0 {
            let block = self.block_size as u64;
            if self.in_hand() == 0 && len >= block {
                let blocks = len / block;
                self.flush_small()?;
                self.send(Step::Holes(blocks))?;
                self.sent += blocks * block;
                len %= block;
            } else {
                let room = self.room()?;
                let take = len.min(room.len() as u64) as usize;
                room[..take].fill(0);
                self.advance(take)?;
                len -= take as u64;
            }
        }
        Ok(())
    }

    /// Ends the file in hand (an empty one, when nothing was written) and gives its handle.
    pub fn end_file(&mut self) -> Result<FileHandle, WriteError> {
        let handle = self.next_handle()?;
        let in_hand = self.in_hand();
        if self.sent == 0 {
            self.small.push(in_hand as u32);
            self.packed += in_hand;
            // Empty files fill no buffer, and must not make this list endless.
            if self.packed == self.block_size || self.small.len() >= self.block_size {
                self.flush_small()?;
            }
        } else {
            if in_hand > 0 {
                self.send_block()?;
            }
            let size = self.sent + in_hand as u64;
            self.sent = 0;
            self.send(Step::EndFile { size })?;
        }
        Ok(handle)
    }

    /// Says which of the files so far are not wanted, in the order they were added. Everything else of this lane is.
    pub fn settle(&mut self, unwanted: Vec<FileHandle>) -> Result<(), WriteError> {
        debug_assert!(unwanted.iter().all(|handle| handle.lane == self.number));
        self.settled = true;
        let unwanted = unwanted.into_iter().map(|handle| handle.index).collect();
        let lane = self.number;
        let settled = Arrival::Settled { lane, unwanted };
        let sent = self.arrivals.send(settled);
        sent.map_err(|_| self.shared.failure())
    }

    /// Adds the contents of a file that an earlier lane had and that was not wanted there. To be called once a file,
    /// with no file in hand.
    pub fn bring_back(&mut self, unwanted: FileHandle) -> Result<FileHandle, WriteError> {
        self.flush_small()?;
        let handle = self.next_handle()?;
        self.send(Step::BringBack(unwanted))?;
        Ok(handle)
    }

    /// Hands over what is left. A file in hand is ended.
    pub fn close(mut self) -> Result<(), WriteError> {
        self.close_once()
    }

    fn close_once(&mut self) -> Result<(), WriteError> {
        if !std::mem::take(&mut self.open) {
            return Ok(());
        }
        if self.sent > 0 || self.in_hand() > 0 {
            self.end_file()?;
        }
        self.flush_small()?;
        if let Some(slot) = self.buffer.take() {
            self.pool.give_back(slot);
        }
        if self.joined {
            self.pool.shrink(SLOTS_A_LANE);
        }
        if !self.settled {
            // Given up: so is the image.
            let _ = self.arrivals.send(Arrival::Failed(WriteError::Aborted));
            return Err(WriteError::Aborted);
        }
        self.send(Step::Close)
    }

    fn next_handle(&mut self) -> Result<FileHandle, WriteError> {
        let handle = FileHandle {
            lane: self.number,
            index: self.files,
        };
        self.files = self.files.checked_add(1).ok_or(WriteError::TooMany {
            what: "files in a lane",
            limit: u64::from(u32::MAX),
        })?;
        Ok(handle)
    }

    /// Bytes of the file in hand that are not sent.
    fn in_hand(&self) -> usize {
        self.buffer
            .as_ref()
            .map_or(0, |slot| slot.used - self.packed)
    }

    /// Room for more of the file in hand, never empty; what was used of it is reported to [`Self::advance`].
    fn room(&mut self) -> Result<&mut [u8], WriteError> {
        let slot = match self.buffer.take() {
            Some(slot) => slot,
            None => self.take_slot()?,
        };
        let slot = self.buffer.insert(slot);
        Ok(&mut slot.raw[slot.used..])
    }

    /// `len` bytes of room were used. A buffer that is full goes out.
    fn advance(&mut self, len: usize) -> Result<(), WriteError> {
        let Some(slot) = &mut self.buffer else {
            return Ok(());
        };
        slot.used += len;
        if slot.used < self.block_size {
            return Ok(());
        }
        if self.packed > 0 {
            return self.flush_small();
        }
        self.flush_small()?;
        self.send_block()?;
        self.sent += self.block_size as u64;
        Ok(())
    }

    /// Sends the complete small files; what is in hand moves to a buffer of its own.
    fn flush_small(&mut self) -> Result<(), WriteError> {
        if self.small.is_empty() {
            return Ok(());
        }
        let mut slot = match self.buffer.take() {
            Some(slot) => slot,
            None => self.take_slot()?,
        };
        let rest = self.packed..slot.used;
        if !rest.is_empty() {
            let mut next = self.take_slot()?;
            next.raw[..rest.len()].copy_from_slice(&slot.raw[rest.clone()]);
            next.used = rest.len();
            slot.used = self.packed;
            self.buffer = Some(next);
        }
        self.packed = 0;
        let lengths = std::mem::take(&mut self.small);
        self.submit(slot, Work::Small { lengths })
    }

    fn send_block(&mut self) -> Result<(), WriteError> {
        match self.buffer.take() {
            Some(slot) => self.submit(slot, Work::Block),
            None => Ok(()),
        }
    }

    fn take_slot(&mut self) -> Result<Slot, WriteError> {
        if !std::mem::replace(&mut self.joined, true) {
            self.pool.grow(SLOTS_A_LANE);
        }
        self.shared.gate.wait(self.number);
        self.pool.take().ok_or_else(|| self.shared.failure())
    }

    fn submit(&mut self, slot: Slot, work: Work) -> Result<(), WriteError> {
        let job = Job::Lane {
            lane: self.number,
            sequence: self.sequence,
            slot,
            work,
        };
        self.sequence += 1;
        self.pool.submit(job).ok_or_else(|| self.shared.failure())
    }

    fn send(&mut self, step: Step) -> Result<(), WriteError> {
        let arrival = Arrival::Step {
            lane: self.number,
            sequence: self.sequence,
            step,
        };
        self.sequence += 1;
        self.arrivals
            .send(arrival)
            .map_err(|_| self.shared.failure())
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // The writer learns of a failure by itself; there is nobody here to tell.
        let _ = self.close_once();
    }
}

/// Holds back lanes that have run too far ahead.
#[derive(Debug, Default)]
pub(super) struct Gate {
    /// The lane whose turn it is.
    turn: AtomicU32,
    /// Bytes kept for later lanes.
    kept: AtomicU64,
    limit: AtomicU64,
    lock: Mutex<()>,
    changed: Condvar,
}

impl Gate {
    pub(super) fn set_limit(&self, bytes: u64) {
        self.limit.store(bytes, Ordering::Relaxed);
    }

    /// Blocks while `lane` must not go on.
    fn wait(&self, lane: u32) {
        if self.may_pass(lane) {
            return;
        }
        let mut guard = self.lock.lock().unwrap_or_else(|e| e.into_inner());
        while !self.may_pass(lane) {
            guard = self.changed.wait(guard).unwrap_or_else(|e| e.into_inner());
        }
    }

    fn may_pass(&self, lane: u32) -> bool {
        lane <= self.turn.load(Ordering::Acquire)
            || self.kept.load(Ordering::Acquire) < self.limit.load(Ordering::Acquire)
    }

    pub(super) fn keep(&self, bytes: u64) {
        self.kept.fetch_add(bytes, Ordering::AcqRel);
    }

    pub(super) fn kept(&self) -> u64 {
        self.kept.load(Ordering::Relaxed)
    }

    pub(super) fn release(&self, bytes: u64) {
        self.kept.fetch_sub(bytes, Ordering::AcqRel);
        self.wake();
    }

    pub(super) fn set_turn(&self, lane: u32) {
        self.turn.store(lane, Ordering::Release);
        self.wake();
    }

    /// Nobody waits any more: the appender has ended.
    pub(super) fn open_for_all(&self) {
        self.set_turn(u32::MAX);
    }

    fn wake(&self) {
        drop(self.lock.lock());
        self.changed.notify_all();
    }
}
