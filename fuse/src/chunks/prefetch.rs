//! Bringing chunks before somebody reads them: what a reader in order is likely to read next, what a trace says, and
//! the rest of the image where the site wants that.
//!
//! A few threads of each image, started when there is work and ended when there has been none for a while. What is
//! ahead of a reader goes first; while readers wait for bytes a plan goes on with fewer threads.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak};
use std::time::{Duration, Instant};

use super::store::ChunkStore;
use super::trace::MOST_OF_A_FETCH;
use super::tree::Chunks;
use crate::{lock, near};

/// Threads an image.
const WORKERS: usize = 4;
/// An idle thread ends after this time.
const IDLE: Duration = Duration::from_secs(5);
/// Most fetches ahead of readers that are remembered.
const MOST_AHEAD: usize = 64;
/// How long a plan gives way to readers before it looks again.
const GIVE_WAY: Duration = Duration::from_millis(2);
/// After a failed fetch a plan rests.
const REST: Duration = Duration::from_secs(1);

/// How fast a plan is carried out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pace {
    /// Most bytes a second; `None` is as many as come.
    pub bytes_per_s: Option<u64>,
    /// It comes after other plans, and gives way to readers with all threads but one; else with half of them.
    pub last: bool,
}

#[derive(Debug)]
struct Plan {
    runs: VecDeque<Range<u32>>,
    pace: Pace,
    next_at: Instant,
    working: usize,
    id: u64,
}

#[derive(Debug, Default)]
struct Queue {
    ahead: VecDeque<Range<u32>>,
    plans: Vec<Plan>,
    plans_made: u64,
    workers: usize,
    stopped: bool,
}

/// An image's background work.
#[derive(Debug, Default)]
pub(super) struct Background {
    queue: Mutex<Queue>,
    news: Condvar,
    /// Readers that wait for bytes.
    demand: AtomicUsize,
}

/// What came of a fetch ahead.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Brought {
    All,
    /// No source had it in time.
    NotYet,
    /// There is no room for it: more would be thrown away too.
    NotKept,
}

enum Work {
    Fetch(Range<u32>, Option<u64>),
    Wait(Duration),
    Nothing,
}

/// A reader waits as long as this lives.
#[derive(Debug)]
pub(super) struct Demand<'a>(&'a Background);

impl Drop for Demand<'_> {
    fn drop(&mut self) {
        self.0.demand.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Background {
    pub(super) fn demand(&self) -> Demand<'_> {
        self.demand.fetch_add(1, Ordering::Relaxed);
        Demand(self)
    }

    /// Fetches a range ahead of a reader.
    pub(super) fn ahead(self: &Arc<Self>, store: &Weak<ChunkStore>, range: Range<u32>) {
        let mut queue = lock(&self.queue);
        for run in split(range) {
            if queue.ahead.len() < MOST_AHEAD {
                queue.ahead.push_back(run);
            }
        }
        self.staff(queue, store);
    }

    /// Carries out a plan.
    pub(super) fn plan(
        self: &Arc<Self>,
        store: &Weak<ChunkStore>,
        runs: VecDeque<Range<u32>>,
        pace: Pace,
    ) {
        let mut queue = lock(&self.queue);
        queue.plans_made += 1;
        let id = queue.plans_made;
        queue.plans.push(Plan {
            runs,
            pace,
            next_at: Instant::now(),
            working: 0,
            id,
        });
        self.staff(queue, store);
    }

    fn staff(
        self: &Arc<Self>,
        mut queue: std::sync::MutexGuard<'_, Queue>,
        store: &Weak<ChunkStore>,
    ) {
        let runs: usize = queue.plans.iter().map(|plan| plan.runs.len()).sum();
        let wanted = (queue.ahead.len() + runs).min(WORKERS);
        while queue.workers < wanted && !queue.stopped {
            let (mine, store) = (Arc::clone(self), Weak::clone(store));
            let started = std::thread::Builder::new()
                .name("ahead".to_owned())
                .spawn(move || {
                    near::anywhere();
                    mine.work(&store);
                });
            if let Err(error) = started {
                tracing::warn!(%error, "cannot fetch ahead");
                break;
            }
            queue.workers += 1;
        }
        drop(queue);
        self.news.notify_all();
    }

    /// Waits; whether the image was closed meanwhile.
    pub(super) fn stopped_within(&self, time: Duration) -> bool {
        let queue = lock(&self.queue);
        let waited = self
            .news
            .wait_timeout_while(queue, time, |queue| !queue.stopped);
        let (queue, _) = waited.unwrap_or_else(std::sync::PoisonError::into_inner);
        queue.stopped
    }

    /// Ends the threads.
    pub(super) fn stop(&self) {
        lock(&self.queue).stopped = true;
        self.news.notify_all();
    }

    fn work(&self, store: &Weak<ChunkStore>) {
        let mut queue = lock(&self.queue);
        let mut idle_since = Instant::now();
        loop {
            if queue.stopped {
                break;
            }
            let wait = match self.next(&mut queue) {
                Work::Fetch(run, plan) => {
                    drop(queue);
                    let brought = match store.upgrade() {
                        Some(store) => store.bring_ahead(run.clone()),
                        None => return,
                    };
                    queue = lock(&self.queue);
                    let plan = plan.and_then(|id| queue.plans.iter_mut().find(|p| p.id == id));
                    if let Some(plan) = plan {
                        plan.working -= 1;
                        match brought {
                            Brought::All => {}
                            Brought::NotYet => {
                                plan.runs.push_front(run);
                                plan.next_at = Instant::now() + REST;
                            }
                            Brought::NotKept => plan.runs.clear(),
                        }
                    }
                    idle_since = Instant::now();
                    continue;
                }
                Work::Wait(time) => time,
                Work::Nothing => match IDLE.checked_sub(idle_since.elapsed()) {
                    Some(left) if !left.is_zero() => left,
                    _ => break,
                },
            };
            queue = self
                .news
                .wait_timeout(queue, wait)
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .0;
        }
        queue.workers -= 1;
    }

    fn next(&self, queue: &mut Queue) -> Work {
        if let Some(run) = queue.ahead.pop_front() {
            return Work::Fetch(run, None);
        }
        queue
            .plans
            .retain(|plan| plan.working > 0 || !plan.runs.is_empty());
        let demand = self.demand.load(Ordering::Relaxed) > 0;
        let now = Instant::now();
        let mut wait = None;
        // A plan that gives way to all comes after the others, by the order of `last`.
        queue.plans.sort_by_key(|plan| (plan.pace.last, plan.id));
        for plan in &mut queue.plans {
            let most = match (demand, plan.pace.last) {
                (false, _) => WORKERS,
                (true, false) => WORKERS / 2,
                (true, true) => 1,
            };
            let gives_way = plan.working >= most;
            if plan.runs.is_empty() {
                continue;
            }
            if gives_way || plan.next_at > now {
                let left = plan.next_at.saturating_duration_since(now).max(GIVE_WAY);
                wait = Some(wait.map_or(left, |wait: Duration| wait.min(left)));
                continue;
            }
            let Some(run) = plan.runs.pop_front() else {
                continue;
            };
            if let Some(rate) = plan.pace.bytes_per_s {
                let bytes = run.len() as u64 * super::CHUNK;
                plan.next_at = now + Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
            }
            plan.working += 1;
            return Work::Fetch(run, Some(plan.id));
        }
        wait.map_or(Work::Nothing, Work::Wait)
    }
}

/// In fetches of a size at which the next one may come first.
fn split(range: Range<u32>) -> impl Iterator<Item = Range<u32>> {
    let end = range.end;
    let starts = range.step_by(MOST_OF_A_FETCH as usize);
    starts.map(move |from| from..(from + MOST_OF_A_FETCH).min(end))
}

/// All of an image, leaves first.
pub(super) fn everything(chunks: &Chunks) -> VecDeque<Range<u32>> {
    split(chunks.data_count..chunks.count)
        .chain(split(0..chunks.data_count))
        .collect()
}
