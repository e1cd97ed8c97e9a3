//! Where an image's bytes come from when this node does not have them.

use std::hash::{BuildHasher, Hasher};
use std::io::Read;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A failed fetch.
#[derive(Debug, Clone, thiserror::Error)]
pub enum SourceError {
    /// It does not answer, or says something else than the bytes.
    #[error("{source_name}: {what}")]
    Failed {
        /// Which.
        source_name: String,
        /// Why, in words.
        what: String,
    },
    /// It asks to be left alone for a while.
    #[error("{source_name} is busy")]
    Busy {
        /// Which.
        source_name: String,
        /// How long it wants to be left alone.
        wait: Duration,
    },
    /// It gave other bytes than were sealed.
    #[error("{source_name}: bytes at {offset} are not those that were sealed")]
    WrongBytes {
        /// Which.
        source_name: String,
        /// Where in the image file.
        offset: u64,
    },
    /// None answered in time; the last one's reason.
    #[error("no source of the image answered in time, the last one: {0}")]
    All(Box<SourceError>),
    /// Another reader's fetch of the same bytes took too long.
    #[error("the bytes did not arrive in time")]
    Late,
    /// There is none to ask.
    #[error("the image has no source")]
    None,
}

/// A place that has an image's file.
pub trait Source: Send + Sync + std::fmt::Debug {
    /// Its name in messages; no secrets.
    fn name(&self) -> &str;

    /// A stream of bytes `range` of the file, all of them within about `limit`. A stream that ends early or reads
    /// longer is found out by the caller.
    fn open(&self, range: Range<u64>, limit: Duration) -> Result<Box<dyn Read + '_>, SourceError>;

    /// Whether it still owes an answer that nobody waits for any more: others are asked first.
    fn is_stuck(&self) -> bool {
        false
    }

    /// Whether it can be asked at all: one that needs a grant and has none yet cannot.
    fn is_open(&self) -> bool {
        true
    }

    /// Takes a newer grant, where this is the source `at`.
    fn renew(&self, _at: &str, _grant: &str) {}

    /// The image's trace as JSON, where the source keeps one.
    fn trace(&self, _limit: Duration) -> Option<Vec<u8>> {
        None
    }

    /// Gives the source a trace to keep. `false` when it keeps none.
    fn send_trace(&self, _json: &str, _limit: Duration) -> bool {
        false
    }
}

/// Longest time that a source which failed is passed over.
const MOST_BACKOFF: Duration = Duration::from_secs(10);
/// First pause between two rounds.
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// A source that gave wrong bytes is left alone as one that failed so often.
const WRONG_COUNTS: u32 = 8;

/// Several sources, asked in their order; one that failed is passed over for a while if another can be asked.
#[derive(Debug)]
pub struct Sources {
    all: Vec<Entry>,
    patience: Duration,
}

#[derive(Debug)]
struct Entry {
    source: Box<dyn Source>,
    fetched: AtomicU64,
    wrong: AtomicU64,
    health: Mutex<Health>,
}

#[derive(Debug, Default)]
struct Health {
    failures: u32,
    rest_until: Option<Instant>,
}

impl Sources {
    /// `patience` is how long one fetch may take, all tries together; it must be below the deadline of a FUSE request.
    pub fn new(sources: Vec<Box<dyn Source>>, patience: Duration) -> Self {
        let entry = |source| Entry {
            source,
            fetched: AtomicU64::new(0),
            wrong: AtomicU64::new(0),
            health: Mutex::default(),
        };
        Self {
            all: sources.into_iter().map(entry).collect(),
            patience,
        }
    }

    /// How long one fetch may take.
    pub fn patience(&self) -> Duration {
        self.patience
    }

    /// Name of each source and bytes that it gave, right or wrong.
    pub fn fetched(&self) -> Vec<(String, u64)> {
        let all = self.all.iter();
        all.map(|entry| {
            let bytes = entry.fetched.load(Ordering::Relaxed);
            (entry.source.name().to_owned(), bytes)
        })
        .collect()
    }

    /// How often a source gave other bytes than were sealed.
    pub fn wrong(&self) -> u64 {
        let all = self.all.iter();
        all.map(|entry| entry.wrong.load(Ordering::Relaxed)).sum()
    }

    /// Takes a newer grant for the source `at`.
    pub fn renew(&self, at: &str, grant: &str) {
        for entry in &self.all {
            entry.source.renew(at, grant);
        }
    }

    fn open(&self) -> impl Iterator<Item = &Entry> {
        self.all.iter().filter(|entry| entry.source.is_open())
    }

    /// The trace that the first source has which keeps traces. Those that failed lately are asked last.
    pub fn trace(&self, limit: Duration) -> Option<Vec<u8>> {
        let (rested, others): (Vec<_>, Vec<_>) = self.open().partition(|entry| entry.is_rested());
        let mut all = rested.into_iter().chain(others);
        all.find_map(|entry| entry.source.trace(limit))
    }

    /// Gives a trace to every source that takes it: the next start may find only one of them. Whether one did.
    pub fn send_trace(&self, json: &str, limit: Duration) -> bool {
        let sent = self
            .open()
            .map(|entry| entry.source.send_trace(json, limit));
        sent.fold(false, |any, sent| any | sent)
    }

    /// Brings `range` in parts of at most `part` bytes, in order, each to `take`, which says whether they are right.
    /// What was taken is not fetched again when a source fails midway.
    ///
    /// # Errors
    /// When no source gave right bytes by `until`; parts before that were taken.
    pub fn fetch(
        &self,
        range: Range<u64>,
        part: u64,
        until: Instant,
        take: &mut dyn FnMut(u64, &[u8]) -> bool,
    ) -> Result<(), SourceError> {
        let mut pause = FIRST_PAUSE;
        let mut last = SourceError::None;
        let mut buf = vec![0u8; part.min(range.end - range.start) as usize];
        let mut at = range.start;
        loop {
            let rested = self.open().any(Entry::is_rested);
            let others = self.open().nth(1).is_some();
            for entry in self.open().filter(|entry| !rested || entry.is_rested()) {
                let left = until.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                // With others to ask, a slow one does not get all the time.
                let limit = match others {
                    false => left,
                    true => left.min((self.patience / 3).max(Duration::from_millis(100))),
                };
                let result = entry.stream(&mut at, range.end, limit, &mut buf, take);
                entry.note(&result);
                match result {
                    Ok(()) => return Ok(()),
                    Err(error) => {
                        tracing::warn!(error = &error as &dyn std::error::Error, "fetch failed");
                        last = error;
                    }
                }
            }
            if self.open().next().is_none() {
                return Err(last);
            }
            let mut wait = jittered(pause);
            if let SourceError::Busy { wait: asked, .. } = &last {
                wait = wait.max(*asked);
            }
            if Instant::now() + wait >= until {
                return Err(SourceError::All(Box::new(last)));
            }
            std::thread::sleep(wait);
            pause = (pause * 2).min(Duration::from_secs(2));
        }
    }
}

/// Half to one and a half of a pause, so that a thousand nodes do not come back in step.
fn jittered(pause: Duration) -> Duration {
    let random = std::hash::RandomState::new().build_hasher().finish() % 1024;
    pause / 2 + pause * random as u32 / 1024
}

impl Entry {
    fn stream(
        &self,
        at: &mut u64,
        end: u64,
        limit: Duration,
        buf: &mut [u8],
        take: &mut dyn FnMut(u64, &[u8]) -> bool,
    ) -> Result<(), SourceError> {
        let started = Instant::now();
        let failed = |what: String| SourceError::Failed {
            source_name: self.source.name().to_owned(),
            what,
        };
        let mut stream = self.source.open(*at..end, limit)?;
        while *at < end {
            let len = (end - *at).min(buf.len() as u64) as usize;
            let part = &mut buf[..len];
            stream
                .read_exact(part)
                .map_err(|error| failed(error.to_string()))?;
            // Counted first: who waits for the part goes on while `take` still runs.
            self.fetched.fetch_add(len as u64, Ordering::Relaxed);
            if !take(*at, part) {
                return Err(SourceError::WrongBytes {
                    source_name: self.source.name().to_owned(),
                    offset: *at,
                });
            }
            *at += len as u64;
            if started.elapsed() > limit && *at < end {
                return Err(failed("too slow".to_owned()));
            }
        }
        // Seen to its end, an HTTP connection can be used again.
        match stream.read(&mut [0]) {
            Ok(0) => {}
            more => tracing::debug!(?more, "after the bytes"),
        }
        Ok(())
    }

    fn is_rested(&self) -> bool {
        let rest_until = crate::lock(&self.health).rest_until;
        rest_until.is_none_or(|until| until <= Instant::now()) && !self.source.is_stuck()
    }

    fn note(&self, result: &Result<(), SourceError>) {
        let mut health = crate::lock(&self.health);
        let Err(error) = result else {
            *health = Health::default();
            return;
        };
        let count = match error {
            SourceError::WrongBytes { .. } => {
                self.wrong.fetch_add(1, Ordering::Relaxed);
                WRONG_COUNTS
            }
            _ => 1,
        };
        health.failures = health.failures.saturating_add(count);
        let backoff = jittered(FIRST_PAUSE * 2u32.saturating_pow(health.failures.min(10)));
        let rest = match error {
            SourceError::Busy { wait, .. } => backoff.max(*wait),
            _ => backoff,
        };
        health.rest_until = Some(Instant::now() + rest.min(MOST_BACKOFF));
    }
}
