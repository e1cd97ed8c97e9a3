//! Chunks of an image brought here when they are first read: once, however many readers want them, and never seen
//! before they were checked.
//!
//! Locking: a chunk that is being brought has a flight, and who wants it meanwhile waits for that. Leaf chunks never
//! need data chunks, and a fetch asks for its leaves before it takes a place at the gate, so nobody waits in a circle.
//! Every wait ends when the reader's patience does.

use std::collections::VecDeque;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::Instant;

use berth_image::trace::{Trace, TraceError};
use berth_squashfs::read::ReadAt;
use berth_squashfs::verity::BLOCK;

use super::CHUNK;
use super::ahead::{Places, Streams};
use super::cache::Cache;
use super::file::{CacheFile, Keeping};
use super::flights::{Flights, Landings, Outcome};
use super::gate::{self, Gate};
use super::prefetch::{Background, Brought, Pace, everything};
use super::source::{SourceError, Sources};
use super::trace::{Recorder, fetches};
use super::tree::{Chunks, Sealed, Tree, TreeError};
use crate::lock;

/// Chunks kept in memory while there is no cache file to keep them in: 1 MiB.
const RECENT: usize = 16;

/// Why an image that is elsewhere cannot be opened.
pub type OpenError = TreeError;

/// What a store did so far, in chunks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Reads that found their chunk on this node.
    pub hits: u64,
    /// Fetched while a reader waited.
    pub misses: u64,
    /// Fetched before anybody asked.
    pub ahead: u64,
    /// Found on this node, but damaged.
    pub damaged: u64,
    /// Right, but not to be kept: no cache, no room, a full disk.
    pub not_kept: u64,
}

#[derive(Debug, Default)]
struct Counters {
    hits: AtomicU64,
    misses: AtomicU64,
    ahead: AtomicU64,
    damaged: AtomicU64,
    not_kept: AtomicU64,
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

/// A file that is elsewhere, as a source for the reader: its data, without the tree.
#[derive(Debug)]
pub struct ChunkStore {
    me: Weak<Self>,
    sealed: Sealed,
    chunks: Chunks,
    tree: Tree,
    sources: Sources,
    cache: Option<Arc<CacheFile>>,
    flights: Flights,
    recent: Mutex<VecDeque<(u32, Arc<[u8]>)>>,
    streams: Mutex<Streams>,
    places: Mutex<Places>,
    recorder: Mutex<Option<Recorder>>,
    background: Arc<Background>,
    when_whole: WhenWhole,
    counters: Counters,
}

/// What is done when all of an image has come.
#[derive(Default)]
struct WhenWhole(OnceLock<Box<dyn Fn() + Send + Sync>>);

impl std::fmt::Debug for WhenWhole {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("WhenWhole")
    }
}

/// Where the bytes that a fetch brings are wanted at once: from `skip` of its first chunk on.
struct Want<'a> {
    skip: usize,
    out: &'a mut [u8],
}

impl ChunkStore {
    /// Opens the image that was sealed so. Without a cache, or when it cannot be used, everything is fetched as it is
    /// read.
    pub fn open(
        sealed: Sealed,
        sources: Sources,
        cache: Option<&Arc<Cache>>,
    ) -> Result<Arc<Self>, OpenError> {
        let chunks = Chunks::of(&sealed)?;
        let cache = cache.and_then(|cache| match cache.image(&sealed.root, &chunks) {
            Ok(file) => Some(file),
            Err(error) => {
                let error = &error as &dyn std::error::Error;
                tracing::warn!(error, "goes on without a cache");
                None
            }
        });
        let tree = open_tree(&sealed, &sources, cache.as_deref())?;
        Ok(Arc::new_cyclic(|me| Self {
            me: Weak::clone(me),
            places: Mutex::new(Places::new(chunks.data_count)),
            sealed,
            chunks,
            tree,
            sources,
            cache,
            flights: Flights::default(),
            recent: Mutex::default(),
            streams: Mutex::default(),
            recorder: Mutex::default(),
            background: Arc::default(),
            when_whole: WhenWhole::default(),
            counters: Counters::default(),
        }))
    }

    /// What it did so far.
    pub fn stats(&self) -> Stats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            hits: get(&self.counters.hits),
            misses: get(&self.counters.misses),
            ahead: get(&self.counters.ahead),
            damaged: get(&self.counters.damaged),
            not_kept: get(&self.counters.not_kept),
        }
    }

    /// Which image it is.
    pub fn sealed(&self) -> &Sealed {
        &self.sealed
    }

    pub(super) fn background(&self) -> Arc<Background> {
        Arc::clone(&self.background)
    }

    /// Where the bytes came from.
    pub fn sources(&self) -> &Sources {
        &self.sources
    }

    /// Notes from now on which chunks are read.
    pub fn record(&self) {
        *lock(&self.recorder) = Some(Recorder::new(&self.chunks));
    }

    pub(super) fn is_recording(&self) -> bool {
        lock(&self.recorder).is_some()
    }

    /// Ends the recording. `None` if there was none.
    pub fn recorded(&self) -> Option<Result<Trace, TraceError>> {
        let recorder = lock(&self.recorder).take();
        recorder.map(|recorder| recorder.trace(&self.sealed))
    }

    /// Fetches what a trace of this image names, in the background. Without a cache there is nowhere to.
    pub fn replay(&self, trace: &Trace, pace: Pace) {
        if self.cache.is_some() {
            lock(&self.streams).has_trace = true;
            let runs = fetches(trace, &self.chunks);
            self.background.plan(&self.me, runs, pace);
        }
    }

    /// Fetches all of the image in the background.
    pub fn fill(&self, pace: Pace) {
        if self.cache.is_some() {
            let runs = everything(&self.chunks);
            self.background.plan(&self.me, runs, pace);
        }
    }

    /// Has `told` called when every chunk is in the cache file: now, or when the last one has come, and again if one was
    /// lost and came back. Only the first `told` of a store counts.
    pub fn when_whole(&self, told: impl Fn() + Send + Sync + 'static) {
        let _ = self.when_whole.0.set(Box::new(told));
        if self.cache.as_ref().is_some_and(|file| file.is_whole()) {
            self.is_whole();
        }
    }

    fn is_whole(&self) {
        if let Some(told) = self.when_whole.0.get() {
            told();
        }
    }

    /// All of the image is elsewhere on this node: when nobody reads it here, its place in the cache goes first.
    pub fn spare(&self) {
        if let Some(file) = &self.cache {
            file.spare();
        }
    }

    fn is_here(&self, chunk: u32) -> bool {
        self.cache.as_ref().is_some_and(|file| file.is_here(chunk))
    }

    /// Fills `out` from byte `within` of a table of chunks that begins with chunk `first`.
    fn read_table(
        &self,
        first: u32,
        within: u64,
        out: &mut [u8],
        until: Instant,
    ) -> Result<(), SourceError> {
        let mut done = 0;
        while done < out.len() {
            let at = within + done as u64;
            let chunk = first + (at / CHUNK) as u32;
            done += self.read_some(chunk, at % CHUNK, &mut out[done..], until)?;
        }
        Ok(())
    }

    /// Reads at least one byte from `skip` of a chunk on; more chunks only where they come in one fetch.
    fn read_some(
        &self,
        chunk: u32,
        skip: u64,
        out: &mut [u8],
        until: Instant,
    ) -> Result<usize, SourceError> {
        let take = (self.chunks.len_of(chunk) - skip).min(out.len() as u64) as usize;
        let after = chunk + 1 + ((out.len() - take) as u64).div_ceil(CHUNK) as u32;
        let mut waiting = None;
        loop {
            if self.read_kept(chunk, skip, &mut out[..take], until)? {
                if waiting.is_none() {
                    count(&self.counters.hits);
                }
                return Ok(take);
            }
            if let Some(bytes) = self.recent(chunk) {
                out[..take].copy_from_slice(&bytes[skip as usize..][..take]);
                return Ok(take);
            }
            waiting.get_or_insert_with(|| self.background.demand());
            if let Some(landings) = self.flights.lead(chunk..after, |c| !self.is_here(c)) {
                self.missed(chunk);
                let skip = skip as usize;
                let want = Want { skip, out };
                return self.load(landings, &gate::DEMAND, until, Some(want));
            }
            match self.flights.get(chunk).map(|flight| flight.wait(until)) {
                Some(Some(Outcome::Brought(bytes))) => {
                    out[..take].copy_from_slice(&bytes[skip as usize..][..take]);
                    return Ok(take);
                }
                // It has just landed, or nobody brings it any more.
                Some(Some(Outcome::Kept | Outcome::Again)) | None => {}
                Some(None) => return Err(SourceError::Late),
            }
            if Instant::now() >= until {
                return Err(SourceError::Late);
            }
        }
    }

    fn recent(&self, chunk: u32) -> Option<Arc<[u8]>> {
        let recent = lock(&self.recent);
        let found = recent.iter().find(|(number, _)| *number == chunk);
        found.map(|(_, bytes)| Arc::clone(bytes))
    }

    /// Reads from the cache file, and checks. `false` when the chunk is not there, or was damaged.
    fn read_kept(
        &self,
        chunk: u32,
        skip: u64,
        out: &mut [u8],
        until: Instant,
    ) -> Result<bool, SourceError> {
        let Some(file) = &self.cache else {
            return Ok(false);
        };
        let Some(in_use) = file.use_if_here(chunk) else {
            return Ok(false);
        };
        let place = self.chunks.place(chunk);
        let block = BLOCK as u64;
        let from = skip / block * block;
        let to = (skip + out.len() as u64).next_multiple_of(block);
        let right = |bytes: &[u8]| match self.digests(chunk, from / block, to / block, until)? {
            Some(digests) => Ok(self.tree.data_right(bytes, &digests)),
            None => Ok(self.tree.leaves_right(place.start + from, bytes)),
        };
        let whole = to - from == out.len() as u64;
        let good = if whole {
            file.read(place.start + from, out).is_ok() && right(out)?
        } else {
            let mut blocks = vec![0; (to - from) as usize];
            let good = file.read(place.start + from, &mut blocks).is_ok() && right(&blocks)?;
            out.copy_from_slice(&blocks[(skip - from) as usize..][..out.len()]);
            good
        };
        if !good {
            count(&self.counters.damaged);
            tracing::warn!(chunk, "a chunk in the cache was damaged");
            file.damaged(chunk, &in_use);
        }
        Ok(good)
    }

    /// The sealed digests of some blocks of a data chunk, and on; `None` for a chunk of leaves.
    fn digests(
        &self,
        chunk: u32,
        from: u64,
        to: u64,
        until: Instant,
    ) -> Result<Option<Vec<u8>>, SourceError> {
        if chunk >= self.chunks.data_count {
            return Ok(None);
        }
        let first = u64::from(chunk) * (CHUNK / BLOCK as u64) + from;
        let Some(leaves) = self.tree.leaf_place(first, to - from) else {
            return Ok(Some(self.tree.only_digest().to_vec()));
        };
        let mut digests = vec![0u8; (leaves.end - leaves.start) as usize];
        let within = leaves.start - self.tree.leaves.start;
        self.read_table(self.chunks.data_count, within, &mut digests, until)?;
        Ok(Some(digests))
    }

    /// Brings the chunks of these flights; gives back how many bytes went where they are wanted. Flights that this
    /// cannot end are given up.
    fn load(
        &self,
        mut landings: Landings<'_>,
        gate: &Gate,
        until: Instant,
        want: Option<Want<'_>>,
    ) -> Result<usize, SourceError> {
        let all = landings.left();
        let (start, end) = (
            self.chunks.place(all.start).start,
            self.chunks.place(all.end - 1).end,
        );
        let block = BLOCK as u64;
        let digests = self.digests(all.start, 0, (end - start) / block, until)?;
        let _place = gate.enter(until).ok_or(SourceError::Late)?;
        let counter = match want {
            Some(_) => &self.counters.misses,
            None => &self.counters.ahead,
        };
        let mut copied = 0;
        let mut want = want;
        let mut take = |offset: u64, bytes: &[u8]| {
            let right = match &digests {
                Some(digests) => {
                    let from = ((offset - start) / block) as usize * berth_squashfs::verity::DIGEST;
                    self.tree.data_right(bytes, &digests[from..])
                }
                None => self.tree.leaves_right(offset, bytes),
            };
            if !right {
                return false;
            }
            if let Some(want) = &mut want {
                let skip = if offset == start { want.skip } else { 0 };
                let room = &mut want.out[copied..];
                let len = room.len().min(bytes.len() - skip);
                room[..len].copy_from_slice(&bytes[skip..skip + len]);
                copied += len;
            }
            count(counter);
            let (outcome, last) = self.keep(landings.left().start, bytes);
            landings.land(outcome);
            if last {
                self.is_whole();
            }
            true
        };
        match self.sources.fetch(start..end, CHUNK, until, &mut take) {
            // The rest is asked for again by who wants it.
            Err(error) if copied == 0 => Err(error),
            _ => Ok(copied),
        }
    }

    /// What is told to those who wait for the chunk, and whether it was the last one that was missing.
    fn keep(&self, chunk: u32, bytes: &[u8]) -> (Outcome, bool) {
        match self.cache.as_ref().map(|file| file.keep(chunk, bytes)) {
            Some(Keeping::Kept) => return (Outcome::Kept, false),
            Some(Keeping::KeptLast) => return (Outcome::Kept, true),
            Some(Keeping::Not) | None => {}
        }
        count(&self.counters.not_kept);
        let bytes: Arc<[u8]> = bytes.into();
        let mut recent = lock(&self.recent);
        recent.push_back((chunk, Arc::clone(&bytes)));
        while recent.len() > RECENT {
            recent.pop_front();
        }
        (Outcome::Brought(bytes), false)
    }

    /// Brings what is not here of some neighbours.
    pub(super) fn bring_ahead(&self, range: Range<u32>) -> Brought {
        let until = Instant::now() + self.sources.patience();
        let mut at = range.start;
        while at < range.end {
            let Some(landings) = self.flights.lead(at..range.end, |c| !self.is_here(c)) else {
                at += 1;
                continue;
            };
            let some = landings.left();
            at = some.end;
            if let Err(error) = self.load(landings, &gate::AHEAD, until, None) {
                tracing::info!(%error, "not fetched ahead");
                return Brought::NotYet;
            }
            if !self.is_here(some.start) {
                return Brought::NotKept;
            }
        }
        Brought::All
    }

    /// A reader is about to read these bytes of data.
    fn note(&self, offset: u64, len: usize) {
        let chunks = (offset / CHUNK) as u32..(offset + len as u64).div_ceil(CHUNK) as u32;
        if let Some(recorder) = &mut *lock(&self.recorder) {
            recorder.touch(chunks.clone());
        }
        if self.cache.is_none() {
            return;
        }
        let ahead = lock(&self.streams).note(chunks);
        if let Some(ahead) = ahead {
            self.ahead(ahead);
        }
    }

    /// A reader has to wait for this chunk.
    fn missed(&self, chunk: u32) {
        if self.cache.is_none() || chunk >= self.chunks.data_count {
            return;
        }
        let place = lock(&self.places).missed(chunk);
        if let Some(place) = place {
            self.ahead(place);
        }
    }

    fn ahead(&self, range: Range<u32>) {
        let range = range.start..range.end.min(self.chunks.data_count);
        if range.clone().any(|chunk| !self.is_here(chunk)) {
            self.background.ahead(&self.me, range);
        }
    }
}

impl Drop for ChunkStore {
    fn drop(&mut self) {
        self.background.stop();
    }
}

/// The tree, from the cache or else from a source.
fn open_tree(
    sealed: &Sealed,
    sources: &Sources,
    cache: Option<&CacheFile>,
) -> Result<Tree, OpenError> {
    let place = Tree::proof_place(sealed)?;
    let mut proof = vec![0u8; (place.end - place.start) as usize];
    if let Some(file) = cache
        && file.read(place.start, &mut proof).is_ok()
        && let Some(tree) = Tree::proven(sealed, &proof)
    {
        return Ok(tree);
    }
    let until = Instant::now() + sources.patience();
    let (len, mut tree) = (place.end - place.start, None);
    sources.fetch(place.clone(), len, until, &mut |_, proof| {
        tree = Tree::proven(sealed, proof);
        if tree.is_some()
            && let Some(Err(error)) = cache.map(|file| file.write_head(place.start, proof))
        {
            tracing::warn!(%error, "the head of the hash tree is not kept");
        }
        tree.is_some()
    })?;
    tree.ok_or(TreeError::Offset(sealed.hash_offset))
}

impl ReadAt for ChunkStore {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.sealed.hash_offset) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if buf.is_empty() {
            return Ok(());
        }
        self.note(offset, buf.len());
        let until = Instant::now() + self.sources.patience();
        self.read_table(0, offset, buf, until)
            .map_err(io::Error::other)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.sealed.hash_offset)
    }
}
