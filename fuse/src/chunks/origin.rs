//! Where an image's bytes come from when this node does not have them.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A failed fetch.
#[derive(Debug, thiserror::Error)]
pub enum OriginError {
    /// It does not answer, or says something else than the bytes.
    #[error("{origin}: {what}")]
    Failed {
        /// Which.
        origin: String,
        /// Why, in words.
        what: String,
    },
    /// It asks to be left alone for a while.
    #[error("{origin} is busy")]
    Busy {
        /// Which.
        origin: String,
        /// How long it wants to be left alone.
        wait: Duration,
    },
    /// It gave other bytes than were sealed.
    #[error("{origin}: bytes at {offset} are not those that were sealed")]
    WrongBytes {
        /// Which.
        origin: String,
        /// Where in the image file.
        offset: u64,
    },
    /// None answered in time; the last one's reason.
    #[error("no source of the image answered in time, the last one: {0}")]
    All(Box<OriginError>),
    /// There is none to ask.
    #[error("the image has no source")]
    None,
}

/// A place that has an image's file.
pub trait Origin: Send + Sync + std::fmt::Debug {
    /// Its name in messages; no secrets.
    fn name(&self) -> &str;

    /// Fills `buf` from byte `offset` of the file on, within about `limit`.
    fn fetch(&self, offset: u64, buf: &mut [u8], limit: Duration) -> Result<(), OriginError>;
}

/// The file on a filesystem of this node, mostly the parallel one. Its waits are the filesystem's own.
#[derive(Debug)]
pub struct FileOrigin {
    file: File,
    name: String,
}

impl FileOrigin {
    /// Takes an open file: who opened it had the right to read it.
    pub fn new(file: File, name: impl Into<String>) -> Self {
        Self {
            file,
            name: name.into(),
        }
    }
}

impl Origin for FileOrigin {
    fn name(&self) -> &str {
        &self.name
    }

    fn fetch(&self, offset: u64, buf: &mut [u8], _limit: Duration) -> Result<(), OriginError> {
        self.file
            .read_exact_at(buf, offset)
            .map_err(|error: io::Error| OriginError::Failed {
                origin: self.name.clone(),
                what: error.to_string(),
            })
    }
}

/// Longest time that an origin which failed is passed over.
const MOST_BACKOFF: Duration = Duration::from_secs(10);
/// First pause between two rounds.
const FIRST_PAUSE: Duration = Duration::from_millis(50);

/// Several origins, asked in their order; one that failed is passed over for a while if another can be asked.
#[derive(Debug)]
pub struct Origins {
    all: Vec<Entry>,
    /// How long one fetch may take, all tries together.
    patience: Duration,
}

#[derive(Debug)]
struct Entry {
    origin: Box<dyn Origin>,
    fetched: AtomicU64,
    health: Mutex<Health>,
}

#[derive(Debug, Default)]
struct Health {
    failures: u32,
    rest_until: Option<Instant>,
}

impl Origins {
    /// `patience` is how long one fetch may take; it must be below the deadline of a FUSE request.
    pub fn new(origins: Vec<Box<dyn Origin>>, patience: Duration) -> Self {
        let entry = |origin| Entry {
            origin,
            fetched: AtomicU64::new(0),
            health: Mutex::default(),
        };
        Self {
            all: origins.into_iter().map(entry).collect(),
            patience,
        }
    }

    /// Name of each origin and bytes it gave that were right.
    pub fn fetched(&self) -> Vec<(String, u64)> {
        let all = self.all.iter();
        all.map(|entry| {
            let bytes = entry.fetched.load(Ordering::Relaxed);
            (entry.origin.name().to_owned(), bytes)
        })
        .collect()
    }

    /// Fills `buf` from the first origin whose bytes `right` accepts, asking again until the time is over.
    pub fn fetch(
        &self,
        offset: u64,
        buf: &mut [u8],
        right: impl Fn(&[u8]) -> bool,
    ) -> Result<(), OriginError> {
        let end = Instant::now() + self.patience;
        let mut pause = FIRST_PAUSE;
        let mut last = OriginError::None;
        loop {
            let rested = self.all.iter().any(Entry::is_rested);
            for entry in self.all.iter().filter(|entry| !rested || entry.is_rested()) {
                let left = end.saturating_duration_since(Instant::now());
                if left.is_zero() {
                    break;
                }
                let result =
                    entry
                        .origin
                        .fetch(offset, buf, left)
                        .and_then(|()| match right(buf) {
                            true => Ok(()),
                            false => Err(OriginError::WrongBytes {
                                origin: entry.origin.name().to_owned(),
                                offset,
                            }),
                        });
                entry.note(&result);
                match result {
                    Ok(()) => {
                        entry.fetched.fetch_add(buf.len() as u64, Ordering::Relaxed);
                        return Ok(());
                    }
                    Err(error) => {
                        tracing::warn!(error = &error as &dyn std::error::Error, "fetch failed");
                        last = error;
                    }
                }
            }
            if let OriginError::Busy { wait, .. } = &last {
                pause = pause.max(*wait);
            }
            if self.all.is_empty() {
                return Err(last);
            }
            if Instant::now() + pause >= end {
                return Err(OriginError::All(Box::new(last)));
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_secs(2));
        }
    }
}

impl Entry {
    fn is_rested(&self) -> bool {
        let health = crate::lock(&self.health);
        health
            .rest_until
            .is_none_or(|until| until <= Instant::now())
    }

    fn note(&self, result: &Result<(), OriginError>) {
        let mut health = crate::lock(&self.health);
        let Err(error) = result else {
            *health = Health::default();
            return;
        };
        health.failures = health.failures.saturating_add(1);
        let backoff = FIRST_PAUSE * 2u32.saturating_pow(health.failures.min(10));
        let rest = match error {
            OriginError::Busy { wait, .. } => backoff.max(*wait),
            _ => backoff,
        };
        health.rest_until = Some(Instant::now() + rest.min(MOST_BACKOFF));
    }
}
