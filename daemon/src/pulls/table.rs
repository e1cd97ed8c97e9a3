//! The pulls there are: those that run, by what they want, and those that ended lately, by id.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use berth_client::api::{Pull, PullState};
use berth_image::{ImageRef, Platform};
use jiff::Timestamp;
use tokio::sync::watch;

/// Ended pulls that can still be asked for.
pub(super) const REMEMBERED: usize = 1000;
/// Of those for which the image was there.
const HITS: usize = 100;

/// What a running pull is for.
pub(super) type Key = (ImageRef, Platform);

/// One pull: how it stands, who asked for it.
#[derive(Debug)]
pub struct Entry {
    news: watch::Sender<Pull>,
    uids: Mutex<BTreeSet<u32>>,
}

impl Entry {
    pub(super) fn new(
        id: String,
        reference: &str,
        platform: &Platform,
        started_at: Timestamp,
        uids: BTreeSet<u32>,
    ) -> Arc<Self> {
        let pull = Pull {
            id,
            reference: reference.to_string(),
            platform: platform.to_string(),
            digest: None,
            state: PullState::Resolving,
            started_at: started_at.to_string(),
            ended_at: None,
            bytes_fetched: 0,
            bytes_total: 0,
            bytes_converted: 0,
            path: None,
            error: None,
        };
        Arc::new(Self {
            news: watch::Sender::new(pull),
            uids: Mutex::new(uids),
        })
    }

    /// One that has ended, as it is remembered.
    pub(super) fn ended(pull: Pull, uids: BTreeSet<u32>) -> Arc<Self> {
        Arc::new(Self {
            news: watch::Sender::new(pull),
            uids: Mutex::new(uids),
        })
    }

    /// Who asked for it.
    pub(super) fn uids(&self) -> BTreeSet<u32> {
        lock(&self.uids).clone()
    }

    /// How it stands.
    pub fn pull(&self) -> Pull {
        self.news.borrow().clone()
    }

    /// How it stands, and news of it.
    pub fn news(&self) -> watch::Receiver<Pull> {
        self.news.subscribe()
    }

    /// Whether `uid` asked for it.
    pub fn is_of(&self, uid: u32) -> bool {
        lock(&self.uids).contains(&uid)
    }

    pub(super) fn join(&self, uid: u32) {
        lock(&self.uids).insert(uid);
    }

    /// Changes how it stands; those who follow hear of it only when something is different.
    pub(super) fn update(&self, change: impl FnOnce(&mut Pull)) {
        self.news.send_if_modified(|pull| {
            let before = pull.clone();
            change(pull);
            *pull != before
        });
    }
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Table {
    by_id: HashMap<String, Arc<Entry>>,
    running: HashMap<Key, Arc<Entry>>,
    ended: VecDeque<String>,
    hits: VecDeque<String>,
    /// Those that failed lately, and when.
    failed: HashMap<Key, (Arc<Entry>, Instant)>,
}

impl Table {
    pub(super) fn get(&self, id: &str) -> Option<Arc<Entry>> {
        self.by_id.get(id).cloned()
    }

    pub(super) fn running(&self, key: &Key) -> Option<Arc<Entry>> {
        self.running.get(key).cloned()
    }

    /// The pull that failed less than `ttl` ago.
    pub(super) fn failed(&mut self, key: &Key, ttl: Duration) -> Option<Arc<Entry>> {
        self.failed.retain(|_, (_, at)| at.elapsed() < ttl);
        self.failed.get(key).map(|(entry, _)| entry.clone())
    }

    pub(super) fn forget_failure(&mut self, key: &Key) {
        self.failed.remove(key);
    }

    pub(super) fn fail(&mut self, key: &Key, entry: &Arc<Entry>) {
        if self.failed.len() < REMEMBERED {
            self.failed
                .insert(key.clone(), (entry.clone(), Instant::now()));
        }
    }

    pub(super) fn running_of(&self, uid: u32) -> usize {
        self.running.values().filter(|e| e.is_of(uid)).count()
    }

    pub(super) fn begin(&mut self, key: Key, entry: &Arc<Entry>) {
        self.running.insert(key, entry.clone());
        self.by_id.insert(entry.pull().id, entry.clone());
    }

    /// The pull has ended, now or in an earlier daemon; it stays known for a while.
    pub(super) fn end(&mut self, key: Option<&Key>, entry: &Arc<Entry>) {
        key.map(|key| self.running.remove(key));
        let id = entry.pull().id;
        self.by_id.insert(id.clone(), entry.clone());
        let forgotten = push(&mut self.ended, id, REMEMBERED);
        forgotten.map(|id| self.by_id.remove(&id));
    }

    /// The pull never had to run: known for a short while, so that such do not push out those that ran.
    pub(super) fn hit(&mut self, entry: &Arc<Entry>) {
        let id = entry.pull().id;
        self.by_id.insert(id.clone(), entry.clone());
        let forgotten = push(&mut self.hits, id, HITS);
        forgotten.map(|id| self.by_id.remove(&id));
    }

    /// Everything, oldest first.
    pub(super) fn all(&self) -> Vec<Arc<Entry>> {
        let mut all: Vec<_> = self.by_id.values().cloned().collect();
        all.sort_by_key(|e| (e.pull().started_at, e.pull().id));
        all
    }

    pub(super) fn in_flight(&self) -> usize {
        self.running.len()
    }
}

/// Adds to a queue of at most `most`; returns what falls out.
fn push(queue: &mut VecDeque<String>, id: String, most: usize) -> Option<String> {
    queue.push_back(id);
    if queue.len() > most {
        queue.pop_front()
    } else {
        None
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
