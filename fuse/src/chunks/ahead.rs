//! Which chunks are likely to be read next.
//!
//! Who reads in order gets as much ahead as was read in order before ([`Streams`]). Who reads here and there, but much
//! of one place, as a walk through many small files does, gets the rest of that place ([`Places`]). Who jumps about gets
//! nothing.

use std::ops::Range;

/// Places in the image that are read from at a time.
const STREAMS: usize = 16;
/// Most chunks ahead: 4 MiB.
const MOST: u32 = 64;
/// Chunks in order before anything is fetched ahead.
const FROM: u32 = 4;
/// The same where a trace says what a start reads.
const FROM_WITH_TRACE: u32 = 32;

#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    /// After the last chunk read.
    next: u32,
    /// Chunks read in order.
    read: u32,
    /// After the last chunk asked for ahead.
    asked: u32,
    /// When it was read last, by [`Streams::tick`].
    last: u64,
}

#[derive(Debug, Default)]
pub(super) struct Streams {
    all: [Stream; STREAMS],
    tick: u64,
    pub(super) has_trace: bool,
}

impl Streams {
    /// Notes a read of these chunks, and says which to fetch ahead; they may go beyond the image's end.
    pub(super) fn note(&mut self, chunks: Range<u32>) -> Option<Range<u32>> {
        self.tick += 1;
        // A block's end is in the chunk where the next begins.
        let near = |stream: &Stream| {
            stream.last > 0
                && chunks.start + 1 >= stream.next
                && chunks.start <= stream.next.saturating_add(1)
        };
        let Some(stream) = self.all.iter_mut().find(|stream| near(stream)) else {
            let oldest = self.all.iter_mut().min_by_key(|stream| stream.last)?;
            *oldest = Stream {
                next: chunks.end,
                read: 1,
                asked: chunks.end,
                last: self.tick,
            };
            return None;
        };
        stream.last = self.tick;
        if chunks.end > stream.next {
            stream.read = stream.read.saturating_add(chunks.end - stream.next);
            stream.next = chunks.end;
        }
        let from = match self.has_trace {
            true => FROM_WITH_TRACE,
            false => FROM,
        };
        if stream.read < from {
            return None;
        }
        let window = stream.read.min(MOST);
        let from = stream.asked.max(stream.next);
        let to = stream.next.saturating_add(window);
        // Half a window at a time, so that requests are long.
        if to < from.saturating_add(window / 2) || to <= from {
            return None;
        }
        stream.asked = to;
        Some(from..to)
    }
}

/// Chunks of a place: 1 MiB.
const PLACE: u32 = 16;
/// Misses in a place after which the rest of it is fetched.
const MUCH: u8 = 3;
/// Places of a neighbourhood, 16 MiB; and how many of them must be fetched whole for the others to be at first touch.
const NEIGHBOURS: usize = 16;
const MANY: u8 = 6;

/// How much of each place readers had to wait for.
#[derive(Debug)]
pub(super) struct Places {
    misses: Vec<u8>,
    whole: Vec<u8>,
}

impl Places {
    pub(super) fn new(chunks: u32) -> Self {
        let places = chunks.div_ceil(PLACE) as usize;
        Self {
            misses: vec![0; places],
            whole: vec![0; places.div_ceil(NEIGHBOURS)],
        }
    }

    /// Notes that a reader waits for a chunk, and says which place to fetch whole; it may go beyond the image's end.
    pub(super) fn missed(&mut self, chunk: u32) -> Option<Range<u32>> {
        let place = chunk / PLACE;
        let misses = self.misses.get_mut(place as usize)?;
        let whole = self.whole.get_mut(place as usize / NEIGHBOURS)?;
        if *misses >= MUCH {
            return None;
        }
        *misses += 1;
        if *whole >= MANY {
            *misses = MUCH;
        }
        if *misses < MUCH {
            return None;
        }
        *whole = whole.saturating_add(1);
        Some(place * PLACE..(place + 1) * PLACE)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(streams: &mut Streams, reads: impl Iterator<Item = Range<u32>>) -> Vec<Range<u32>> {
        reads.filter_map(|read| streams.note(read)).collect()
    }

    #[test]
    fn who_reads_in_order_gets_each_chunk_once_and_more_and_more_ahead() {
        let mut streams = Streams::default();
        let ranges = asked(&mut streams, (0..400).map(|chunk| chunk..chunk + 2));
        assert!(ranges.windows(2).all(|pair| pair[0].end == pair[1].start));
        assert!(ranges[0].len() <= 5 && ranges.last().unwrap().len() >= 32);
        assert!(ranges.last().unwrap().end >= 440);
    }

    #[test]
    fn who_jumps_about_gets_nothing() {
        let mut streams = Streams::default();
        let reads = (0..1000u32).map(|at| (at * 7919) % 60_000);
        assert!(asked(&mut streams, reads.map(|chunk| chunk..chunk + 1)).is_empty());
        // The same place again and again is not in order either.
        assert!(asked(&mut streams, (0..100).map(|_| 5..6)).is_empty());
    }

    #[test]
    fn readers_side_by_side_do_not_disturb_each_other() {
        let mut streams = Streams::default();
        let reads = (0..100u32).flat_map(|step| [step..step + 1, 5000 + step..5001 + step]);
        let ranges = asked(&mut streams, reads);
        assert!(
            ranges
                .iter()
                .any(|range| range.end >= 100 && range.end < 300)
        );
        assert!(ranges.iter().any(|range| range.end >= 5100));
    }

    #[test]
    fn much_of_a_place_brings_the_rest_and_much_of_many_brings_their_neighbours() {
        let mut places = Places::new(10 * 256);
        assert_eq!(places.missed(5), None);
        assert_eq!(places.missed(9), None);
        assert_eq!(places.missed(0), Some(0..16));
        assert_eq!(places.missed(3), None);
        // One or two of each place elsewhere: nothing.
        assert!(
            (256..2560)
                .step_by(16)
                .all(|chunk| places.missed(chunk).is_none())
        );
        for place in 1..6 {
            let chunks = place * 16..place * 16 + 3;
            assert_eq!(chunks.filter_map(|chunk| places.missed(chunk)).count(), 1);
        }
        assert_eq!(places.missed(100), Some(96..112));
        assert_eq!(places.missed(255), Some(240..256));
        assert_eq!(places.missed(u32::MAX), None);
    }
}
