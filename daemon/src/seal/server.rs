//! The sealer's socket: who may speak, a thread for each who does, and what is answered.

use std::io::{self, IoSliceMut, Read as _, Write as _};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use berth_client::api::ErrorKind;
use berth_image::envelope::MAX_ENVELOPE;
use berth_image::{RefEntry, layout};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use super::conversion::{existing, seal, store_failure};
use super::protocol::{
    Answer, FDS_BYTE, FDS_PER_MESSAGE, Progress, RefRequest, Request, SealFailure, SealRequest,
    Sealed, Status,
};
use super::site::Site;
use super::{frame, manifest};

/// Connections at a time; more are closed at once. The daemon has as many as it makes images, and a few.
const MAX_CONNECTIONS: usize = 256;
/// How long a client may take to say its request, and to take an answer.
const PATIENCE: Duration = Duration::from_secs(10);
const PROGRESS: Duration = Duration::from_millis(100);

/// Takes the socket's path: a socket that nobody listens on is replaced.
pub(super) fn listen(path: &Path) -> io::Result<UnixListener> {
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent)?;
    }
    if UnixStream::connect(path).is_ok() {
        return Err(io::Error::new(
            io::ErrorKind::AddrInUse,
            "another sealer listens there",
        ));
    }
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    // Who may use it is decided by the uid of each connection; a daemon with a uid of its own must get so far.
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o666))?;
    Ok(listener)
}

/// Serves until `parent`, if there is one, ends.
pub(super) fn serve(site: Site, listener: &UnixListener, parent: Option<i32>) -> io::Result<()> {
    let parent =
        match parent.map(|pid| Pid::from_raw(pid).map(|p| pidfd_open(p, PidfdFlags::empty()))) {
            None => None,
            Some(Some(Ok(pidfd))) => Some(pidfd),
            // It has ended already.
            Some(_) => return Ok(()),
        };
    let site = Arc::new(site);
    let connections = Arc::new(AtomicUsize::new(0));
    listener.set_nonblocking(true)?;
    loop {
        let mut ready = vec![PollFd::new(listener, PollFlags::IN)];
        ready.extend(
            parent
                .as_ref()
                .map(|pidfd| PollFd::new(pidfd, PollFlags::IN)),
        );
        match poll(&mut ready, None) {
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
        if ready.get(1).is_some_and(|p| !p.revents().is_empty()) {
            tracing::info!("the daemon has ended, and so does its sealer");
            return Ok(());
        }
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            // Out of descriptors or memory for a moment, or a client that went away: the next turn tells.
            Err(e) => {
                if e.kind() != io::ErrorKind::WouldBlock {
                    tracing::warn!(error = %e, "cannot accept a connection");
                    std::thread::sleep(Duration::from_millis(50));
                }
                continue;
            }
        };
        let counted = Counted::new(&connections);
        if counted.number > MAX_CONNECTIONS {
            continue;
        }
        let site = Arc::clone(&site);
        let spawned = std::thread::Builder::new()
            .name("seal".into())
            .spawn(move || {
                let _counted = counted;
                if let Err(e) = converse(&site, stream) {
                    tracing::debug!(error = %e, "a client went away");
                }
            });
        if let Err(e) = spawned {
            tracing::warn!(error = %e, "cannot start a thread");
        }
    }
}

struct Counted {
    all: Arc<AtomicUsize>,
    number: usize,
}

impl Counted {
    fn new(all: &Arc<AtomicUsize>) -> Self {
        Self {
            number: all.fetch_add(1, Ordering::Relaxed) + 1,
            all: Arc::clone(all),
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.all.fetch_sub(1, Ordering::Relaxed);
    }
}

fn converse(site: &Site, mut stream: UnixStream) -> io::Result<()> {
    stream.set_nonblocking(false)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    let uid = rustix::net::sockopt::socket_peercred(&stream)?.uid.as_raw();
    let own = rustix::process::geteuid().as_raw();
    let answer = if uid != own && uid != 0 && !site.config.seal.allow_uids.contains(&uid) {
        tracing::warn!(uid, "a user who may not speak to the sealer tried to");
        let mut failure = SealFailure::new(
            ErrorKind::Denied,
            format!("uid {uid} may not ask the sealer for anything"),
        );
        failure.hint = Some("seal.allow_uids names the daemon's uid".into());
        Err(failure)
    } else {
        let request = read_request(&mut stream)?;
        answer(site, request, &mut stream)
    };
    let answer = answer.unwrap_or_else(|failure| {
        tracing::warn!(kind = ?failure.kind, error = %failure.message, "a request failed");
        Answer::Error(failure)
    });
    stream.write_all(&frame::encode(&answer)?)
}

fn read_request(stream: &mut UnixStream) -> io::Result<Request> {
    let mut prefix = [0; 4];
    stream.read_exact(&mut prefix)?;
    let length = frame::length(prefix)?;
    // Grows with what arrives, not with what is claimed.
    let mut body = Vec::new();
    stream.take(length as u64).read_to_end(&mut body)?;
    if body.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&body)?)
}

fn answer(site: &Site, request: Request, stream: &mut UnixStream) -> Result<Answer, SealFailure> {
    match request {
        Request::Seal(request) => {
            seal_image(site, &request, stream).map(|sealed| Answer::Sealed(Box::new(sealed)))
        }
        Request::Ref(request) => write_ref(site, &request),
        Request::Remove { manifest, platform } => {
            let gone = || SealFailure::new(ErrorKind::Internal, "the client went away");
            let claim = site.work().claim(manifest, &platform, || is_there(stream));
            let _claim = claim.ok_or_else(gone)?;
            let existed = site.store.remove_image(&manifest, &platform);
            let existed = existed.map_err(|e| store_failure(&e))?;
            tracing::info!(image = %manifest, %platform, existed, "removed");
            Ok(Answer::Removed { existed })
        }
        Request::EmptyTrash {} => {
            let removed = site.store.empty_trash().map_err(|e| store_failure(&e))?;
            Ok(Answer::TrashEmptied { removed })
        }
        Request::Status {} => Ok(Answer::Status(Status {
            version: env!("CARGO_PKG_VERSION").into(),
            store_uuid: site.store.format().uuid.clone(),
            key_id: site.key.public().id().hex(),
            conversions: site.work().conversions(),
        })),
    }
}

fn seal_image(
    site: &Site,
    request: &SealRequest,
    stream: &mut UnixStream,
) -> Result<Sealed, SealFailure> {
    let image = manifest::read(request)?;
    let gone = || SealFailure::new(ErrorKind::Internal, "the client went away");
    let (digest, platform) = (request.manifest_digest, &request.platform);
    let pipes = receive_pipes(stream, image.layers.len())
        .map_err(|e| SealFailure::new(ErrorKind::BadRequest, format!("the layers' pipes: {e}")))?;
    let claim = site.work().claim(digest, platform, || is_there(stream));
    let mut claim = claim.ok_or_else(gone)?;
    if let Some((record, path)) = existing(site, &digest, platform) {
        return Ok(Sealed {
            record,
            path,
            existing: true,
        });
    }
    if !claim.begin_conversion(|| is_there(stream)) {
        return Err(gone());
    }
    let began = Instant::now();
    tracing::info!(image = %digest, %platform, layers = image.layers.len(), "conversion begins");
    let client = stream.try_clone().map_err(|e| store_failure(&e))?;
    let mut told = Instant::now();
    let sealed = seal(site, request, &image, pipes, &client, |news: Progress| {
        if told.elapsed() < PROGRESS {
            return true;
        }
        told = Instant::now();
        let frame = frame::encode(&Answer::Progress(news));
        frame.is_ok_and(|bytes| stream.write_all(&bytes).is_ok())
    })?;
    let ms = began.elapsed().as_millis() as u64;
    let (bytes, serial) = (sealed.record.file.size, sealed.record.serial);
    tracing::info!(image = %digest, %platform, bytes, serial, ms, "sealed and published");
    Ok(sealed)
}

fn write_ref(site: &Site, request: &RefRequest) -> Result<Answer, SealFailure> {
    let (manifest, platform) = (request.manifest, &request.platform);
    if existing(site, &manifest, platform).is_none() {
        return Err(SealFailure::new(
            ErrorKind::NotFound,
            format!("{manifest} for {platform} is not in the store"),
        ));
    }
    let io = |e: io::Error| store_failure(&e);
    let path = layout::ref_entry(&request.reference);
    let before = (site.store.read(&path, MAX_ENVELOPE).ok())
        .and_then(|bytes| RefEntry::open(&bytes, &site.trusted, &request.reference).ok())
        .filter(|(entry, _)| entry.top == request.top);
    let mut manifests = before.map(|(entry, _)| entry.manifests).unwrap_or_default();
    manifests.insert(platform.clone(), manifest);
    let entry = RefEntry {
        reference: request.reference.clone(),
        top: request.top,
        manifests,
        serial: site.state.next_serial().map_err(io)?,
        resolved_at: request.resolved_at,
    };
    let internal = |e: berth_image::envelope::EnvelopeError| {
        SealFailure::new(ErrorKind::Internal, e.to_string())
    };
    let bytes = entry.seal(&site.key).map_err(internal)?;
    site.store.publish_bytes(&path, &bytes).map_err(io)?;
    tracing::info!(reference = %entry.reference, image = %manifest, serial = entry.serial, "reference written");
    Ok(Answer::RefWritten {
        serial: entry.serial,
    })
}

/// Takes exactly `count` descriptors, which must be pipes or files: a socket or device has other ends than end of file.
fn receive_pipes(stream: &UnixStream, count: usize) -> io::Result<Vec<OwnedFd>> {
    let mut pipes = Vec::with_capacity(count);
    while pipes.len() < count {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_PER_MESSAGE))];
        let mut control = RecvAncillaryBuffer::new(&mut space);
        let mut byte = [0];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let got = recvmsg(
            stream,
            &mut [IoSliceMut::new(&mut byte)],
            &mut control,
            flags,
        )?;
        let before = pipes.len();
        for message in control.drain() {
            if let RecvAncillaryMessage::ScmRights(fds) = message {
                pipes.extend(fds);
            }
        }
        if got.bytes != 1 || byte != [FDS_BYTE] || pipes.len() == before || pipes.len() > count {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("expected {count} descriptors, got {}", pipes.len()),
            ));
        }
    }
    for pipe in &pipes {
        use rustix::fs::FileType;
        let kind = FileType::from_raw_mode(rustix::fs::fstat(pipe)?.st_mode);
        if !matches!(kind, FileType::Fifo | FileType::RegularFile) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                "one is neither pipe nor file",
            ));
        }
    }
    Ok(pipes)
}

/// Whether the client is still connected. It has nothing more to say, so anything it does is an end.
fn is_there(stream: &UnixStream) -> bool {
    let mut ready = [PollFd::new(stream, PollFlags::IN | PollFlags::RDHUP)];
    let now = Timespec::default();
    matches!(poll(&mut ready, Some(&now)), Ok(0))
}
