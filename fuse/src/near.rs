//! Keeps workers beside a lone reader.
//!
//! A reader that asks one small thing after another waits for each answer. Where its worker runs on another CPU, both
//! CPUs fall asleep in turn and are woken by an interrupt, which takes many times longer than the answer. On one CPU
//! they take turns. So after some such requests of a reader that is bound to CPUs of its own, as a job's tasks are, the
//! workers go there too; its neighbours' CPUs are left alone. Where a reader that may run anywhere is, FUSE does not say,
//! and the scheduler wakes it on another CPU than the one on which its worker is busy: it is served from anywhere.
//!
//! Bytes of files are another matter: reading ahead, the kernel wants the next of them while its reader works on the
//! last ones. After them, a second request at a time, another reader or a pause, each worker goes anywhere again with the
//! request that it answers next.
//!
//! Until then it is asleep on a CPU that its user may crowd as he likes. So this is for connections that one user reads
//! (`Options::beside_reader`); once a server has seen two there, it binds nobody any more. Root is not counted, who makes
//! the mounts of jobs, and in whose name a filesystem that is stacked on one looks things up.
//!
//! Locking: not held while a thread binds itself, which goes on only when it gets a turn on that CPU.

use std::sync::Mutex;
use std::time::{Duration, Instant};

use rustix::process::{Pid, getpid};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use crate::abi::{Request, op};
use crate::lock;

/// So many small requests after a first one make a lone reader; after as many more it is looked for again.
const LONE: u32 = 8;
/// Between two requests of a lone reader at most.
const PAUSE: Duration = Duration::from_millis(50);

/// What the workers of a connection agree on.
#[derive(Debug)]
pub(crate) struct Near(Mutex<State>);

#[derive(Debug)]
struct State {
    /// The one that reads here, root apart, and whether there was another.
    user: Option<u32>,
    is_shared: bool,
    /// The thread that asked last, and when.
    reader: u32,
    last: Instant,
    /// Small requests of that thread, one after another, since it was looked for.
    lone: u32,
    place: Option<CpuSet>,
    /// Grows with every change of `place`.
    changes: u64,
}

/// As of which change a worker is bound.
#[derive(Debug)]
pub(crate) struct Seat(u64);

impl Near {
    pub(crate) fn new(beside_reader: bool) -> Self {
        Self(Mutex::new(State {
            user: None,
            is_shared: !beside_reader,
            reader: 0,
            last: Instant::now(),
            lone: 0,
            place: None,
            changes: 0,
        }))
    }

    /// For a new worker.
    pub(crate) fn seat(&self) -> Seat {
        if lock(&self.0).changes != 0 {
            // It has inherited where the one that started it is bound.
            anywhere();
        }
        Seat(0)
    }

    /// A worker has taken a request, while others were or were not in work.
    pub(crate) fn taken(&self, request: &Request<'_>, at: Instant, others: bool, seat: &mut Seat) {
        let mut state = lock(&self.0);
        let asks = !others && request.opcode != op::READ;
        if state.is_lone(request.pid, request.uid, at, asks) {
            let place = beside(request.pid);
            state.go(place);
        }
        let (place, changes) = (state.place, state.changes);
        drop(state);
        if std::mem::replace(&mut seat.0, changes) != changes {
            bind(place);
        }
    }
}

impl State {
    /// Counts a request, which asks something small or not; whether it is time to look where its reader is.
    fn is_lone(&mut self, reader: u32, user: u32, at: Instant, asks: bool) -> bool {
        if user != 0 && *self.user.get_or_insert(user) != user {
            self.is_shared = true;
        }
        let pause = at.saturating_duration_since(self.last) > PAUSE;
        self.last = at;
        let another = std::mem::replace(&mut self.reader, reader) != reader;
        if !asks || pause || another || self.is_shared {
            self.lone = 0;
            self.go(None);
            return false;
        }
        self.lone = self.lone % LONE + 1;
        self.lone == LONE
    }

    fn go(&mut self, place: Option<CpuSet>) {
        if self.place != place {
            self.place = place;
            self.changes += 1;
        }
    }
}

/// Lets this thread go anywhere. Threads of ours that a worker may start begin so: they inherit where that is bound.
pub(crate) fn anywhere() {
    bind(None);
}

/// Where this process may run: its first thread is never bound by us.
fn all() -> Option<CpuSet> {
    sched_getaffinity(Some(getpid())).ok()
}

/// The CPUs of a reader that is bound to some of ours.
fn beside(reader: u32) -> Option<CpuSet> {
    // As numbered where the mount was made; from somewhere else it names another thread, and this place is no better
    // than any other.
    let reader = Pid::from_raw(i32::try_from(reader).ok()?)?;
    let (all, theirs) = (all()?, sched_getaffinity(Some(reader)).ok()?);
    let mut both = CpuSet::new();
    (0..CpuSet::MAX_CPU)
        .filter(|cpu| all.is_set(*cpu) && theirs.is_set(*cpu))
        .for_each(|cpu| both.set(cpu));
    (both.count() > 0 && both != all).then_some(both)
}

/// Binds this thread to a place, without one to all that this process may use.
fn bind(place: Option<CpuSet>) {
    if let Some(cpus) = place.or_else(all)
        && let Err(error) = sched_setaffinity(None, &cpus)
    {
        // Those CPUs are ours no more: then it is as it was.
        tracing::debug!(%error, "not bound");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: (u32, u32) = (11, 1);
    const B: (u32, u32) = (22, 2);

    struct Clock(Instant);

    impl Clock {
        fn after(&mut self, pause: Duration) -> Instant {
            self.0 += pause;
            self.0
        }
    }

    /// How many of so many requests in a row make it time to look.
    fn asks(state: &mut State, clock: &mut Clock, (reader, user): (u32, u32), count: u32) -> u32 {
        let mut asks = || state.is_lone(reader, user, clock.after(PAUSE / 2), true);
        (0..count).map(|_| u32::from(asks())).sum()
    }

    fn new() -> (State, Clock) {
        let state = Near::new(true).0.into_inner().unwrap();
        let clock = Clock(state.last);
        (state, clock)
    }

    #[test]
    fn who_asks_alone_for_small_things_is_lone_and_looked_for_again() {
        let (mut state, mut clock) = new();
        assert_eq!(asks(&mut state, &mut clock, A, LONE), 0);
        assert_eq!(asks(&mut state, &mut clock, A, 1), 1);
        assert_eq!(asks(&mut state, &mut clock, A, 5 * LONE), 5);
    }

    #[test]
    fn bytes_others_and_pauses_end_it() {
        let end_it: [fn(&mut State, &mut Clock); 3] = [
            |state, clock| assert!(!state.is_lone(A.0, A.1, clock.after(Duration::ZERO), false)),
            |state, clock| assert_eq!(asks(state, clock, (A.0 + 1, A.1), 1), 0),
            |state, clock| assert!(!state.is_lone(A.0, A.1, clock.after(PAUSE * 2), true)),
        ];
        for end in end_it {
            let (mut state, mut clock) = new();
            asks(&mut state, &mut clock, A, 2 * LONE);
            state.go(Some(CpuSet::new()));
            end(&mut state, &mut clock);
            assert_eq!(state.place, None);
            assert_eq!(asks(&mut state, &mut clock, A, LONE - 1), 0);
        }
    }

    #[test]
    fn users_who_share_a_mount_are_served_from_anywhere() {
        let (mut state, mut clock) = new();
        // Root makes the mount and looks at it.
        asks(&mut state, &mut clock, (1, 0), 2);
        assert_eq!(asks(&mut state, &mut clock, A, 2 * LONE), 1);
        state.go(Some(CpuSet::new()));
        asks(&mut state, &mut clock, B, 1);
        assert_eq!(state.place, None);
        assert_eq!(asks(&mut state, &mut clock, A, 10 * LONE), 0);
    }
}
