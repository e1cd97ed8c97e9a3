//! Which chunks are being brought, and by whom: one fetch of a chunk, however many readers want it.
//!
//! Locking: the map's lock is held for map operations only; a flight's own lock is never held while another is taken.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Instant;

use crate::lock;

/// How a flight ended.
#[derive(Debug, Clone)]
pub(super) enum Outcome {
    /// In the cache.
    Kept,
    /// Right, but in memory only.
    Brought(Arc<[u8]>),
    /// Given up: look again.
    Again,
}

#[derive(Debug)]
pub(super) struct Flight {
    outcome: Mutex<Option<Outcome>>,
    landed: Condvar,
}

impl Flight {
    /// `None` when it had not ended by `until`.
    pub(super) fn wait(&self, until: Instant) -> Option<Outcome> {
        let mut outcome = lock(&self.outcome);
        loop {
            if let Some(outcome) = &*outcome {
                return Some(outcome.clone());
            }
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return None;
            }
            outcome = self
                .landed
                .wait_timeout(outcome, left)
                .unwrap_or_else(std::sync::PoisonError::into_inner)
                .0;
        }
    }
}

#[derive(Debug, Default)]
pub(super) struct Flights(Mutex<HashMap<u32, Arc<Flight>>>);

impl Flights {
    pub(super) fn get(&self, chunk: u32) -> Option<Arc<Flight>> {
        lock(&self.0).get(&chunk).cloned()
    }

    /// The duty to bring as many chunks of `range` from its start on as nobody else is bringing and `absent` says are
    /// not here; `None` if that is not even one.
    pub(super) fn lead(
        &self,
        range: Range<u32>,
        absent: impl Fn(u32) -> bool,
    ) -> Option<Landings<'_>> {
        let mut flights = lock(&self.0);
        let mut all = Vec::new();
        for chunk in range.clone() {
            // Asked under the lock: whoever brought it said so before the flight was taken out of the map.
            if flights.contains_key(&chunk) || !absent(chunk) {
                break;
            }
            let flight = Arc::new(Flight {
                outcome: Mutex::new(None),
                landed: Condvar::new(),
            });
            flights.insert(chunk, Arc::clone(&flight));
            all.push(flight);
        }
        (!all.is_empty()).then_some(Landings {
            flights: self,
            first: range.start,
            all,
            landed: 0,
        })
    }
}

/// The duty to end flights of neighbours, in their order; given up, others look again.
#[derive(Debug)]
pub(super) struct Landings<'a> {
    flights: &'a Flights,
    first: u32,
    all: Vec<Arc<Flight>>,
    landed: usize,
}

impl Landings<'_> {
    /// The chunks whose flights did not end yet.
    pub(super) fn left(&self) -> Range<u32> {
        self.first + self.landed as u32..self.first + self.all.len() as u32
    }

    /// Ends the first of them.
    pub(super) fn land(&mut self, outcome: Outcome) {
        let Some(flight) = self.all.get(self.landed) else {
            return;
        };
        lock(&self.flights.0).remove(&(self.first + self.landed as u32));
        self.landed += 1;
        *lock(&flight.outcome) = Some(outcome);
        flight.landed.notify_all();
    }
}

impl Drop for Landings<'_> {
    fn drop(&mut self) {
        while self.landed < self.all.len() {
            self.land(Outcome::Again);
        }
    }
}
