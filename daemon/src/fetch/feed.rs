//! A layer on its way to the converter: what the spool has, as it grows, into a pipe.
//!
//! The pipe's end of file means "whole and of the right digest", so on failure the pipe is handed back open: it must
//! outlive the sealer's connection (see `seal::protocol`).

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use rustix::pipe::{SpliceFlags, splice};
use tokio::net::unix::pipe::Sender;

use super::blob::{Blob, FetchError, State};

/// Bytes moved at a time.
const STEP: u64 = 1 << 20;

/// Why a layer could not be fed; `pipe` is to be kept open until the sealer's connection is closed.
#[derive(Debug)]
pub struct FeedError {
    pub error: FetchError,
    pub pipe: Option<Arc<Sender>>,
}

/// Moves all of `blob` into `pipe` and closes it. A reader that closes its end early is none of our business: it
/// says why elsewhere.
pub async fn feed(blob: Arc<Blob>, pipe: OwnedFd) -> Result<(), FeedError> {
    let pipe = Sender::from_owned_fd(pipe).map(Arc::new);
    let pipe = pipe.map_err(|e| FeedError {
        error: failed(&blob, e),
        pipe: None,
    })?;
    run(&blob, &pipe).await.map_err(|error| FeedError {
        error,
        pipe: Some(pipe),
    })
}

async fn run(blob: &Blob, pipe: &Arc<Sender>) -> Result<(), FetchError> {
    let mut frontier = blob.frontier();
    let mut offset = 0;
    loop {
        let now = frontier.borrow_and_update().clone();
        if let Some(file) = now.file.filter(|_| offset < now.bytes) {
            pipe.writable().await.map_err(|e| failed(blob, e))?;
            // Reading may wait for the disk: not on a thread that serves others.
            let (to, step) = (pipe.clone(), STEP.min(now.bytes - offset) as usize);
            let moved = tokio::task::spawn_blocking(move || {
                let mut from = offset;
                let flags = SpliceFlags::MOVE | SpliceFlags::NONBLOCK;
                to.try_io(|| Ok(splice(&file, Some(&mut from), &*to, None, step, flags)?))
            });
            match moved
                .await
                .map_err(|_| FetchError::Cancelled(blob.digest))?
            {
                Ok(0) => return Err(failed(blob, io::ErrorKind::UnexpectedEof.into())),
                Ok(n) => offset += n as u64,
                Err(e) => match e.kind() {
                    io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted => {}
                    io::ErrorKind::BrokenPipe => return Ok(()),
                    _ => return Err(failed(blob, e)),
                },
            }
            continue;
        }
        match now.state {
            State::Whole => return Ok(()),
            State::Failed(e) => return Err(e),
            State::Running => {
                let changed = frontier.changed().await;
                changed.map_err(|_| FetchError::Cancelled(blob.digest))?;
            }
        }
    }
}

fn failed(blob: &Blob, e: io::Error) -> FetchError {
    FetchError::Spool {
        digest: blob.digest,
        source: Arc::new(e),
    }
}
