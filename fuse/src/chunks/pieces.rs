//! The state of each piece: here or not, in use by how many, used lately.
//!
//! One atomic a piece, so that reading what is here takes no lock. A piece may be taken away only when nobody uses it.

use std::sync::atomic::{AtomicU32, Ordering};

const HERE: u32 = 1;
const LATELY: u32 = 2;
const ONE_USER: u32 = 4;

#[derive(Debug)]
pub(super) struct Pieces(Vec<AtomicU32>);

/// Keeps a piece here while it is read.
#[derive(Debug)]
pub(super) struct InUse<'a>(&'a AtomicU32);

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(ONE_USER, Ordering::Release);
    }
}

impl Pieces {
    pub(super) fn new(count: usize) -> Self {
        Self((0..count).map(|_| AtomicU32::new(0)).collect())
    }

    pub(super) fn len(&self) -> usize {
        self.0.len()
    }

    /// Uses a piece if it is here, right and in the cache file.
    pub(super) fn use_if_here(&self, piece: usize) -> Option<InUse<'_>> {
        let state = &self.0[piece];
        state
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, |now| {
                (now & HERE != 0).then_some((now + ONE_USER) | LATELY)
            })
            .ok()?;
        Some(InUse(state))
    }

    pub(super) fn is_here(&self, piece: usize) -> bool {
        self.0[piece].load(Ordering::Acquire) & HERE != 0
    }

    /// The piece was written to the cache file and is right.
    pub(super) fn arrived(&self, piece: usize) {
        self.0[piece].fetch_or(HERE | LATELY, Ordering::Release);
    }

    /// Takes a piece away if it is here, nobody uses it and, on this round, nobody has lately.
    pub(super) fn take_away(&self, piece: usize) -> bool {
        let state = &self.0[piece];
        let now = state.load(Ordering::Relaxed);
        if now == HERE | LATELY {
            state.fetch_and(!LATELY, Ordering::Relaxed);
        }
        now == HERE
            && state
                .compare_exchange(HERE, 0, Ordering::Acquire, Ordering::Relaxed)
                .is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_use_stays_and_what_was_used_lately_gets_one_more_round() {
        let pieces = Pieces::new(1);
        assert!(pieces.use_if_here(0).is_none());
        assert!(!pieces.take_away(0));
        pieces.arrived(0);
        let reader = pieces.use_if_here(0).unwrap();
        assert!((0..5).all(|_| !pieces.take_away(0)));
        drop(reader);
        assert!(!pieces.take_away(0));
        assert!(pieces.take_away(0));
        assert!(pieces.use_if_here(0).is_none());
    }
}
