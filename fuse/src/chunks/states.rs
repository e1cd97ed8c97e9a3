//! The state of each chunk in the cache file: here or not, being written or thrown out, in use by how many, used
//! lately.
//!
//! One atomic a chunk, so that reading what is here takes no lock. A chunk is thrown out only when nobody uses it, and
//! nobody writes it meanwhile.

use std::sync::atomic::{AtomicU16, Ordering};

const HERE: u16 = 1;
const LATELY: u16 = 2;
/// Being written or thrown out.
const BUSY: u16 = 4;
const ONE_USER: u16 = 8;
/// More would count over; they read around the cache.
const MOST: u16 = u16::MAX - ONE_USER;

#[derive(Debug)]
pub(super) struct States(Vec<AtomicU16>);

/// Keeps a chunk here while it is read.
#[derive(Debug)]
pub(super) struct InUse<'a>(&'a AtomicU16);

impl InUse<'_> {
    /// It is not what it should be: nobody else may use it. Whether this was the first to say so.
    pub(super) fn forget(&self) -> bool {
        self.0.fetch_and(!(HERE | LATELY), Ordering::AcqRel) & HERE != 0
    }
}

impl Drop for InUse<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(ONE_USER, Ordering::Release);
    }
}

impl States {
    pub(super) fn new(here: impl Iterator<Item = bool>) -> Self {
        Self(here.map(|here| AtomicU16::new(u16::from(here))).collect())
    }

    pub(super) fn len(&self) -> u32 {
        self.0.len() as u32
    }

    /// Uses a chunk if it is here.
    pub(super) fn use_if_here(&self, chunk: u32) -> Option<InUse<'_>> {
        let state = &self.0[chunk as usize];
        state
            .fetch_update(Ordering::Acquire, Ordering::Relaxed, |now| {
                (now & HERE != 0 && now < MOST).then_some((now + ONE_USER) | LATELY)
            })
            .ok()?;
        Some(InUse(state))
    }

    pub(super) fn is_here(&self, chunk: u32) -> bool {
        self.0[chunk as usize].load(Ordering::Acquire) & HERE != 0
    }

    fn change(&self, chunk: u32, from: u16, to: u16) -> bool {
        self.0[chunk as usize]
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }

    /// The right to write a chunk that is not here.
    pub(super) fn begin(&self, chunk: u32) -> bool {
        self.change(chunk, 0, BUSY)
    }

    /// What was [begun](Self::begin) or [taken](Self::take_away) is here, or not.
    pub(super) fn end(&self, chunk: u32, here: bool) {
        let done = self.change(chunk, BUSY, if here { HERE | LATELY } else { 0 });
        debug_assert!(done);
    }

    /// The right to throw a chunk out, if nobody uses it and, on this round, nobody has lately.
    pub(super) fn take_away(&self, chunk: u32) -> bool {
        !self.change(chunk, HERE | LATELY, HERE) && self.change(chunk, HERE, BUSY)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_use_stays_and_what_was_used_lately_gets_one_more_round() {
        let states = States::new([false].into_iter());
        assert!(states.use_if_here(0).is_none() && !states.take_away(0));
        assert!(states.begin(0) && !states.begin(0) && !states.is_here(0));
        states.end(0, true);
        let reader = states.use_if_here(0).unwrap();
        assert!((0..5).all(|_| !states.take_away(0)));
        drop(reader);
        assert!(!states.take_away(0));
        assert!(states.take_away(0));
        assert!(states.use_if_here(0).is_none() && !states.begin(0));
        states.end(0, false);
        assert!(states.begin(0));
    }

    #[test]
    fn a_damaged_chunk_is_used_by_nobody_and_written_again_when_its_readers_left() {
        let states = States::new([true].into_iter());
        let (one, two) = (
            states.use_if_here(0).unwrap(),
            states.use_if_here(0).unwrap(),
        );
        assert!(one.forget() && !two.forget());
        assert!(states.use_if_here(0).is_none() && !states.begin(0));
        drop((one, two));
        assert!(states.begin(0));
    }
}
