//! One blob on its way into the spool: how far it is, and the task that brings it there.

use std::fs::File;
use std::io::{self, Write as _};
use std::sync::Arc;

use axum::body::Bytes;
use berth_client::api::{ErrorBody, ErrorKind};
use berth_image::Digest;
use sha2::Digest as _;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

use super::Want;
use super::spool::{Lane, Part, Spool};
use crate::registry::RegistryError;

/// Pieces that the network may be ahead of the disk.
const AHEAD: usize = 32;

/// Why a blob did not arrive.
#[derive(Debug, Clone, thiserror::Error)]
pub enum FetchError {
    #[error(transparent)]
    Registry(#[from] RegistryError),
    #[error("{url} sent bytes of {found}, expected {expected}")]
    Digest {
        url: String,
        expected: Digest,
        found: Digest,
        /// Some of the bytes were left in the spool by an earlier run.
        resumed: bool,
    },
    #[error("cannot write blob {digest} to the spool: {source}")]
    Spool {
        digest: Digest,
        source: Arc<io::Error>,
    },
    #[error("the manifest says {expected} bytes of blob {digest}, there are {found}")]
    Size {
        digest: Digest,
        expected: u64,
        found: u64,
    },
    #[error("the transfer of blob {0} was given up")]
    Cancelled(Digest),
}

impl From<FetchError> for ErrorBody {
    fn from(e: FetchError) -> Self {
        let message = e.to_string();
        let (kind, hint) = match e {
            FetchError::Registry(e) => return e.into(),
            FetchError::Digest { .. } => (
                ErrorKind::DigestMismatch,
                Some("the registry or something before it serves damaged content".into()),
            ),
            FetchError::Spool { source, .. } if is_full(&source) => (
                ErrorKind::DiskFull,
                Some("free space below [daemon] state_dir, or lower spool_bytes".into()),
            ),
            FetchError::Size { .. } => (ErrorKind::DigestMismatch, None),
            FetchError::Spool { .. } | FetchError::Cancelled(_) => (ErrorKind::Internal, None),
        };
        Self {
            kind,
            message,
            hint,
        }
    }
}

fn is_full(e: &io::Error) -> bool {
    matches!(
        e.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}

/// How far a blob is.
#[derive(Debug, Clone, Default)]
pub struct Frontier {
    /// Where its bytes are; `None` until the first are known of.
    pub file: Option<Arc<File>>,
    /// How many may be read there.
    pub bytes: u64,
    pub state: State,
}

/// Whether there is more to come.
#[derive(Debug, Clone, Default)]
pub enum State {
    #[default]
    Running,
    /// All bytes are there and have the blob's digest.
    Whole,
    Failed(FetchError),
}

/// A blob that somebody needs. Its transfer ends when nobody does any more; what arrived stays for the next one.
#[derive(Debug)]
pub struct Blob {
    pub digest: Digest,
    pub size: u64,
    frontier: watch::Receiver<Frontier>,
    /// Who sends it; nobody, when it was in the spool.
    from: Option<Want>,
    _transfer: Option<DropGuard>,
}

impl Blob {
    /// Whether it is being sent by the repository that `want` names.
    pub fn comes_from(&self, want: &Want) -> bool {
        self.from.as_ref() == Some(want)
    }

    /// Whether it is being sent by the registry that `want` names.
    pub fn comes_from_registry(&self, want: &Want) -> bool {
        (self.from.as_ref()).is_some_and(|from| from.registry == want.registry)
    }

    pub(super) fn whole(digest: Digest, size: u64, file: File) -> Self {
        let (_, frontier) = watch::channel(Frontier {
            file: Some(Arc::new(file)),
            bytes: size,
            state: State::Whole,
        });
        Self {
            digest,
            size,
            frontier,
            from: None,
            _transfer: None,
        }
    }

    pub(super) fn coming(
        want: Want,
        frontier: watch::Receiver<Frontier>,
        transfer: CancellationToken,
    ) -> Self {
        Self {
            digest: want.digest,
            size: want.size,
            frontier,
            from: Some(want),
            _transfer: Some(transfer.drop_guard()),
        }
    }

    /// Where it stands, and news of it.
    pub fn frontier(&self) -> watch::Receiver<Frontier> {
        self.frontier.clone()
    }

    /// Bytes that have arrived.
    pub fn bytes(&self) -> u64 {
        self.frontier.borrow().bytes
    }

    pub(super) fn has_failed(&self) -> bool {
        matches!(self.frontier.borrow().state, State::Failed(_))
    }

    /// Waits for the whole blob.
    pub async fn wait(&self) -> Result<Arc<File>, FetchError> {
        let mut frontier = self.frontier();
        let ended = frontier
            .wait_for(|f| !matches!(f.state, State::Running))
            .await
            .map_err(|_| FetchError::Cancelled(self.digest))?;
        match (&ended.state, &ended.file) {
            (State::Failed(e), _) => Err(e.clone()),
            (_, Some(file)) => Ok(file.clone()),
            (_, None) => Err(FetchError::Cancelled(self.digest)),
        }
    }
}

/// The writing end of a blob: a thread that hashes and writes what the network brings.
pub(super) struct Writer {
    pub pieces: mpsc::Sender<Bytes>,
    thread: tokio::task::JoinHandle<Result<Written, FetchError>>,
}

/// What a writer came to.
pub(super) struct Written {
    pub found: Digest,
    pub resumed: bool,
}

impl Writer {
    /// Opens the part (hashing what is there already) and starts writing. Returns how many bytes were there.
    pub(super) async fn start(
        spool: Spool,
        (digest, lane): (Digest, Lane),
        size: u64,
        frontier: watch::Sender<Frontier>,
    ) -> Result<(Self, u64), FetchError> {
        let failed = move |e: io::Error| FetchError::Spool {
            digest,
            source: Arc::new(e),
        };
        let open = tokio::task::spawn_blocking(move || match spool.settle(&digest, size)? {
            Some(found) => Ok(Err(found)),
            None => spool.part(&digest, &lane, size),
        });
        let part = open.await.map_err(|_| FetchError::Cancelled(digest))?;
        let part = part.map_err(failed)?.map_err(|found| FetchError::Size {
            digest,
            expected: size,
            found,
        })?;
        let there = part.length;
        let reader = part.file.try_clone().map_err(failed)?;
        frontier.send_modify(|f| {
            f.file = Some(Arc::new(reader));
            f.bytes = there;
        });
        let (pieces, incoming) = mpsc::channel(AHEAD);
        let thread =
            tokio::task::spawn_blocking(move || write(part, incoming, &frontier).map_err(failed));
        Ok((Self { pieces, thread }, there))
    }

    /// Ends the writing and says what was written in all.
    pub(super) async fn finish(self, digest: Digest) -> Result<Written, FetchError> {
        drop(self.pieces);
        self.thread
            .await
            .unwrap_or(Err(FetchError::Cancelled(digest)))
    }
}

fn write(
    mut part: Part,
    mut incoming: mpsc::Receiver<Bytes>,
    frontier: &watch::Sender<Frontier>,
) -> io::Result<Written> {
    let resumed = part.length > 0;
    while let Some(piece) = incoming.blocking_recv() {
        part.hasher.update(&piece);
        part.file.write_all(&piece)?;
        part.length += piece.len() as u64;
        frontier.send_modify(|f| f.bytes = part.length);
    }
    Ok(Written {
        found: Digest::from_bytes(part.hasher.finalize().into()),
        resumed,
    })
}
