//! Stage three: blobs into the spool, each over the wide link once.
//!
//! One transfer per digest is in flight, whoever asks and under whatever name. It is nobody's child: it ends when it
//! is done or when nobody holds its [`Blob`] any more. Who joined another source's transfer and saw it fail may fetch
//! the blob anew from its own source alone. At most `parallel_fetches` transfers run at a time; users and registries
//! share them ([`crate::turns`]), and what one user wants of one registry starts in the order of asking.

mod blob;
mod feed;
mod spool;

use std::collections::{HashMap, HashSet};
use std::io;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use axum::body::Bytes;
use berth_config::Config;
use berth_image::Digest;
use sha2::{Digest as _, Sha256};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

pub use blob::{Blob, FetchError, Frontier, State};
pub use feed::feed;
pub use spool::{Lane, Spool};

use crate::metrics::Metrics;
use crate::registry::{Registries, RegistryError, retry};
use crate::turns::{Asker, Turn, Turns};
use blob::Writer;
use spool::Held;

/// A try that brings so many bytes was not in vain and is not counted, so that a huge blob over a link that breaks
/// now and then arrives, while one that never gets anywhere fails after `fetch_attempts`.
const WORTH: u64 = 1 << 20;
/// A transfer that brings less in ten seconds lends its slot.
const SLOW: u64 = 2 << 20;

/// A blob that is wanted, and where it may be had.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Want {
    pub registry: String,
    pub repository: String,
    pub digest: Digest,
    /// Bytes, as the manifest says.
    pub size: u64,
}

/// Brings blobs into the spool. Clones share it.
#[derive(Debug, Clone)]
pub struct Fetcher {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    registries: Arc<Registries>,
    spool: Spool,
    turns: Turns,
    attempts: u32,
    limit: u64,
    metrics: Arc<Metrics>,
    /// By digest, and by repository where it is fetched from alone.
    live: Mutex<HashMap<(Digest, Option<String>), Live>>,
}

#[derive(Debug)]
struct Live {
    blob: Weak<Blob>,
    /// Held while somebody writes the part: a transfer that was given up may need a moment to stop.
    writing: Arc<tokio::sync::Mutex<()>>,
}

impl Fetcher {
    pub fn new(
        config: &Config,
        registries: Arc<Registries>,
        metrics: Arc<Metrics>,
    ) -> io::Result<Self> {
        Ok(Self {
            inner: Arc::new(Inner {
                registries,
                spool: Spool::open(&config.daemon.state_dir)?,
                turns: Turns::new(config.daemon.parallel_fetches),
                attempts: config.daemon.fetch_attempts,
                limit: config.daemon.spool_bytes,
                metrics,
                live: Mutex::default(),
            }),
        })
    }

    /// The blob, from the spool, from a transfer in flight, or from a new one, which takes its place in the queue
    /// before this returns. With `alone`, only what `want`'s own source sends counts beside whole blobs.
    pub fn ensure(&self, want: Want, alone: bool, uid: u32) -> io::Result<Arc<Blob>> {
        let inner = &self.inner;
        let mut live = inner.live.lock().unwrap_or_else(PoisonError::into_inner);
        let source = format!("{}/{}", want.registry, want.repository);
        let (lane, source) = match alone {
            true => (Lane::alone(&source), Some(source)),
            false => (Lane::shared(&want.registry), None),
        };
        let key = (want.digest, source);
        if let Some(blob) = live.get(&key).and_then(|l| l.blob.upgrade())
            && !blob.has_failed()
            && blob.size == want.size
        {
            return Ok(blob);
        }
        let (digest, size) = (want.digest, want.size);
        let writing = live.get(&key).map(|l| l.writing.clone());
        let writing = writing.unwrap_or_default();
        let blob = match inner.spool.whole(&digest, size)? {
            Held::Whole(file) => Arc::new(Blob::whole(digest, size, file)),
            Held::Nothing | Held::OtherSize => {
                let (tx, rx) = watch::channel(Frontier::default());
                let cancel = CancellationToken::new();
                let blob = Arc::new(Blob::coming(want.clone(), rx, cancel.clone()));
                let (inner, writing) = (inner.clone(), writing.clone());
                let turn = inner.turns.ask(want.asker(uid));
                tokio::spawn(async move {
                    let transfer = inner.transfer((&want, lane), turn, &writing, &tx, &cancel);
                    let state = match transfer.await {
                        Ok(()) => State::Whole,
                        Err(e) => State::Failed(e),
                    };
                    tx.send_modify(|f| f.state = state);
                    inner.trim();
                });
                blob
            }
        };
        live.retain(|_, l| l.blob.strong_count() > 0 || Arc::strong_count(&l.writing) > 1);
        let entry = Live {
            blob: Arc::downgrade(&blob),
            writing,
        };
        live.insert(key, entry);
        Ok(blob)
    }

    /// Asks the repository whether it shows us the blob, without fetching it.
    pub async fn ask(&self, want: &Want) -> Result<(), RegistryError> {
        let registries = &self.inner.registries;
        let registry = registries.get(&want.registry)?;
        registries
            .retrying(|| registry.has_blob(&want.repository, &want.digest))
            .await
    }

    /// Has the repository send the whole blob, and keeps nothing of it: who can send it, has it.
    pub async fn prove(&self, want: &Want, uid: u32) -> Result<(), FetchError> {
        let inner = &self.inner;
        let mut turn = inner.turns.ask(want.asker(uid)).await;
        let bytes = std::sync::atomic::AtomicU64::new(0);
        let mut before = 0;
        let is_slow = || {
            let now = bytes.load(std::sync::atomic::Ordering::Relaxed);
            now - std::mem::replace(&mut before, now) < SLOW
        };
        let mut hasher = Sha256::new();
        let mut url = String::new();
        let received = inner.receive(want, 0, &mut url, |piece: Bytes| {
            hasher.update(&piece);
            bytes.fetch_add(piece.len() as u64, std::sync::atomic::Ordering::Relaxed);
            std::future::ready(true)
        });
        tokio::select! {
            received = received => received?,
            never = turn.lend_when(is_slow) => match never {},
        }
        let found = Digest::from_bytes(hasher.finalize().into());
        if found == want.digest {
            return Ok(());
        }
        Err(FetchError::Digest {
            url,
            expected: want.digest,
            found,
            resumed: false,
        })
    }

    /// Who the registry of `want` sees in us.
    pub fn credential(&self, want: &Want) -> Result<String, RegistryError> {
        let registry = self.inner.registries.get(&want.registry)?;
        Ok(registry.credential())
    }

    /// Whether the site believes what the registry of `want` says of itself.
    pub fn is_trusted(&self, want: &Want) -> bool {
        self.inner.registries.is_trusted(&want.registry)
    }

    /// Forgets blobs whose content turned out to be no good, so that they are fetched again.
    pub fn discard(&self, digests: &[Digest]) {
        for digest in digests {
            if let Err(e) = self.inner.spool.remove(digest) {
                tracing::error!(%digest, error = %e, "cannot remove a blob from the spool");
            }
        }
        let mut live = (self.inner.live.lock()).unwrap_or_else(PoisonError::into_inner);
        for (_, l) in live.iter_mut().filter(|(k, _)| digests.contains(&k.0)) {
            l.blob = Weak::new();
        }
    }

    /// Bytes in the spool.
    pub fn spool_bytes(&self) -> io::Result<u64> {
        Ok(self.inner.spool.files()?.iter().map(|f| f.size).sum())
    }

    /// Removes what was used longest ago until the spool is as small as the site wants. Blobs in use stay.
    pub fn trim(&self) {
        self.inner.trim();
    }
}

impl Want {
    fn asker(&self, uid: u32) -> Asker {
        Asker {
            uid,
            registry: self.registry.clone(),
        }
    }
}

impl Inner {
    async fn transfer(
        &self,
        (want, lane): (&Want, Lane),
        turn: impl Future<Output = Turn>,
        writing: &tokio::sync::Mutex<()>,
        frontier: &watch::Sender<Frontier>,
        cancel: &CancellationToken,
    ) -> Result<(), FetchError> {
        let given_up = || FetchError::Cancelled(want.digest);
        let mut turn = tokio::select! {
            turn = turn => turn,
            () = cancel.cancelled() => return Err(given_up()),
        };
        let _writing = writing.lock().await;
        let (spool, tx) = (self.spool.clone(), frontier.clone());
        let (writer, there) =
            Writer::start(spool, (want.digest, lane.clone()), want.size, tx).await?;
        // The writer is always waited for: nobody else may open the part before it has stopped.
        let mut url = String::new();
        let mut before = there;
        let is_slow = || {
            let now = frontier.borrow().bytes;
            now - std::mem::replace(&mut before, now) < SLOW
        };
        let received = self.receive(want, there, &mut url, |piece| {
            // A writer that has failed says why when it is asked.
            let pieces = &writer.pieces;
            async move { pieces.send(piece).await.is_ok() }
        });
        let received = tokio::select! {
            received = received => received,
            never = turn.lend_when(is_slow) => match never {},
            () = cancel.cancelled() => Err(given_up()),
        };
        let written = writer.finish(want.digest).await?;
        received?;
        if written.found != want.digest {
            if let Err(e) = self.spool.remove_part(&want.digest, &lane) {
                tracing::error!(digest = %want.digest, error = %e, "cannot remove a part from the spool");
            }
            return Err(FetchError::Digest {
                url,
                expected: want.digest,
                found: written.found,
                resumed: written.resumed,
            });
        }
        self.spool
            .finish(&want.digest, &lane)
            .map_err(|e| FetchError::Spool {
                digest: want.digest,
                source: Arc::new(e),
            })
    }

    /// Brings the bytes from `offset` on, over as many tries as are allowed, for as long as `take` wants more.
    async fn receive<F: Future<Output = bool>>(
        &self,
        want: &Want,
        mut offset: u64,
        url: &mut String,
        mut take: impl FnMut(Bytes) -> F,
    ) -> Result<(), FetchError> {
        let registry = self.registries.get(&want.registry)?;
        let mut failures = 0;
        *url = format!("{}/{}", want.registry, want.repository);
        while offset < want.size {
            let before = offset;
            let piecewise = async {
                let (repository, digest) = (&want.repository, &want.digest);
                let mut stream = registry.blob(repository, digest, want.size, offset).await?;
                stream.url().clone_into(url);
                while let Some(piece) = stream.next().await? {
                    offset += piece.len() as u64;
                    self.metrics.upstream_bytes.inc_by(piece.len() as u64);
                    if !take(piece).await {
                        return Ok(());
                    }
                }
                Ok::<_, RegistryError>(())
            };
            let error = match piecewise.await {
                Ok(()) => return Ok(()),
                Err(e) => e,
            };
            let slow = matches!(error, RegistryError::Slow { .. });
            if offset - before >= WORTH && !slow {
                failures = 0;
            }
            failures += 1;
            if !error.is_transient() || failures >= self.attempts {
                return Err(error.into());
            }
            let wait = retry::delay(failures, error.retry_after(), retry::jitter());
            tracing::warn!(digest = %want.digest, error = %error, bytes = offset, ms = wait.as_millis() as u64, "a transfer goes on later");
            tokio::time::sleep(wait).await;
        }
        Ok(())
    }

    fn trim(&self) {
        let live = self.live.lock().unwrap_or_else(PoisonError::into_inner);
        let used = live.iter().filter(|(_, l)| l.blob.strong_count() > 0);
        let used: HashSet<Digest> = used.map(|(k, _)| k.0).collect();
        let in_use = |d: &Digest| used.contains(d);
        let result = self.spool.files().and_then(|mut files| {
            let mut total: u64 = files.iter().map(|f| f.size).sum();
            files.sort_by_key(|f| f.used_at);
            for file in files.iter().filter(|f| !in_use(&f.digest)) {
                if total <= self.limit {
                    break;
                }
                std::fs::remove_file(&file.path)?;
                total -= file.size;
                tracing::info!(digest = %file.digest, bytes = file.size, "trimmed from the spool");
            }
            Ok(())
        });
        if let Err(e) = result {
            tracing::error!(error = %e, "cannot trim the spool");
        }
    }
}
