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
    progress: impl FnMut(Progress),
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
    let unsent = match say(&mut stream, &bytes, pipes).await {
        Ok(()) => None,
        // A sealer that refuses to listen, or to look at the layers, closes early: its answer is still to be read.
        Err(e) if is_hung_up(&e) => Some(e),
        Err(e) => return Err(lost("cannot write to")(e)),
    };
    match (hear(&mut stream, progress).await, unsent) {
        (Ok(Answer::Error(failure)), _) => Err(failure),
        (Ok(answer), _) => Ok(answer),
        (Err((_, e)), Some(unsent)) if is_hung_up(&e) => Err(lost("cannot write to")(unsent)),
        (Err((what, e)), _) => Err(lost(what)(e)),
    }
}

/// Whether the other end is closed.
fn is_hung_up(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionReset | UnexpectedEof)
}

async fn say(stream: &mut UnixStream, bytes: &[u8], pipes: Vec<OwnedFd>) -> io::Result<()> {
    stream.write_all(bytes).await?;
    let stream = &*stream;
    for group in pipes.chunks(FDS_PER_MESSAGE) {
        let group: Vec<BorrowedFd<'_>> = group.iter().map(AsFd::as_fd).collect();
        let sent = stream.async_io(Interest::WRITABLE, || send_fds(stream, &group));
        sent.await?;
    }
    Ok(())
}

/// The last thing that the sealer says, or what could not be done with the sealer, and why.
async fn hear(
    stream: &mut UnixStream,
    mut progress: impl FnMut(Progress),
) -> Result<Answer, (&'static str, io::Error)> {
    let lost = |e| ("lost", e);
    let nonsense = |e| ("cannot understand", e);
    loop {
        let mut prefix = [0; 4];
        stream.read_exact(&mut prefix).await.map_err(lost)?;
        let mut body = vec![0; frame::length(prefix).map_err(nonsense)?];
        stream.read_exact(&mut body).await.map_err(lost)?;
        let answer = serde_json::from_slice(&body).map_err(io::Error::from);
        match answer.map_err(nonsense)? {
            Answer::Progress(news) => progress(news),
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

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::os::unix::net::UnixListener;

    use berth_image::record::Admission;
    use berth_image::{Digest, Platform};

    use super::*;
    use crate::seal::protocol::SealRequest;

    /// Asks a sealer that says `words` and closes without reading. The request does not fit into the socket, so that
    /// it cannot be written whole.
    async fn ask_deaf(words: Vec<u8>) -> SealFailure {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("seal.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let deaf = std::thread::spawn(move || listener.accept().unwrap().0.write_all(&words));
        let asked = Request::Seal(SealRequest {
            manifest_digest: Digest::of(b"m"),
            manifest: "x".repeat(8 << 20),
            config: String::new(),
            platform: Platform::host(),
            admission: Admission {
                rule: String::new(),
                reasons: Vec::new(),
            },
        });
        let (end, _ours) = io::pipe().unwrap();
        let answer = request(&socket, &asked, vec![end.into()], |_| {}).await;
        deaf.join().unwrap().unwrap();
        answer.unwrap_err()
    }

    #[tokio::test]
    async fn a_sealer_that_refuses_without_listening_is_heard() {
        let refusal = SealFailure::new(ErrorKind::Denied, "uid 7 may not ask");
        let words = frame::encode(&Answer::Error(refusal)).unwrap();
        let failure = ask_deaf(words).await;
        assert_eq!(failure.kind, ErrorKind::Denied);
        assert_eq!(failure.message, "uid 7 may not ask");
    }

    #[tokio::test]
    async fn a_sealer_that_hangs_up_without_a_word_is_not_there() {
        let failure = ask_deaf(Vec::new()).await;
        assert_eq!(failure.kind, ErrorKind::StoreUnavailable);
        let message = failure.message;
        assert!(
            message.starts_with("cannot write to the sealer"),
            "{message}"
        );
    }
}
