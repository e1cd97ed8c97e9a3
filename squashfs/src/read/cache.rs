//! A byte-bounded cache of decoded blocks, with one load of a block however many readers want it.
//!
//! Eviction is S3-FIFO (Yang et al., SOSP 2023): a small queue that most blocks pass through once, a main queue for
//! what is asked for again, and a ghost list of keys lately thrown out of the small one. A scan of a big file thus
//! does not push out the blocks that every start reads.
//!
//! Locking: one mutex a shard, never held while a block is loaded; a flight's own lock is taken after it was let go.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{BuildHasher, Hash, RandomState};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

use super::error::ReadError;

/// What the cache holds: something with a size in bytes.
pub(crate) trait Weigh {
    fn weight(&self) -> usize;
}

/// Bookkeeping a block costs beside its bytes: map slot, queue slot, allocation headers.
const OVERHEAD: usize = 128;
/// Accesses remembered per block; S3-FIFO needs two bits.
const MAX_FREQ: u8 = 3;

type Loaded<V> = Result<Arc<V>, ReadError>;

#[derive(Debug)]
struct Flight<V> {
    outcome: Mutex<Option<Loaded<V>>>,
    landed: Condvar,
}

#[derive(Debug)]
enum Slot<V> {
    Ready { value: Arc<V>, freq: u8 },
    Loading(Arc<Flight<V>>),
}

#[derive(Debug)]
struct Shard<K, V> {
    slots: HashMap<K, Slot<V>>,
    small: VecDeque<K>,
    main: VecDeque<K>,
    ghosts: VecDeque<K>,
    ghost_set: HashSet<K>,
    small_bytes: usize,
    main_bytes: usize,
}

/// See the module's head.
#[derive(Debug)]
pub(crate) struct BlockCache<K, V> {
    shards: Box<[Mutex<Shard<K, V>>]>,
    hasher: RandomState,
    shard_budget: usize,
}

impl<K: Hash + Eq + Copy, V: Weigh> BlockCache<K, V> {
    /// A cache of at most `budget` bytes for blocks of about `block` bytes.
    pub(crate) fn new(budget: usize, block: usize) -> Self {
        // A shard must hold a fair number of blocks, or sharding evicts what is hot.
        let shards = (budget / (block.max(1) * 32)).clamp(1, 16);
        let shard = || {
            Mutex::new(Shard {
                slots: HashMap::new(),
                small: VecDeque::new(),
                main: VecDeque::new(),
                ghosts: VecDeque::new(),
                ghost_set: HashSet::new(),
                small_bytes: 0,
                main_bytes: 0,
            })
        };
        Self {
            shards: (0..shards).map(|_| shard()).collect(),
            hasher: RandomState::new(),
            shard_budget: budget / shards,
        }
    }

    /// The block `key`, loaded by `load` if it is not here. Callers that come while it is being loaded wait for that
    /// one load and share its outcome; a failure is not kept.
    pub(crate) fn get_or_load(
        &self,
        key: K,
        load: impl FnOnce() -> Result<V, ReadError>,
    ) -> Loaded<V> {
        let landing = match self.board(key) {
            Boarding::Here(value) => return Ok(value),
            Boarding::Wait(flight) => return flight.wait(),
            Boarding::Lead(landing) => landing,
        };
        let outcome = load().map(Arc::new);
        landing.land(outcome.clone());
        outcome
    }

    /// Like [`Self::get_or_load`] for a caller with a place of its own for the decoded bytes: `load` fills `out`
    /// directly and nothing is kept, unless others came to wait meanwhile: they get what `keep` makes of it. When the
    /// block is here already, `copy` brings it to `out`.
    pub(crate) fn load_into(
        &self,
        key: K,
        out: &mut [u8],
        load: impl FnOnce(&mut [u8]) -> Result<(), ReadError>,
        keep: impl FnOnce(&[u8]) -> V,
        copy: impl FnOnce(&V, &mut [u8]) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        let landing = match self.board(key) {
            Boarding::Here(value) => return copy(&value, out),
            Boarding::Wait(flight) => return copy(&*flight.wait()?, out),
            Boarding::Lead(landing) => landing,
        };
        if let Err(error) = load(out) {
            landing.land(Err(error.clone()));
            return Err(error);
        }
        if let Some(landing) = landing.leave_if_alone() {
            landing.land(Ok(Arc::new(keep(out))));
        }
        Ok(())
    }

    fn board(&self, key: K) -> Boarding<'_, K, V> {
        let mut shard = lock(self.shard(&key));
        match shard.slots.entry(key) {
            Entry::Occupied(mut slot) => match slot.get_mut() {
                Slot::Ready { value, freq } => {
                    *freq = (*freq + 1).min(MAX_FREQ);
                    Boarding::Here(Arc::clone(value))
                }
                Slot::Loading(flight) => Boarding::Wait(Arc::clone(flight)),
            },
            Entry::Vacant(slot) => {
                let flight = Arc::new(Flight {
                    outcome: Mutex::new(None),
                    landed: Condvar::new(),
                });
                slot.insert(Slot::Loading(Arc::clone(&flight)));
                Boarding::Lead(Landing {
                    cache: self,
                    key,
                    flight: Some(flight),
                })
            }
        }
    }

    #[cfg(test)]
    fn get(&self, key: &K) -> Option<Arc<V>> {
        match lock(self.shard(key)).slots.get_mut(key) {
            Some(Slot::Ready { value, freq }) => {
                *freq = (*freq + 1).min(MAX_FREQ);
                Some(Arc::clone(value))
            }
            _ => None,
        }
    }

    fn shard(&self, key: &K) -> &Mutex<Shard<K, V>> {
        // The low bits choose the map's bucket; take others.
        let hash = self.hasher.hash_one(key) >> 32;
        &self.shards[(hash as usize) % self.shards.len()]
    }

    #[cfg(test)]
    fn bytes(&self) -> usize {
        self.shards
            .iter()
            .map(|shard| {
                let shard = lock(shard);
                shard.small_bytes + shard.main_bytes
            })
            .sum()
    }
}

impl<V> Flight<V> {
    fn wait(&self) -> Loaded<V> {
        let mut outcome = lock(&self.outcome);
        loop {
            if let Some(outcome) = &*outcome {
                return outcome.clone();
            }
            outcome = self
                .landed
                .wait(outcome)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

enum Boarding<'a, K: Hash + Eq + Copy, V: Weigh> {
    Here(Arc<V>),
    Wait(Arc<Flight<V>>),
    Lead(Landing<'a, K, V>),
}

/// The duty to end a flight, also when its loader panics: those who wait must never wait for ever.
struct Landing<'a, K: Hash + Eq + Copy, V: Weigh> {
    cache: &'a BlockCache<K, V>,
    key: K,
    flight: Option<Arc<Flight<V>>>,
}

impl<K: Hash + Eq + Copy, V: Weigh> Landing<'_, K, V> {
    fn land(mut self, outcome: Loaded<V>) {
        self.finish(outcome);
    }

    /// Ends the flight without keeping anything, if nobody waits for it.
    fn leave_if_alone(mut self) -> Option<Self> {
        let mut shard = lock(self.cache.shard(&self.key));
        // The map and this duty hold the flight; new holders come only under the shard's lock.
        let alone = self
            .flight
            .as_ref()
            .is_some_and(|flight| Arc::strong_count(flight) == 2);
        if !alone {
            drop(shard);
            return Some(self);
        }
        shard.slots.remove(&self.key);
        drop(shard);
        self.flight = None;
        None
    }

    fn finish(&mut self, outcome: Loaded<V>) {
        let Some(flight) = self.flight.take() else {
            return;
        };
        {
            let mut shard = lock(self.cache.shard(&self.key));
            shard.slots.remove(&self.key);
            if let Ok(value) = &outcome {
                shard.insert(self.key, Arc::clone(value), self.cache.shard_budget);
            }
        }
        *lock(&flight.outcome) = Some(outcome);
        flight.landed.notify_all();
    }
}

impl<K: Hash + Eq + Copy, V: Weigh> Drop for Landing<'_, K, V> {
    fn drop(&mut self) {
        self.finish(Err(ReadError::corrupt("block decoder failed", 0)));
    }
}

impl<K: Hash + Eq + Copy, V: Weigh> Shard<K, V> {
    fn insert(&mut self, key: K, value: Arc<V>, budget: usize) {
        let weight = value.weight() + OVERHEAD;
        if weight > budget {
            return;
        }
        if self.ghost_set.remove(&key) {
            self.main.push_back(key);
            self.main_bytes += weight;
        } else {
            self.small.push_back(key);
            self.small_bytes += weight;
        }
        self.slots.insert(key, Slot::Ready { value, freq: 0 });
        while self.small_bytes + self.main_bytes > budget {
            if self.small_bytes > budget / 10 || self.main.is_empty() {
                self.evict_small(budget);
            } else {
                self.evict_main();
            }
        }
    }

    fn evict_small(&mut self, budget: usize) {
        let Some(key) = self.small.pop_front() else {
            return;
        };
        let Some(Slot::Ready { value, freq }) = self.slots.get_mut(&key) else {
            return;
        };
        let weight = value.weight() + OVERHEAD;
        self.small_bytes -= weight;
        if *freq > 0 {
            *freq = 0;
            self.main.push_back(key);
            self.main_bytes += weight;
            return;
        }
        self.slots.remove(&key);
        if self.ghost_set.insert(key) {
            self.ghosts.push_back(key);
        }
        // As many ghosts as blocks fit, roughly.
        let most = (budget / weight).max(16);
        while self.ghosts.len() > most {
            if let Some(old) = self.ghosts.pop_front() {
                self.ghost_set.remove(&old);
            }
        }
    }

    fn evict_main(&mut self) {
        let Some(key) = self.main.pop_front() else {
            return;
        };
        let Some(Slot::Ready { value, freq }) = self.slots.get_mut(&key) else {
            return;
        };
        if *freq > 0 {
            *freq -= 1;
            self.main.push_back(key);
        } else {
            self.main_bytes -= value.weight() + OVERHEAD;
            self.slots.remove(&key);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Every update of a shard is complete before anything that could panic.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Barrier;
    use std::sync::atomic::{AtomicUsize, Ordering};

    impl Weigh for Vec<u8> {
        fn weight(&self) -> usize {
            self.len()
        }
    }

    #[test]
    fn one_load_for_many_readers() {
        let cache: BlockCache<u64, Vec<u8>> = BlockCache::new(1 << 20, 4096);
        let loads = AtomicUsize::new(0);
        let start = Barrier::new(16);
        std::thread::scope(|scope| {
            for _ in 0..16 {
                scope.spawn(|| {
                    start.wait();
                    let block = cache
                        .get_or_load(7, || {
                            loads.fetch_add(1, Ordering::SeqCst);
                            Ok(vec![7; 4096])
                        })
                        .unwrap();
                    assert_eq!(block.len(), 4096);
                });
            }
        });
        assert_eq!(loads.load(Ordering::SeqCst), 1);
    }

    #[test]
    fn stays_within_its_budget_and_keeps_what_is_hot() {
        let cache: BlockCache<u64, Vec<u8>> = BlockCache::new(64 * 4096, 4096);
        for round in 0..3 {
            for key in 0..8 {
                cache.get_or_load(key, || Ok(vec![round; 4000])).unwrap();
            }
        }
        for key in 1000..3000 {
            cache.get_or_load(key, || Ok(vec![0; 4000])).unwrap();
            assert!(cache.bytes() <= 64 * 4096);
        }
        let hot = (0..8).filter(|key| cache.get(key).is_some()).count();
        assert_eq!(hot, 8, "a scan pushed out hot blocks");
    }

    #[test]
    fn a_block_read_in_place_is_kept_only_for_those_who_wait() {
        let cache: BlockCache<u64, Vec<u8>> = BlockCache::new(1 << 20, 4096);
        let fill = |out: &mut [u8]| {
            out.fill(5);
            Ok(())
        };
        let copy = |block: &Vec<u8>, out: &mut [u8]| {
            out.copy_from_slice(block);
            Ok(())
        };
        let mut out = [0; 16];
        cache
            .load_into(3, &mut out, fill, |out| out.to_vec(), copy)
            .unwrap();
        assert_eq!(out, [5; 16]);
        assert_eq!(cache.bytes(), 0);

        let waiting = Barrier::new(2);
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| {
                waiting.wait();
                cache.get_or_load(3, || Ok(vec![9; 16])).unwrap().to_vec()
            });
            let slow = |out: &mut [u8]| {
                waiting.wait();
                let bound = std::time::Instant::now() + std::time::Duration::from_secs(10);
                let boarded = || {
                    let shard = lock(cache.shard(&3));
                    matches!(&shard.slots[&3], Slot::Loading(f) if Arc::strong_count(f) > 2)
                };
                while !boarded() && std::time::Instant::now() < bound {
                    std::thread::yield_now();
                }
                out.fill(6);
                Ok(())
            };
            let mut out = [0; 16];
            cache
                .load_into(3, &mut out, slow, |out| out.to_vec(), copy)
                .unwrap();
            assert_eq!(waiter.join().unwrap(), vec![6; 16]);
        });
        assert!(cache.get(&3).is_some());
    }

    #[test]
    fn a_failed_load_is_shared_and_forgotten() {
        let cache: BlockCache<u64, Vec<u8>> = BlockCache::new(1 << 20, 4096);
        assert!(
            cache
                .get_or_load(1, || Err(ReadError::corrupt("test", 1)))
                .is_err()
        );
        assert!(cache.get_or_load(1, || Ok(vec![1])).is_ok());
    }

    #[test]
    fn a_panicking_loader_frees_those_who_wait() {
        let cache: BlockCache<u64, Vec<u8>> = BlockCache::new(1 << 20, 4096);
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _ = cache.get_or_load(1, || panic!("boom"));
        }));
        assert!(panicked.is_err());
        assert!(cache.get_or_load(1, || Ok(vec![1])).is_ok());
    }

    #[test]
    fn a_block_bigger_than_the_budget_is_served_and_not_kept() {
        let cache: BlockCache<u64, Vec<u8>> = BlockCache::new(1024, 4096);
        assert_eq!(
            cache.get_or_load(1, || Ok(vec![1; 4096])).unwrap().len(),
            4096
        );
        assert_eq!(cache.bytes(), 0);
    }
}
