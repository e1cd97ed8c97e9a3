//! How many requests for image bytes are answered at a time: of one user, and in all. The others wait a little, and
//! are then told to come again (HTTP 429).
//!
//! Of those who wait, whose user holds least is served first, and among equals who asked first. Who has waited for
//! [`GRACE`] takes a turn from who holds most ([`super::shares`]): the answer that has gone on longest breaks off with
//! its connection. So a user who holds none has one after [`GRACE`] and the moment that it takes to close a connection,
//! while fewer than [`IN_ALL`] / 2 users hold turns, whatever they do: read slowly, come back, or both together. A
//! node whose answer was broken off asks for the rest.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::shares::{Cut, Shares};

/// Of one user: a thousand nodes that start one job wait for each other.
const OF_ONE: usize = 128;
/// In all; each holds a buffer of [`super::data::PART`] bytes.
const IN_ALL: usize = 512;
/// Longer than most answers take.
const GRACE: Duration = Duration::from_secs(1);
const WAIT: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub struct Turns {
    state: Arc<Mutex<State>>,
    grace: Duration,
    wait: Duration,
}

#[derive(Debug, Default)]
struct State {
    shares: Shares<u32>,
    /// By user, in the order in which they asked.
    waiting: HashMap<u32, VecDeque<Waiting>>,
    asked: u64,
}

#[derive(Debug)]
struct Waiting {
    number: u64,
    cut: Cut,
    to: oneshot::Sender<Turn>,
}

/// The right to be answered; given back when dropped.
#[derive(Debug)]
pub struct Turn {
    state: Arc<Mutex<State>>,
    uid: u32,
    number: u64,
}

impl Default for Turns {
    fn default() -> Self {
        Self {
            state: Arc::default(),
            grace: GRACE,
            wait: WAIT,
        }
    }
}

impl Turns {
    /// `None` when it takes too long. `cut` ends the connection that is answered.
    pub async fn take(&self, uid: u32, cut: Cut) -> Option<Turn> {
        let (to, mut turn) = oneshot::channel();
        {
            let mut state = lock(&self.state);
            let number = state.asked;
            state.asked += 1;
            let of_user = state.waiting.entry(uid).or_default();
            of_user.push_back(Waiting { number, cut, to });
        }
        serve(&self.state);
        let end = Instant::now() + self.wait;
        loop {
            let next = end.min(Instant::now() + self.grace);
            match tokio::time::timeout_at(next, &mut turn).await {
                Ok(turn) => return turn.ok(),
                Err(_) if Instant::now() >= end => return None,
                Err(_) => lock(&self.state).press(uid),
            }
        }
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hands out what is free. The lock is not held while a turn is handed over, or dropped because nobody waits any more.
fn serve(state: &Arc<Mutex<State>>) {
    loop {
        let next = lock(state).next();
        let Some((uid, number, to)) = next else {
            return;
        };
        let turn = Turn {
            state: Arc::clone(state),
            uid,
            number,
        };
        drop(to.send(turn));
    }
}

impl State {
    fn next(&mut self) -> Option<(u32, u64, oneshot::Sender<Turn>)> {
        self.waiting.retain(|_, of_user| {
            while of_user.front().is_some_and(|first| first.to.is_closed()) {
                of_user.pop_front();
            }
            !of_user.is_empty()
        });
        if self.shares.all() >= IN_ALL {
            return None;
        }
        let rank = |(uid, of_user): &(&u32, &VecDeque<Waiting>)| {
            let first = of_user.front().map(|first| first.number);
            (self.shares.of(uid), first)
        };
        let (uid, _) = (self.waiting.iter())
            .filter(|(uid, _)| self.shares.of(uid) < OF_ONE)
            .min_by_key(rank)?;
        let uid = *uid;
        let first = self.waiting.get_mut(&uid)?.pop_front()?;
        let number = self.shares.add(&uid, first.cut);
        Some((uid, number, first.to))
    }

    /// `uid` has waited: one of who holds most is taken, unless enough are coming free already.
    fn press(&mut self, uid: u32) {
        let waiting: usize = self.waiting.values().map(VecDeque::len).sum();
        if self.shares.all() >= IN_ALL
            && self.shares.taken() < waiting
            && self.shares.take_for(&uid)
        {
            tracing::info!(
                uid,
                "all answers are taken, one of who has most is broken off"
            );
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        lock(&self.state).shares.remove(&self.uid, self.number);
        serve(&self.state);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testbed::SOON;

    fn turns(wait: Duration) -> Turns {
        Turns {
            grace: Duration::from_millis(1),
            wait,
            ..Turns::default()
        }
    }

    #[tokio::test]
    async fn one_user_does_not_take_all_turns() {
        let turns = turns(Duration::from_millis(50));
        let mut taken = Vec::new();
        for _ in 0..OF_ONE {
            taken.push(turns.take(1, Cut::default()).await.unwrap());
        }
        assert!(turns.take(1, Cut::default()).await.is_none());
        assert!(turns.take(2, Cut::default()).await.is_some());
        taken.pop();
        assert!(turns.take(1, Cut::default()).await.is_some());
        drop(taken);
        let state = lock(&turns.state);
        assert_eq!((state.shares.all(), state.shares.peers()), (0, 0));
    }

    /// Readers who never end by themselves, and come back at once when they are broken off.
    fn colluders(turns: &Arc<Turns>) -> Vec<tokio::task::JoinHandle<()>> {
        let reader = |uid: u32| {
            let turns = Arc::clone(turns);
            async move {
                loop {
                    let cut = Cut::default();
                    if let Some(turn) = turns.take(uid, cut.clone()).await {
                        cut.wait().await;
                        drop(turn);
                    }
                }
            }
        };
        // Twice as many as get turns.
        let uids = (0..2 * IN_ALL as u32).map(|n| n % 4);
        uids.map(|uid| tokio::spawn(reader(uid))).collect()
    }

    #[tokio::test]
    async fn users_who_hold_all_turns_together_and_come_back_do_not_keep_another_out() {
        let turns = Arc::new(turns(SOON));
        let colluders = colluders(&turns);
        let full = async {
            while lock(&turns.state).shares.all() < IN_ALL {
                tokio::task::yield_now().await;
            }
        };
        tokio::time::timeout(SOON, full).await.unwrap();
        let mut mine = Vec::new();
        // An equal share of it.
        for _ in 0..IN_ALL / 5 {
            mine.push(turns.take(1000, Cut::default()).await.expect("in time"));
            assert!(lock(&turns.state).shares.all() <= IN_ALL);
        }
        // And who comes and goes gets one each time.
        mine.clear();
        for _ in 0..100 {
            assert!(turns.take(1001, Cut::default()).await.is_some());
        }
        for colluder in colluders {
            colluder.abort();
        }
    }

    #[tokio::test]
    async fn of_those_who_wait_who_holds_least_goes_first() {
        let turns = turns(SOON);
        let mut held = Vec::new();
        for n in 0..IN_ALL as u32 {
            held.push(turns.take(n % 5, Cut::default()).await.unwrap());
        }
        // What is polled below by hand is polled with a whole budget.
        tokio::task::yield_now().await;
        // 102 or 103 each: none of the five can take of another, whoever asks.
        let mut many = Box::pin(turns.take(0, Cut::default()));
        let mut few = Box::pin(turns.take(9, Cut::default()));
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        assert!(many.as_mut().poll(&mut context).is_pending());
        assert!(few.as_mut().poll(&mut context).is_pending());
        held.pop();
        let few = few.as_mut().poll(&mut context);
        assert!(matches!(few, std::task::Poll::Ready(Some(_))));
        assert!(many.as_mut().poll(&mut context).is_pending());
    }
}
