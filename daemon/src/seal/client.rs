//! The daemon's end of the sealer's socket.
//!
//! One connection a request. Dropping the future of [`request`] closes the connection, which ends a conversion.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use berth_client::api::ErrorKind;
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, Interest};
use tokio::net::UnixStream;

use super::frame;
use super::protocol::{Answer, FDS_BYTE, FDS_PER_MESSAGE, Progress, Request, SealFailure};

/// Sends `request` and, for a `seal` request, the layers' pipes (base first); calls `progress` as news come; returns
/// the final answer, which is never [`Answer::Progress`] or [`Answer::Error`].
///
/// # Errors
/// What the sealer said, or [`ErrorKind::StoreUnavailable`] when it cannot be reached or went away.
pub async fn request(
    socket: &Path,
    request: &Request,
    pipes: Vec<OwnedFd>,
    mut progress: impl FnMut(Progress),
) -> Result<Answer, SealFailure> {
    let lost = |what: &'static str| {
        move |e: io::Error| {
            let mut failure = SealFailure::new(
                ErrorKind::StoreUnavailable,
                format!("{what} the sealer at `{}`: {e}", socket.display()),
            );
            failure.hint = Some("is `berthd seal` running?".into());
            failure
        }
    };
    let mut stream = (UnixStream::connect(socket).await).map_err(lost("cannot reach"))?;
    let bytes = frame::encode(request)
        .map_err(|e| SealFailure::new(ErrorKind::BadRequest, e.to_string()))?;
    (stream.write_all(&bytes).await).map_err(lost("cannot write to"))?;
    for group in pipes.chunks(FDS_PER_MESSAGE) {
        let group: Vec<BorrowedFd<'_>> = group.iter().map(AsFd::as_fd).collect();
        let sent = stream.async_io(Interest::WRITABLE, || send_fds(&stream, &group));
        // A sealer that answers without looking at the layers closes early: its answer is still to be read.
        match sent.await {
            Err(e) if e.kind() == io::ErrorKind::BrokenPipe => break,
            other => other.map_err(lost("cannot write to"))?,
        }
    }
    drop(pipes);
    loop {
        let mut prefix = [0; 4];
        (stream.read_exact(&mut prefix).await).map_err(lost("lost"))?;
        let mut body = vec![0; frame::length(prefix).map_err(lost("cannot understand"))?];
        (stream.read_exact(&mut body).await).map_err(lost("lost"))?;
        let answer = serde_json::from_slice(&body).map_err(io::Error::from);
        match answer.map_err(lost("cannot understand"))? {
            Answer::Progress(news) => progress(news),
            Answer::Error(failure) => return Err(failure),
            last => return Ok(last),
        }
    }
}

fn send_fds(stream: &UnixStream, fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_PER_MESSAGE))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let byte = [FDS_BYTE];
    sendmsg(
        stream,
        &[IoSlice::new(&byte)],
        &mut control,
        SendFlags::NOSIGNAL,
    )?;
    Ok(())
}
