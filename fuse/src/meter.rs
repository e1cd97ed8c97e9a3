//! How long requests take: counters that are read while they are written.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::abi::op;

/// Upper bounds of the buckets, in microseconds; one more bucket takes the rest.
pub const BOUNDS_US: [u64; 7] = [
    100, 1_000, 10_000, 100_000, 1_000_000, 5_000_000, 30_000_000,
];
/// What is told apart.
pub const KINDS: [&str; 4] = ["read", "lookup", "readdir", "other"];

/// Counts of one kind of request.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Latency {
    /// Requests by [`BOUNDS_US`], each in the first bucket that it fits.
    pub buckets: [u64; BOUNDS_US.len() + 1],
    /// Microseconds of them all.
    pub sum_us: u64,
}

impl Latency {
    /// Adds what another one counted.
    pub fn add(&mut self, other: &Self) {
        for (mine, theirs) in self.buckets.iter_mut().zip(other.buckets) {
            *mine += theirs;
        }
        self.sum_us += other.sum_us;
    }
}

#[derive(Debug, Default)]
struct Row {
    buckets: [AtomicU64; BOUNDS_US.len() + 1],
    sum_us: AtomicU64,
}

/// Counts of one connection.
#[derive(Debug, Default)]
pub(crate) struct Meter([Row; KINDS.len()]);

impl Meter {
    pub(crate) fn count(&self, opcode: u32, took: Duration) {
        let kind = match opcode {
            op::READ => 0,
            op::LOOKUP => 1,
            op::READDIR | op::READDIRPLUS => 2,
            _ => 3,
        };
        let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        let bucket = BOUNDS_US.iter().position(|bound| us <= *bound);
        let row = &self.0[kind];
        row.buckets[bucket.unwrap_or(BOUNDS_US.len())].fetch_add(1, Ordering::Relaxed);
        row.sum_us.fetch_add(us, Ordering::Relaxed);
    }

    /// By [`KINDS`].
    pub(crate) fn read(&self) -> [Latency; KINDS.len()] {
        std::array::from_fn(|kind| Latency {
            buckets: std::array::from_fn(|at| self.0[kind].buckets[at].load(Ordering::Relaxed)),
            sum_us: self.0[kind].sum_us.load(Ordering::Relaxed),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_counted_once_where_it_fits() {
        let meter = Meter::default();
        for ms in [0, 1, 2, 60_000] {
            meter.count(op::READ, Duration::from_millis(ms));
        }
        meter.count(op::GETATTR, Duration::ZERO);
        let [read, _, _, other] = meter.read();
        assert_eq!(read.buckets, [1, 1, 1, 0, 0, 0, 0, 1]);
        assert_eq!(read.sum_us, 60_003_000);
        assert_eq!(other.buckets[0], 1);
        let mut both = read;
        both.add(&other);
        assert_eq!(both.buckets[0], 2);
    }
}
