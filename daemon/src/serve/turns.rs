//! How many requests for image bytes are answered at a time: of one user, and in all. The others wait a little, and
//! are then told to come again (HTTP 429).

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Of one user: a thousand nodes that start one job wait for each other.
const OF_ONE: usize = 128;
/// In all; each holds a buffer of [`super::data::PART`] bytes.
const IN_ALL: usize = 512;
const WAIT: Duration = Duration::from_secs(5);

#[derive(Debug)]
pub struct Turns {
    all: Arc<Semaphore>,
    of: Mutex<HashMap<u32, Arc<Semaphore>>>,
    wait: Duration,
}

/// The right to be answered; given back when dropped.
#[derive(Debug)]
pub struct Turn {
    _one: OwnedSemaphorePermit,
    _all: OwnedSemaphorePermit,
}

impl Default for Turns {
    fn default() -> Self {
        Self {
            all: Arc::new(Semaphore::new(IN_ALL)),
            of: Mutex::default(),
            wait: WAIT,
        }
    }
}

impl Turns {
    /// `None` when it takes too long.
    pub async fn take(&self, uid: u32) -> Option<Turn> {
        let one = {
            let mut of = self.of.lock().unwrap_or_else(PoisonError::into_inner);
            of.retain(|_, semaphore| Arc::strong_count(semaphore) > 1);
            let semaphore = of.entry(uid);
            let semaphore = semaphore.or_insert_with(|| Arc::new(Semaphore::new(OF_ONE)));
            Arc::clone(semaphore)
        };
        let turn = async {
            Some(Turn {
                _one: one.acquire_owned().await.ok()?,
                _all: Arc::clone(&self.all).acquire_owned().await.ok()?,
            })
        };
        tokio::time::timeout(self.wait, turn).await.ok().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_user_does_not_take_all_turns() {
        let turns = Turns {
            wait: Duration::from_millis(50),
            ..Turns::default()
        };
        let mut taken = Vec::new();
        for _ in 0..OF_ONE {
            taken.push(turns.take(1).await.unwrap());
        }
        assert!(turns.take(1).await.is_none());
        assert!(turns.take(2).await.is_some());
        taken.pop();
        assert!(turns.take(1).await.is_some());
    }
}
