//! Single flight: of those who ask for the same thing at the same time, one works and all get its answer.
//!
//! The work is a task of its own, so it goes on when the one who asked first goes away. Invariant: at most one task
//! per key; a key is free again before its answer is given out.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

/// Work in flight, by key.
#[derive(Debug)]
pub struct Flights<K, V> {
    running: Arc<Mutex<HashMap<K, watch::Receiver<Option<V>>>>>,
}

impl<K, V> Default for Flights<K, V> {
    fn default() -> Self {
        Self {
            running: Arc::default(),
        }
    }
}

/// The work ended without an answer: it panicked, or the daemon is shutting down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the work was given up")]
pub struct GivenUp;

impl<K, V> Flights<K, V>
where
    K: Clone + Eq + Hash + Send + Sync + 'static,
    V: Clone + Send + Sync + 'static,
{
    /// Joins the flight of `key`, or starts it with `work`.
    pub async fn join<F>(&self, key: &K, work: impl FnOnce() -> F) -> Result<V, GivenUp>
    where
        F: Future<Output = V> + Send + 'static,
    {
        let mut answer = {
            let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
            match running.get(key) {
                // A closed channel without an answer is that of a task that panicked.
                Some(flight) if flight.has_changed().is_ok() => flight.clone(),
                _ => {
                    let (tx, rx) = watch::channel(None);
                    running.insert(key.clone(), rx.clone());
                    let (work, running, key) = (work(), self.running.clone(), key.clone());
                    tokio::spawn(async move {
                        let value = work.await;
                        let mut running = running.lock().unwrap_or_else(PoisonError::into_inner);
                        running.remove(&key);
                        tx.send_replace(Some(value));
                    });
                    rx
                }
            }
        };
        let answer = answer
            .wait_for(Option::is_some)
            .await
            .map_err(|_| GivenUp)?;
        answer.clone().ok_or(GivenUp)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU32, Ordering};
    use tokio::sync::Semaphore;

    #[tokio::test]
    async fn many_askers_one_worker_and_the_next_one_works_anew() {
        let (flights, runs) = (Arc::new(Flights::default()), Arc::new(AtomicU32::new(0)));
        let gate = Arc::new(Semaphore::new(0));
        let ask = |_| {
            let (flights, runs, gate) = (flights.clone(), runs.clone(), gate.clone());
            tokio::spawn(async move {
                let work = || async move {
                    let n = runs.fetch_add(1, Ordering::SeqCst);
                    gate.acquire().await.unwrap().forget();
                    n
                };
                flights.join(&"key", work).await
            })
        };
        let askers: Vec<_> = (0..64).map(ask).collect();
        gate.add_permits(64);
        let mut answers = Vec::new();
        for asker in askers {
            answers.push(asker.await.unwrap().unwrap());
        }
        // Those who came after the first answer was out may have started one more flight, never one each.
        assert!(runs.load(Ordering::SeqCst) < 64, "{answers:?}");
        let before = runs.load(Ordering::SeqCst);
        assert_eq!(ask(0).await.unwrap().unwrap(), before);
    }

    #[tokio::test]
    async fn the_work_outlives_the_first_asker() {
        let flights = Flights::default();
        let gate = Arc::new(Semaphore::new(0));
        let held = gate.clone();
        let work = || async move {
            held.acquire().await.unwrap().forget();
            7
        };
        {
            let mut first = Box::pin(flights.join(&1, work));
            let mut context = std::task::Context::from_waker(std::task::Waker::noop());
            assert!(first.as_mut().poll(&mut context).is_pending());
        }
        gate.add_permits(1);
        assert_eq!(flights.join(&1, || async { 8 }).await, Ok(7));
    }

    #[tokio::test]
    async fn a_panic_is_an_error_and_not_a_hang() {
        let flights: Flights<u8, u8> = Flights::default();
        assert_eq!(
            flights.join(&1, || async { panic!("boom") }).await,
            Err(GivenUp)
        );
        assert_eq!(flights.join(&1, || async { 2 }).await, Ok(2));
    }
}
