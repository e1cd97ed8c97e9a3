//! From a trace to what is fetched ahead, and from what is read to a trace. A trace itself is [`berth_image::trace`].

use std::collections::VecDeque;
use std::ops::Range;

use berth_image::trace::{MOST_RUNS, Trace, TraceError, most_chunks};

use super::CHUNK;
use super::tree::{Chunks, Sealed};

/// Chunks touched one after another that are fetched in the order of their places: 4 MiB.
const WINDOW: usize = 64;
/// Most chunks of one fetch: 1 MiB.
pub(super) const MOST_OF_A_FETCH: u32 = 16;

/// What to fetch, in order: the leaves that all of it needs, then the chunks, those touched at about the same time in
/// the order of their places.
pub(super) fn fetches(trace: &Trace, chunks: &Chunks) -> VecDeque<Range<u32>> {
    let all = trace.runs().iter().cloned().flatten();
    let order: Vec<u32> = all.filter(|chunk| *chunk < chunks.data_count).collect();
    let mut leaves: Vec<u32> = order.iter().filter_map(|c| chunks.leaf_of(*c)).collect();
    leaves.sort_unstable();
    leaves.dedup();
    let mut fetches = VecDeque::new();
    push_runs(&mut fetches, &leaves);
    for window in order.chunks(WINDOW) {
        let mut window = window.to_vec();
        window.sort_unstable();
        push_runs(&mut fetches, &window);
    }
    fetches
}

fn push_runs(fetches: &mut VecDeque<Range<u32>>, sorted: &[u32]) {
    let mut open: Option<Range<u32>> = None;
    for chunk in sorted {
        match &mut open {
            Some(run) if run.end == *chunk && (run.len() as u32) < MOST_OF_A_FETCH => run.end += 1,
            _ => fetches.extend(open.replace(*chunk..chunk + 1)),
        }
    }
    fetches.extend(open);
}

/// Notes first touches.
#[derive(Debug)]
pub(super) struct Recorder {
    seen: Vec<u64>,
    runs: Vec<Range<u32>>,
    left: u64,
}

impl Recorder {
    pub(super) fn new(chunks: &Chunks) -> Self {
        Self {
            seen: vec![0; (chunks.data_count as usize).div_ceil(64)],
            runs: Vec::new(),
            left: most_chunks(u64::from(chunks.data_count) * CHUNK),
        }
    }

    pub(super) fn touch(&mut self, chunks: Range<u32>) {
        for chunk in chunks {
            let (word, bit) = (chunk as usize / 64, 1u64 << (chunk % 64));
            if self.seen[word] & bit != 0 || self.left == 0 {
                continue;
            }
            let full = self.runs.len() == MOST_RUNS;
            match self.runs.last_mut() {
                Some(run) if run.end == chunk => run.end += 1,
                _ if full => continue,
                _ => self.runs.push(chunk..chunk + 1),
            }
            self.seen[word] |= bit;
            self.left -= 1;
        }
    }

    pub(super) fn trace(&self, sealed: &Sealed) -> Result<Trace, TraceError> {
        Trace::new(&sealed.root, sealed.hash_offset, self.runs.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> (Sealed, Chunks) {
        let sealed = Sealed {
            root: [7; 32],
            hash_offset: 10_000 * CHUNK,
        };
        (sealed, Chunks::of(&sealed).unwrap())
    }

    #[test]
    fn touches_come_back_as_fetches_leaves_first_and_joined() {
        let (sealed, chunks) = image();
        let mut recorder = Recorder::new(&chunks);
        for touch in [9000..9002, 5..6, 4..5, 6..7, 5..7, 9001..9002] {
            recorder.touch(touch);
        }
        let trace = recorder.trace(&sealed).unwrap();
        assert_eq!(trace.bytes(), 5 * CHUNK);
        let fetches: Vec<_> = fetches(&trace, &chunks).into();
        let leaf = |chunk| chunks.leaf_of(chunk).unwrap();
        assert_eq!(
            fetches,
            [
                leaf(4)..leaf(4) + 1,
                leaf(9000)..leaf(9000) + 1,
                4..7,
                9000..9002
            ]
        );
    }

    #[test]
    fn recording_ends_where_a_trace_would_be_too_large() {
        let (sealed, chunks) = image();
        let mut recorder = Recorder::new(&chunks);
        recorder.touch(0..10_000);
        assert_eq!(recorder.trace(&sealed).unwrap().bytes(), 2500 * CHUNK);
    }
}
