//! Slots shared fairly: of those who wait, whoever's user, and then registry, holds least is served first, and among
//! equals who asked first. Work that waits for a slow registry lends its slot to those who wait behind it, so that
//! slots are held by work that moves.
//!
//! Invariant: never more than `slots` turns that are not lent, and never more than [`LENT`] times as many that are.
//! Locking: the lock is never held while a turn is handed over or dropped.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::oneshot;

/// Lent turns for each slot.
const LENT: usize = 4;
/// How often slow work is looked at.
const LOOK: Duration = Duration::from_secs(10);

/// For whom a slot is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Asker {
    pub uid: u32,
    pub registry: String,
}

/// The slots. Clones share them.
#[derive(Debug, Clone)]
pub struct Turns {
    state: Arc<Mutex<State>>,
}

#[derive(Debug)]
struct State {
    slots: usize,
    free: usize,
    lent: usize,
    by_uid: HashMap<u32, usize>,
    by_registry: HashMap<String, usize>,
    /// In the order in which they asked.
    waiting: Vec<(Asker, oneshot::Sender<Turn>)>,
}

/// A slot, given back when dropped.
#[derive(Debug)]
pub struct Turn {
    turns: Turns,
    asker: Asker,
    lent: bool,
}

impl Turns {
    pub fn new(slots: usize) -> Self {
        Self {
            state: Arc::new(Mutex::new(State {
                slots,
                free: slots,
                lent: 0,
                by_uid: HashMap::new(),
                by_registry: HashMap::new(),
                waiting: Vec::new(),
            })),
        }
    }

    /// A place in the queue, taken now; the future ends when the slot is there.
    pub fn ask(&self, asker: Asker) -> impl Future<Output = Turn> + Send + use<> {
        let (tx, rx) = oneshot::channel();
        self.lock().waiting.push((asker, tx));
        self.serve();
        // The queue lives as long as somebody waits in it.
        let queue = self.clone();
        async move {
            let turn = rx.await;
            drop(queue);
            match turn {
                Ok(turn) => turn,
                Err(_) => std::future::pending().await,
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Hands out what is free.
    fn serve(&self) {
        loop {
            let (asker, to) = {
                let mut state = self.lock();
                match state.next() {
                    Some(next) => next,
                    None => return,
                }
            };
            let turn = Turn {
                turns: self.clone(),
                asker,
                lent: false,
            };
            // Who went away meanwhile gives it back at once.
            drop(to.send(turn));
        }
    }
}

impl State {
    fn next(&mut self) -> Option<(Asker, oneshot::Sender<Turn>)> {
        self.waiting.retain(|(_, to)| !to.is_closed());
        if self.free == 0 {
            return None;
        }
        let held = |asker: &Asker| {
            (
                self.by_uid.get(&asker.uid).copied().unwrap_or(0),
                self.by_registry.get(&asker.registry).copied().unwrap_or(0),
            )
        };
        let (best, _) =
            (self.waiting.iter().enumerate()).min_by_key(|(at, (asker, _))| (held(asker), *at))?;
        let (asker, to) = self.waiting.remove(best);
        self.free -= 1;
        *self.by_uid.entry(asker.uid).or_default() += 1;
        *self.by_registry.entry(asker.registry.clone()).or_default() += 1;
        Some((asker, to))
    }
}

impl Turn {
    /// Lets somebody who waits have the slot, and goes on without. Does nothing when nobody waits, or too much is lent.
    pub fn lend(&mut self) {
        {
            let mut state = self.turns.lock();
            let most = state.slots * LENT;
            if self.lent || state.lent >= most || state.waiting.iter().all(|(_, to)| to.is_closed())
            {
                return;
            }
            state.lent += 1;
            state.free += 1;
        }
        self.lent = true;
        self.turns.serve();
    }

    /// Lends the slot when `is_slow`, asked every few seconds, says so. Never ends.
    pub async fn lend_when(
        &mut self,
        mut is_slow: impl FnMut() -> bool,
    ) -> std::convert::Infallible {
        let mut tick = tokio::time::interval(LOOK);
        tick.tick().await;
        loop {
            tick.tick().await;
            if is_slow() {
                self.lend();
            }
        }
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        {
            let mut state = self.turns.lock();
            if self.lent {
                state.lent -= 1;
            } else {
                state.free += 1;
            }
            less(&mut state.by_uid, &self.asker.uid);
            less(&mut state.by_registry, &self.asker.registry);
        }
        self.turns.serve();
    }
}

fn less<K: Eq + std::hash::Hash>(held: &mut HashMap<K, usize>, key: &K) {
    if let Some(count) = held.get_mut(key) {
        *count -= 1;
        if *count == 0 {
            held.remove(key);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asker(uid: u32, registry: &str) -> Asker {
        Asker {
            uid,
            registry: registry.into(),
        }
    }

    /// What a future that is ready gives.
    fn now<T>(future: &mut std::pin::Pin<Box<impl Future<Output = T>>>) -> Option<T> {
        let mut context = std::task::Context::from_waker(std::task::Waker::noop());
        match future.as_mut().poll(&mut context) {
            std::task::Poll::Ready(value) => Some(value),
            std::task::Poll::Pending => None,
        }
    }

    #[test]
    fn a_user_with_many_wishes_does_not_make_another_wait_for_all_of_them() {
        let turns = Turns::new(2);
        let mut greedy: Vec<_> = (0..10)
            .map(|_| Box::pin(turns.ask(asker(1, "r"))))
            .collect();
        let first = now(&mut greedy[0]).unwrap();
        let _second = now(&mut greedy[1]).unwrap();
        let mut other = Box::pin(turns.ask(asker(2, "r")));
        assert!(now(&mut other).is_none() && now(&mut greedy[2]).is_none());
        drop(first);
        assert!(now(&mut greedy[2]).is_none());
        let _other = now(&mut other).unwrap();
    }

    #[test]
    fn of_one_users_wishes_the_registry_with_less_goes_first_and_then_who_asked_first() {
        let turns = Turns::new(2);
        let mut one = Box::pin(turns.ask(asker(1, "a")));
        let mut two = Box::pin(turns.ask(asker(1, "a")));
        let (one, two) = (now(&mut one).unwrap(), now(&mut two).unwrap());
        let mut same = Box::pin(turns.ask(asker(1, "a")));
        let mut other = Box::pin(turns.ask(asker(1, "b")));
        let mut late = Box::pin(turns.ask(asker(1, "b")));
        drop(one);
        let _other = now(&mut other).unwrap();
        drop(two);
        assert!(now(&mut same).is_some() && now(&mut late).is_some());
    }

    #[test]
    fn who_goes_away_loses_nothing_of_the_others() {
        let turns = Turns::new(1);
        let held = now(&mut Box::pin(turns.ask(asker(1, "a")))).unwrap();
        let gone = Box::pin(turns.ask(asker(2, "a")));
        let mut stays = Box::pin(turns.ask(asker(3, "a")));
        drop(gone);
        drop(held);
        // Ready, and never fetched.
        let ready = Box::pin(turns.ask(asker(4, "a")));
        let stayed = now(&mut stays).unwrap();
        drop(stayed);
        drop(ready);
        assert!(now(&mut Box::pin(turns.ask(asker(5, "a")))).is_some());
    }

    #[test]
    fn slow_work_lends_its_slot_to_who_waits_within_bounds() {
        let turns = Turns::new(1);
        let mut held = Vec::new();
        for uid in 0..=LENT as u32 {
            let mut ask = Box::pin(turns.ask(asker(uid, "slow")));
            assert!(uid == 0 || now(&mut ask).is_none());
            held.iter_mut().for_each(Turn::lend);
            held.push(now(&mut ask).unwrap());
        }
        let mut last = Box::pin(turns.ask(asker(99, "slow")));
        held.iter_mut().for_each(Turn::lend);
        assert!(now(&mut last).is_none());
        // A lent turn that ends frees no slot, but lets another be lent.
        drop(held.remove(0));
        assert!(now(&mut last).is_none());
        held.iter_mut().for_each(Turn::lend);
        assert!(now(&mut last).is_some());
        drop(held);
        let state = turns.lock();
        assert_eq!((state.free, state.lent), (1, 0));
    }
}
