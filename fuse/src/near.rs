//! Keeps workers beside a lone reader.
//!
//! A reader that asks one small thing after another waits for each answer. Where its worker runs on another CPU, both
//! CPUs fall asleep in turn and are woken by an interrupt, which takes many times longer than the answer. On one CPU
//! they take turns. So after some such requests of a reader that is bound to CPUs of its own, as a job's tasks are, the
//! workers go there too; its neighbours' CPUs are left alone. Where a reader that may run anywhere is, FUSE does not say,
//! and the scheduler wakes it on another CPU than the one on which its worker is busy: it is served from anywhere.
//!
//! Bytes of files are another matter: reading ahead, the kernel wants the next of them while its reader works on the
//! last ones. They, a second request at a time and a pause let the workers go anywhere again.

use std::sync::{Mutex, OnceLock};
use std::time::{Duration, Instant};

use rustix::process::Pid;
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::abi::{Request, op};
use crate::lock;

/// So many small requests one after another make a lone reader.
const LONE: u32 = 8;
/// Between two requests of one reader at most.
const PAUSE: Duration = Duration::from_millis(50);

/// Where this process may run, asked before any thread was bound.
static ALL: OnceLock<Option<CpuSet>> = OnceLock::new();

/// What the workers of a connection agree on.
#[derive(Debug)]
pub(crate) struct Near(Mutex<State>);

#[derive(Debug)]
struct State {
    /// Small requests one after another.
    lone: u32,
    last: Instant,
    reader: u32,
    place: Option<CpuSet>,
    /// Grows with every change of `place`.
    changes: u64,
}

/// Where a worker is bound, as of which change.
#[derive(Debug)]
pub(crate) struct Seat(u64);

impl Near {
    pub(crate) fn new() -> Self {
        ALL.get_or_init(|| sched_getaffinity(None).ok());
        Self(Mutex::new(State {
            lone: 0,
            last: Instant::now(),
            reader: 0,
            place: None,
            changes: 0,
        }))
    }

    /// A worker has taken a request, while others were or were not in work.
    pub(crate) fn taken(&self, request: &Request<'_>, at: Instant, others: bool, seat: &mut Seat) {
        let mut state = lock(&self.0);
        let pause = at.saturating_duration_since(state.last) > PAUSE;
        state.last = at;
        let another = std::mem::replace(&mut state.reader, request.pid) != request.pid;
        if others || pause || another || request.opcode == op::READ {
            state.lone = 0;
            state.go(None);
        } else {
            state.lone = state.lone.saturating_add(1);
            if state.lone == LONE {
                state.go(beside(request.pid));
            }
        }
        if seat.0 != state.changes {
            *seat = state.sit();
        }
    }

    /// For a new worker.
    pub(crate) fn seat(&self) -> Seat {
        lock(&self.0).sit()
    }
}

impl State {
    fn go(&mut self, place: Option<CpuSet>) {
        if self.place != place {
            self.place = place;
            self.changes += 1;
        }
    }

    /// Binds this thread.
    fn sit(&self) -> Seat {
        bind(self.place.as_ref());
        Seat(self.changes)
    }
}

/// To be called first by every thread that a worker may start: it inherits where that is bound.
pub(crate) fn anywhere() {
    bind(None);
}

/// The CPUs of a reader that is bound to some of ours.
fn beside(reader: u32) -> Option<CpuSet> {
    let all = ALL.get()?.as_ref()?;
    // Also of another user's thread. One that cannot be named from here is served from anywhere.
    let reader = Pid::from_raw(i32::try_from(reader).ok()?)?;
    let theirs = sched_getaffinity(Some(reader)).ok()?;
    let mut both = CpuSet::new();
    (0..CpuSet::MAX_CPU)
        .filter(|cpu| all.is_set(*cpu) && theirs.is_set(*cpu))
        .for_each(|cpu| both.set(cpu));
    (both.count() > 0 && both != *all).then_some(both)
}

fn bind(place: Option<&CpuSet>) {
    let all = ALL.get().and_then(Option::as_ref);
    if let Some(cpus) = place.or(all)
        && let Err(error) = sched_setaffinity(None, cpus)
    {
        // Our cgroup has lost those CPUs: then it is as it was.
        tracing::debug!(%error, "not bound");
    }
}
