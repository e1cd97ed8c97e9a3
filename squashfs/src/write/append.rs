//! The appender: one thread that brings everything into the image's order and decides where it goes.
//!
//! Order: lanes one after another, in a lane by sequence number. A fragment block that is full goes to
//! the workers, and into the image when the [`FRAGMENT_LAG`]th fragment after it is full: a rule that
//! looks at contents only, and leaves that many fragments to be compressed at once.
//!
//! What belongs to a later lane is kept aside in as little memory as it needs ([`Ahead`]), so that its
//! buffers go on circulating.

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;

use crossbeam_channel::Receiver;

use super::ahead::{Ahead, Kept, KeptBytes};
use super::contents::{Appended, FileRecord};
use super::output::Output;
use super::share::{Beginnings, Hash, KnownBlocks, Run, SmallFiles, Stored};
use super::worker::{Form, Job, Pool, Slot};
use super::{FileHandle, Settings, Shared, WriteError};
use crate::format::{BlockSize, FragmentEntry};

/// Full fragments that may be on their way. Changing it changes the bytes of images.
const FRAGMENT_LAG: usize = 32;

/// What reaches the appender, in any order.
#[derive(Debug)]
pub(super) enum Arrival {
    Step {
        lane: u32,
        sequence: u64,
        step: Step,
    },
    Fragment {
        index: u32,
        slot: Slot,
        form: Form,
    },
    /// Nothing of this lane may be carried out yet.
    Opened {
        lane: u32,
    },
    /// Now it may, but for these of its files, named in their order.
    Settled {
        lane: u32,
        unwanted: VecDeque<u32>,
    },
    Finish {
        lanes: u32,
    },
    Failed(WriteError),
}

/// One step of a lane.
#[derive(Debug)]
pub(super) enum Step {
    /// A block of the file in hand.
    Block { slot: Slot, hash: Hash, form: Form },
    /// Whole blocks of zeros of the file in hand.
    Holes(u64),
    /// The file in hand, which has blocks, is complete.
    EndFile { size: u64 },
    /// Small files, one behind another: length and hash.
    Small { slot: Slot, files: Vec<(u32, Hash)> },
    /// A file that was not wanted in its lane.
    BringBack(FileHandle),
    /// The lane has ended.
    Close,
}

#[derive(Debug, Default)]
struct LaneState {
    next: u64,
    waiting: BTreeMap<u64, Kept>,
    /// It is not known yet which files are wanted.
    open: bool,
    /// Numbers of its files that are to be put aside.
    unwanted: VecDeque<u32>,
}

/// A file that was not wanted in its lane.
#[derive(Debug)]
enum Unwanted {
    Small {
        len: u32,
        hash: Hash,
        bytes: KeptBytes,
    },
    Blocks(Vec<Kept>),
}

/// The file that is being appended.
#[derive(Debug)]
struct Current {
    chain: Hash,
    blocks: u32,
    /// So far this file is the beginning of that run, and nothing was written for it.
    same_as: Option<Run>,
    own: Run,
    stored: u64,
}

pub(super) struct Appender {
    out: Output,
    settings: Settings,
    known: Arc<KnownBlocks>,
    pool: Pool,
    arrived: Receiver<Arrival>,
    shared: Arc<Shared>,
    ahead: Ahead,

    lanes: HashMap<u32, LaneState>,
    turn: u32,
    closed: u32,
    expected: Option<u32>,
    files: Vec<Vec<FileRecord>>,
    sizes: Vec<u32>,
    beginnings: Beginnings,
    small: SmallFiles,
    current: Option<Current>,
    /// Steps of the file that is being put aside.
    aside: Vec<Kept>,
    unwanted: HashMap<FileHandle, Unwanted>,

    filling: Slot,
    fragments: Vec<FragmentEntry>,
    /// Full fragments that are not in the image; the first has this index.
    on_the_way: VecDeque<Option<(Slot, Form)>>,
    first_on_the_way: u32,
    spare: Vec<Slot>,
}

impl Appender {
    pub(super) fn new(
        out: Output,
        settings: Settings,
        known: Arc<KnownBlocks>,
        pool: Pool,
        arrived: Receiver<Arrival>,
        shared: Arc<Shared>,
        ahead: Ahead,
    ) -> Self {
        Self {
            out,
            settings,
            known,
            pool,
            arrived,
            shared,
            ahead,
            lanes: HashMap::new(),
            turn: 0,
            closed: 0,
            expected: None,
            files: vec![Vec::new()],
            sizes: Vec::new(),
            beginnings: Beginnings::default(),
            small: SmallFiles::default(),
            current: None,
            aside: Vec::new(),
            unwanted: HashMap::new(),
            filling: Slot::default(),
            fragments: Vec::new(),
            on_the_way: VecDeque::new(),
            first_on_the_way: 0,
            spare: Vec::new(),
        }
    }

    pub(super) fn run(mut self) -> Result<Appended, WriteError> {
        while self.expected != Some(self.turn) {
            match self.next_kept()? {
                Some(step) => self.carry_out(step)?,
                None => self.receive()?,
            }
        }
        self.seal_fragment()?;
        while !self.on_the_way.is_empty() {
            self.append_fragment()?;
        }
        Ok(Appended {
            output: self.out,
            fragments: self.fragments,
            files: self.files,
            sizes: self.sizes,
        })
    }

    /// Takes one arrival; a step whose turn it is is carried out, everything else put where it waits.
    fn receive(&mut self) -> Result<(), WriteError> {
        if let Some(step) = self.sort_in()? {
            self.carry_out(step)?;
        }
        Ok(())
    }

    /// Takes one arrival and gives it back when its turn is now.
    fn sort_in(&mut self) -> Result<Option<Step>, WriteError> {
        match self.arrived.recv().map_err(|_| WriteError::Aborted)? {
            Arrival::Step {
                lane,
                sequence,
                step,
            } => {
                if matches!(step, Step::Close) {
                    self.closed += 1;
                }
                let state = self.lanes.entry(lane).or_default();
                let now = lane == self.turn && !state.open;
                if now && state.next == sequence {
                    state.next += 1;
                    return Ok(Some(step));
                }
                let kept = if now {
                    Kept::whole(step)
                } else {
                    self.ahead.keep(step, &self.pool)?
                };
                self.lanes
                    .entry(lane)
                    .or_default()
                    .waiting
                    .insert(sequence, kept);
            }
            Arrival::Fragment { index, slot, form } => {
                let place = (index - self.first_on_the_way) as usize;
                self.on_the_way[place] = Some((slot, form));
            }
            Arrival::Opened { lane } => self.lanes.entry(lane).or_default().open = true,
            Arrival::Settled { lane, unwanted } => {
                let state = self.lanes.entry(lane).or_default();
                (state.open, state.unwanted) = (false, unwanted);
            }
            // Lanes say that they close on this very channel, so by now all must have.
            Arrival::Finish { lanes } if lanes != self.closed => return Err(WriteError::LaneOpen),
            Arrival::Finish { lanes } => self.expected = Some(lanes),
            Arrival::Failed(error) => return Err(error),
        }
        Ok(None)
    }

    /// The step whose turn it is, when it waits already.
    fn next_kept(&mut self) -> Result<Option<Step>, WriteError> {
        let state = self.lanes.get_mut(&self.turn);
        let Some(state) = state.filter(|state| !state.open) else {
            return Ok(None);
        };
        let Some(kept) = state.waiting.remove(&state.next) else {
            return Ok(None);
        };
        state.next += 1;
        self.ahead.restore(kept).map(Some)
    }

    fn carry_out(&mut self, step: Step) -> Result<(), WriteError> {
        match step {
            Step::Block { .. } | Step::Holes(_) if self.is_unwanted() => {
                let kept = self.ahead.put_away(step, &self.pool)?;
                self.aside.push(kept);
            }
            Step::EndFile { .. } if self.is_unwanted() => {
                self.aside.push(Kept::whole(step));
                let steps = std::mem::take(&mut self.aside);
                self.leave_out(Unwanted::Blocks(steps));
            }
            Step::Block { slot, hash, form } => {
                self.append_block(&slot, hash, form)?;
                self.pool.give_back(slot);
            }
            Step::Holes(count) => {
                for _ in 0..count {
                    self.append_block(
                        &Slot::default(),
                        super::worker::share_of_hole(),
                        Form::Hole,
                    )?;
                }
            }
            Step::EndFile { size } => self.end_file(size)?,
            Step::Small { slot, files } => {
                let mut at = 0;
                for (len, hash) in files {
                    let contents = &slot.raw[at..at + len as usize];
                    if self.is_unwanted() {
                        let bytes = self.ahead.stow(contents)?;
                        self.leave_out(Unwanted::Small { len, hash, bytes });
                    } else {
                        self.append_small(contents, hash)?;
                    }
                    at += len as usize;
                }
                self.pool.give_back(slot);
            }
            Step::BringBack(handle) => match self.unwanted.remove(&handle) {
                Some(Unwanted::Small { len, hash, bytes }) => {
                    let bytes = self.ahead.bytes(bytes)?;
                    self.append_small(&bytes[..len as usize], hash)?;
                }
                Some(Unwanted::Blocks(steps)) => {
                    for step in steps {
                        let step = self.ahead.restore(step)?;
                        self.carry_out(step)?;
                    }
                }
                None => return Err(WriteError::UnknownHandle),
            },
            Step::Close => {
                self.files[self.turn as usize].shrink_to_fit();
                self.lanes.remove(&self.turn);
                self.turn += 1;
                self.files.push(Vec::new());
                self.shared.gate.set_turn(self.turn);
            }
        }
        Ok(())
    }

    fn append_block(&mut self, slot: &Slot, hash: Hash, form: Form) -> Result<(), WriteError> {
        let next_run = Run {
            start: self.out.position(),
            list: self.next_size()?,
        };
        let mut file = self.current.take().unwrap_or(Current {
            chain: Beginnings::EMPTY,
            blocks: 0,
            // A file of no blocks is the beginning of anything.
            same_as: Some(next_run),
            own: next_run,
            stored: 0,
        });
        file.chain = Beginnings::extend(&file.chain, &hash);
        if let Some(same) = file.same_as {
            if let Some(run) = self.beginnings.get(&file.chain) {
                let size = self.sizes[run.list as usize + file.blocks as usize];
                file.same_as = Some(run);
                file.stored += u64::from(BlockSize(size).stored());
                file.blocks += 1;
                self.current = Some(file);
                return Ok(());
            }
            // The first difference: from here on the file has blocks of its own, and they must lie
            // behind a copy of what it had in common.
            file.same_as = None;
            file.own = next_run;
            if file.blocks > 0 {
                let common = same.list as usize..same.list as usize + file.blocks as usize;
                self.out.append_copy(same.start, file.stored)?;
                self.sizes.extend_from_within(common);
            }
        }
        let size = self.store_block(slot, &hash, form)?;
        self.sizes.push(size.0);
        file.stored += u64::from(size.stored());
        file.blocks += 1;
        self.beginnings.insert(file.chain, file.own);
        self.current = Some(file);
        Ok(())
    }

    fn store_block(
        &mut self,
        slot: &Slot,
        hash: &Hash,
        form: Form,
    ) -> Result<BlockSize, WriteError> {
        let at = self.out.position();
        let size = match form {
            Form::Hole => return Ok(BlockSize::HOLE),
            Form::Known => {
                let stored = self.known.get(hash).ok_or(WriteError::Aborted)?;
                self.out
                    .append_copy(stored.at, u64::from(BlockSize(stored.size).stored()))?;
                return Ok(BlockSize(stored.size));
            }
            Form::Packed => {
                self.out.append(&slot.packed)?;
                BlockSize::new(slot.packed.len() as u32, true)
            }
            Form::Raw => {
                self.out.append(&slot.raw[..slot.used])?;
                BlockSize::new(slot.used as u32, false)
            }
        };
        self.known.insert(*hash, Stored { at, size: size.0 });
        Ok(size)
    }

    fn end_file(&mut self, size: u64) -> Result<(), WriteError> {
        let file = self.current.take().ok_or(WriteError::Aborted)?;
        let run = file.same_as.unwrap_or(file.own);
        self.record(FileRecord {
            size,
            start: run.start,
            place: u64::from(run.list),
        });
        Ok(())
    }

    fn append_small(&mut self, contents: &[u8], hash: Hash) -> Result<(), WriteError> {
        if contents.is_empty() {
            self.record(FileRecord::NONE);
            return Ok(());
        }
        let place = match self.small.get(&hash) {
            Some(&place) => place,
            None => {
                if self.filling.used + contents.len() > self.settings.block_size as usize {
                    self.seal_fragment()?;
                }
                let place = (
                    self.first_on_the_way + self.on_the_way.len() as u32,
                    self.filling.used as u32,
                );
                self.filling
                    .raw
                    .resize(self.settings.block_size as usize, 0);
                self.filling.raw[self.filling.used..][..contents.len()].copy_from_slice(contents);
                self.filling.used += contents.len();
                self.small.insert(hash, place);
                place
            }
        };
        let place = u64::from(place.0) << 32 | u64::from(place.1);
        self.record(FileRecord {
            size: contents.len() as u64,
            start: 0,
            place,
        });
        Ok(())
    }

    /// Whether the file that comes next in the lane whose turn it is is to be put aside.
    fn is_unwanted(&self) -> bool {
        let next = self.files[self.turn as usize].len();
        let first = self.lanes.get(&self.turn).and_then(|l| l.unwanted.front());
        first.is_some_and(|&index| index as usize == next)
    }

    /// Puts the file that comes next aside, with what is known of it.
    fn leave_out(&mut self, file: Unwanted) {
        let index = self.files[self.turn as usize].len() as u32;
        let lane = self.turn;
        self.unwanted.insert(FileHandle { lane, index }, file);
        if let Some(state) = self.lanes.get_mut(&lane) {
            state.unwanted.pop_front();
        }
        self.record(FileRecord::NONE);
    }

    fn record(&mut self, record: FileRecord) {
        self.files[self.turn as usize].push(record);
    }

    /// Sends the fragment that is being filled to the workers, and one that is due into the image.
    fn seal_fragment(&mut self) -> Result<(), WriteError> {
        if self.filling.used == 0 {
            return Ok(());
        }
        let index = self.first_on_the_way + self.on_the_way.len() as u32;
        let slot = std::mem::replace(&mut self.filling, self.spare.pop().unwrap_or_default());
        self.filling.used = 0;
        self.on_the_way.push_back(None);
        self.pool
            .submit(Job::Fragment { index, slot })
            .ok_or(WriteError::Aborted)?;
        if self.on_the_way.len() > FRAGMENT_LAG {
            self.append_fragment()?;
        }
        Ok(())
    }

    /// Waits for the first fragment on its way and appends it.
    fn append_fragment(&mut self) -> Result<(), WriteError> {
        let (slot, form) = loop {
            match self.on_the_way.front_mut() {
                Some(done @ Some(_)) => break done.take().ok_or(WriteError::Aborted)?,
                Some(None) => self.wait_in_turn()?,
                None => return Err(WriteError::Aborted),
            }
        };
        let start = self.out.position();
        let size = match form {
            Form::Packed => {
                self.out.append(&slot.packed)?;
                BlockSize::new(slot.packed.len() as u32, true)
            }
            _ => {
                self.out.append(&slot.raw[..slot.used])?;
                BlockSize::new(slot.used as u32, false)
            }
        };
        self.on_the_way.pop_front();
        self.first_on_the_way += 1;
        self.fragments.push(FragmentEntry { start, size });
        self.spare.push(slot);
        Ok(())
    }

    /// Takes one arrival while something else is being carried out: nothing else has its turn.
    fn wait_in_turn(&mut self) -> Result<(), WriteError> {
        let (turn, before) = (self.turn, self.lanes.get(&self.turn).map_or(0, |s| s.next));
        if let Some(step) = self.sort_in()? {
            // It would be next, but not yet.
            let state = self.lanes.entry(turn).or_default();
            state.next = before;
            state.waiting.insert(before, Kept::whole(step));
        }
        Ok(())
    }

    fn next_size(&self) -> Result<u32, WriteError> {
        u32::try_from(self.sizes.len()).map_err(|_| WriteError::TooMany {
            what: "data blocks",
            limit: u64::from(u32::MAX),
        })
    }
}
