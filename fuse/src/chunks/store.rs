//! Pieces of an image brought here when they are first read: once, however many readers want them, and never seen
//! before they were checked.
//!
//! Locking: a piece that is being brought or thrown out has a flight; who wants it meanwhile waits for the flight. The
//! lock of the flights is held for map operations only. Leaf pieces never need data pieces, so flights cannot wait for
//! each other in a circle.

use std::collections::{HashMap, VecDeque};
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};

use berth_squashfs::read::ReadAt;
use berth_squashfs::verity::{BLOCK, DIGEST};

use super::cache::CacheFile;
use super::origin::{OriginError, Origins};
use super::pieces::Pieces;
use super::tree::{Sealed, Tree, TreeError};
use super::{CacheError, PIECE};
use crate::lock;

/// Pieces kept in memory while there is no cache file to keep them in.
const RECENT: usize = 8;

/// Why an image that is elsewhere cannot be opened.
pub type OpenError = TreeError;

/// What a store did so far.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Pieces fetched from an origin.
    pub fetched: u64,
    /// Pieces found on this node after a restart.
    pub found: u64,
    /// Pieces found on this node, but damaged.
    pub damaged: u64,
    /// Pieces thrown out to keep the size.
    pub evicted: u64,
    /// Pieces that could not be kept.
    pub not_kept: u64,
}

#[derive(Debug, Default)]
struct Counters {
    fetched: AtomicU64,
    found: AtomicU64,
    damaged: AtomicU64,
    evicted: AtomicU64,
    not_kept: AtomicU64,
}

#[derive(Debug, Clone)]
enum Outcome {
    Brought(Result<Arc<[u8]>, Arc<OriginError>>),
    /// Thrown out, or given up: look again.
    Again,
}

#[derive(Debug)]
struct Flight {
    outcome: Mutex<Option<Outcome>>,
    landed: Condvar,
}

/// A file that is elsewhere, as a source for the reader: its data, without the tree.
#[derive(Debug)]
pub struct ChunkStore {
    sealed: Sealed,
    tree: Tree,
    origins: Origins,
    cache: Option<CacheFile>,
    /// Most bytes in the cache file.
    limit: u64,
    /// Pieces of data, then of the tree's leaves.
    pieces: Pieces,
    /// In the cache file, perhaps not yet checked.
    on_disk: Vec<AtomicBool>,
    used: AtomicU64,
    hand: Mutex<usize>,
    flights: Mutex<HashMap<usize, Arc<Flight>>>,
    recent: Mutex<VecDeque<(usize, Arc<[u8]>)>>,
    counters: Counters,
}

impl ChunkStore {
    /// Opens the image that was sealed so. `open_cache` is asked for a cache file with so many pieces; without one, or
    /// when it fails, everything is fetched as it is read. `limit` is how many bytes the cache file may take.
    pub fn open(
        sealed: Sealed,
        origins: Origins,
        open_cache: impl FnOnce(usize) -> Option<Result<(CacheFile, Vec<bool>), CacheError>>,
        limit: u64,
    ) -> Result<Self, OpenError> {
        let place = Tree::head_place(&sealed)?;
        let leaves =
            (sealed.hash_offset / BLOCK as u64).div_ceil((BLOCK / DIGEST) as u64) * BLOCK as u64;
        let count = (sealed.hash_offset.div_ceil(PIECE) + leaves.div_ceil(PIECE)) as usize;
        let (cache, there) = match open_cache(count) {
            None => (None, vec![false; count]),
            Some(Ok((cache, there))) => (Some(cache), there),
            Some(Err(error)) => {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    "goes on without a cache"
                );
                (None, vec![false; count])
            }
        };
        let mut head = vec![0u8; (place.end - place.start) as usize];
        let kept = cache
            .as_ref()
            .is_some_and(|cache| cache.read(place.start, &mut head).is_ok());
        let mut tree = if kept {
            Tree::from_head(&sealed, &head)
        } else {
            None
        };
        if tree.is_none() {
            origins.fetch(place.start, &mut head, |head| {
                Tree::from_head(&sealed, head).is_some()
            })?;
            tree = Tree::from_head(&sealed, &head);
            if let Some(error) = cache
                .as_ref()
                .and_then(|cache| cache.write_head(place.start, &head).err())
            {
                tracing::warn!(%error, "the head of the hash tree is not kept");
            }
        }
        let tree = tree.ok_or(TreeError::Offset(sealed.hash_offset))?;
        let mut store = Self {
            sealed,
            tree,
            origins,
            cache,
            limit,
            pieces: Pieces::new(count),
            on_disk: there.into_iter().map(AtomicBool::new).collect(),
            used: AtomicU64::new(0),
            hand: Mutex::new(0),
            flights: Mutex::default(),
            recent: Mutex::default(),
            counters: Counters::default(),
        };
        let on_disk = store.on_disk.iter().enumerate();
        let used = on_disk.filter(|(_, there)| there.load(Ordering::Relaxed));
        let used = used.map(|(piece, _)| store.len_of(piece)).sum();
        store.used = AtomicU64::new(used);
        Ok(store)
    }

    /// What it did so far.
    pub fn stats(&self) -> Stats {
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Stats {
            fetched: get(&self.counters.fetched),
            found: get(&self.counters.found),
            damaged: get(&self.counters.damaged),
            evicted: get(&self.counters.evicted),
            not_kept: get(&self.counters.not_kept),
        }
    }

    /// Where the bytes came from.
    pub fn origins(&self) -> &Origins {
        &self.origins
    }

    fn data_pieces(&self) -> usize {
        self.sealed.hash_offset.div_ceil(PIECE) as usize
    }

    /// Where a piece lies in the file.
    fn place(&self, piece: usize) -> Range<u64> {
        let (start, end, number) = match piece.checked_sub(self.data_pieces()) {
            None => (0, self.sealed.hash_offset, piece),
            Some(leaf) => (self.tree.leaves.start, self.tree.leaves.end, leaf),
        };
        let from = start + number as u64 * PIECE;
        from..(from + PIECE).min(end)
    }

    fn len_of(&self, piece: usize) -> u64 {
        let place = self.place(piece);
        place.end - place.start
    }

    /// Fills `out` from byte `within` of a table of pieces that begins with piece `first`.
    fn read_from(&self, first: usize, within: u64, out: &mut [u8]) -> Result<(), Arc<OriginError>> {
        let mut done = 0;
        while done < out.len() {
            let at = within + done as u64;
            let piece = first + (at / PIECE) as usize;
            let skip = at % PIECE;
            let take = (self.len_of(piece) - skip).min((out.len() - done) as u64) as usize;
            self.read_piece(piece, skip, &mut out[done..done + take])?;
            done += take;
        }
        Ok(())
    }

    fn read_piece(&self, piece: usize, skip: u64, out: &mut [u8]) -> Result<(), Arc<OriginError>> {
        if let (Some(cache), Some(_in_use)) = (&self.cache, self.pieces.use_if_here(piece)) {
            match cache.read(self.place(piece).start + skip, out) {
                Ok(()) => return Ok(()),
                Err(error) => tracing::warn!(%error, "the cache file cannot be read"),
            }
        }
        let bytes = self.bring(piece)?;
        let from = skip as usize;
        out.copy_from_slice(&bytes[from..from + out.len()]);
        Ok(())
    }

    /// The bytes of a piece that was not here when the caller looked.
    fn bring(&self, piece: usize) -> Result<Arc<[u8]>, Arc<OriginError>> {
        loop {
            let flight = {
                let recent = lock(&self.recent);
                if let Some((_, bytes)) = recent.iter().find(|(number, _)| *number == piece) {
                    return Ok(Arc::clone(bytes));
                }
                drop(recent);
                let flights = lock(&self.flights);
                flights.get(&piece).cloned()
            };
            let outcome = match flight {
                Some(flight) => flight.wait(),
                None => match self.lead(piece) {
                    None => continue,
                    Some(landing) => {
                        let result = self.load(piece).map_err(Arc::new);
                        landing.land(Outcome::Brought(result.clone()));
                        return result;
                    }
                },
            };
            if let Outcome::Brought(result) = outcome {
                return result;
            }
        }
    }

    fn lead(&self, piece: usize) -> Option<Landing<'_>> {
        let mut flights = lock(&self.flights);
        if flights.contains_key(&piece) {
            return None;
        }
        let flight = Arc::new(Flight {
            outcome: Mutex::new(None),
            landed: Condvar::new(),
        });
        flights.insert(piece, Arc::clone(&flight));
        Some(Landing {
            store: self,
            piece,
            flight,
        })
    }

    fn load(&self, piece: usize) -> Result<Arc<[u8]>, OriginError> {
        let place = self.place(piece);
        let digests = self.digests(piece)?;
        let right = |bytes: &[u8]| match &digests {
            Some(digests) => self.tree.data_right(bytes, digests),
            None => self.tree.leaves_right(place.start, bytes),
        };
        let mut bytes = vec![0u8; (place.end - place.start) as usize];
        if let Some(cache) = self
            .cache
            .as_ref()
            .filter(|_| self.on_disk[piece].load(Ordering::Acquire))
        {
            if cache.read(place.start, &mut bytes).is_ok() && right(&bytes) {
                self.counters.found.fetch_add(1, Ordering::Relaxed);
                self.pieces.arrived(piece);
                return Ok(bytes.into());
            }
            self.counters.damaged.fetch_add(1, Ordering::Relaxed);
            tracing::warn!(piece, "a piece in the cache file was damaged");
            self.on_disk[piece].store(false, Ordering::Release);
            self.used
                .fetch_sub(place.end - place.start, Ordering::Relaxed);
        }
        self.origins.fetch(place.start, &mut bytes, right)?;
        self.counters.fetched.fetch_add(1, Ordering::Relaxed);
        let bytes: Arc<[u8]> = bytes.into();
        self.keep(piece, &bytes);
        Ok(bytes)
    }

    /// The sealed digests of a data piece's blocks; `None` for a piece of leaves.
    fn digests(&self, piece: usize) -> Result<Option<Vec<u8>>, OriginError> {
        if piece >= self.data_pieces() {
            return Ok(None);
        }
        let place = self.place(piece);
        let first = place.start / BLOCK as u64;
        let count = (place.end - place.start) / BLOCK as u64;
        let Some(leaves) = self.tree.leaf_place(first, count) else {
            return Ok(Some(self.tree.only_digest().to_vec()));
        };
        let mut digests = vec![0u8; (leaves.end - leaves.start) as usize];
        let within = leaves.start - self.tree.leaves.start;
        self.read_from(self.data_pieces(), within, &mut digests)
            .map_err(|error| {
                OriginError::All(Box::new(OriginError::Failed {
                    origin: "hash tree".to_owned(),
                    what: error.to_string(),
                }))
            })?;
        Ok(Some(digests))
    }

    /// Keeps a fetched piece in the cache file, or for a while in memory. Failing to is no error.
    fn keep(&self, piece: usize, bytes: &Arc<[u8]>) {
        let len = bytes.len() as u64;
        let written = self.cache.as_ref().is_some_and(|cache| {
            if !self.make_room(cache, len) {
                return false;
            }
            let result = cache.write(piece, self.place(piece).start, bytes);
            if let Err(error) = &result {
                tracing::warn!(%error, "goes on without keeping a piece");
            }
            result.is_ok()
        });
        if written {
            self.on_disk[piece].store(true, Ordering::Release);
            self.used.fetch_add(len, Ordering::Relaxed);
            self.pieces.arrived(piece);
        } else {
            self.counters.not_kept.fetch_add(1, Ordering::Relaxed);
            let mut recent = lock(&self.recent);
            recent.push_back((piece, Arc::clone(bytes)));
            while recent.len() > RECENT {
                recent.pop_front();
            }
        }
    }

    /// Throws pieces out until `len` bytes fit, second chance first. `false` if too many are in use.
    fn make_room(&self, cache: &CacheFile, len: u64) -> bool {
        let mut hand = lock(&self.hand);
        let mut steps = 2 * self.pieces.len() + 1;
        while self.used.load(Ordering::Relaxed) + len > self.limit {
            let Some(left) = steps.checked_sub(1) else {
                return false;
            };
            steps = left;
            let piece = *hand;
            *hand = (*hand + 1) % self.pieces.len();
            if !self.on_disk[piece].load(Ordering::Acquire) {
                continue;
            }
            // Nobody may bring it while its bytes go.
            let Some(landing) = self.lead(piece) else {
                continue;
            };
            if self.pieces.take_away(piece) || !self.pieces.is_here(piece) {
                self.on_disk[piece].store(false, Ordering::Release);
                let place = self.place(piece);
                if let Err(error) = cache.remove(piece, place.start, place.end - place.start) {
                    tracing::warn!(%error, "cannot free a piece of the cache file");
                }
                self.used
                    .fetch_sub(place.end - place.start, Ordering::Relaxed);
                self.counters.evicted.fetch_add(1, Ordering::Relaxed);
            }
            landing.land(Outcome::Again);
        }
        true
    }
}

impl ReadAt for ChunkStore {
    fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buf.len() as u64);
        if end.is_none_or(|end| end > self.sealed.hash_offset) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.read_from(0, offset, buf).map_err(io::Error::other)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.sealed.hash_offset)
    }
}

impl Flight {
    fn wait(&self) -> Outcome {
        let mut outcome = lock(&self.outcome);
        loop {
            if let Some(outcome) = &*outcome {
                return outcome.clone();
            }
            outcome = self
                .landed
                .wait(outcome)
                .unwrap_or_else(std::sync::PoisonError::into_inner);
        }
    }
}

/// The duty to end a flight; given up by a panic, others look again.
struct Landing<'a> {
    store: &'a ChunkStore,
    piece: usize,
    flight: Arc<Flight>,
}

impl Landing<'_> {
    fn land(self, outcome: Outcome) {
        *lock(&self.flight.outcome) = Some(outcome);
    }
}

impl Drop for Landing<'_> {
    fn drop(&mut self) {
        lock(&self.store.flights).remove(&self.piece);
        lock(&self.flight.outcome).get_or_insert(Outcome::Again);
        self.flight.landed.notify_all();
    }
}
