//! How many fetches run at a time in this process, and so how much memory their buffers take.

use std::sync::{Condvar, Mutex};
use std::time::Instant;

use crate::lock;

/// Fetches that a reader waits for.
pub(super) static DEMAND: Gate = Gate::new(48);
/// Fetches of what may be read later. Few, so that they leave the link to the others.
pub(super) static AHEAD: Gate = Gate::new(8);

#[derive(Debug)]
pub(super) struct Gate {
    free: Mutex<usize>,
    freed: Condvar,
}

/// A place, given back when dropped.
#[derive(Debug)]
pub(super) struct Place<'a>(&'a Gate);

impl Gate {
    const fn new(places: usize) -> Self {
        Self {
            free: Mutex::new(places),
            freed: Condvar::new(),
        }
    }

    /// A place, or `None` when there was none by `until`.
    pub(super) fn enter(&self, until: Instant) -> Option<Place<'_>> {
        let mut free = lock(&self.free);
        while *free == 0 {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            free = self
                .freed
                .wait_timeout(free, left)
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .0;
        }
        *free -= 1;
        Some(Place(self))
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        *lock(&self.0.free) += 1;
        self.0.freed.notify_one();
    }
}
