//! Requests and their answers: one thread for each request, one loop for everything that only waits.
//!
//! The loop accepts connections, sees leases end and lets go of what has been unused for long. A request's thread may
//! wait for a filesystem (the loop driver reads the image); its client stops waiting by its own deadline and mounts by
//! itself ([`mounts`]). All state is behind one lock that is never held over a call that could wait.

mod figures;
mod mounts;

use std::collections::{HashMap, HashSet};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use berth_config::NodeService;
use berth_mount::keeper::{Answer, How, Request, decode, encode, root_socket};
use berth_mount::packets::{Packet, Packets};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::Mode as Bits;
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SendFlags, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen,
    send, socket_with,
};
use serde::{Deserialize, Serialize};

use crate::copies::Copies;
use crate::den::{Berth, Den, Old};
use crate::finder::Finder;
use crate::image::Key;
use crate::peer::{self, Peer};
use crate::places::Places;
use crate::server::{News, Server};
use crate::setup::{Failure, Prepared};
use crate::shelf::{Left, Shelf};
use crate::signals::{Bell, Told};
use crate::table::{Limits, Table};

/// How long a client may take to say what it wants, and to take its answer.
const SAYING: Duration = Duration::from_secs(5);
/// Requests in work at a time: root's, each user's, and all users' together.
const ROOTS: usize = 256;
const USERS: usize = 4;
const ALL_USERS: usize = 32;
/// Connections taken from one socket before anything else is looked at again.
const A_TURN: usize = 64;

/// A mount in the den.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Kept {
    berth: Berth,
    how: How,
    /// The server's number for it.
    served: Option<u64>,
    digest: String,
    platform: String,
}

/// A connection whose other end uses a mount.
#[derive(Debug)]
struct Lease {
    connection: OwnedFd,
    of: Use,
}

impl Lease {
    /// Lets who holds it for a next job know that there should be none. Who runs a job does not listen.
    fn hurry(&self) {
        let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
        let _ = send(&self.connection, b"drain", flags);
    }
}

/// A user's folder, which uses a mount.
#[derive(Debug)]
struct Attached {
    path: PathBuf,
    of: Use,
    /// It is left alone until then.
    until: Instant,
}

/// One use of a mount.
#[derive(Debug, Clone)]
struct Use {
    key: Key,
    berth: Berth,
}

#[derive(Debug)]
struct State {
    table: Table<Key, Kept>,
    /// Mounts that some thread makes now.
    making: HashSet<Key>,
    leases: Vec<Arc<Lease>>,
    /// Folders of users.
    attached: HashMap<(u32, Key), Attached>,
    /// Requests in work, by who asks.
    working: HashMap<u32, usize>,
    draining: bool,
    /// Since the start: mounts given, and those among them that had to be made.
    given: u64,
    made: u64,
}

impl State {
    /// Whether one more request of this user is served now; [`Service::done`] when it has been.
    fn admit(&mut self, uid: u32) -> bool {
        let users = self.working.iter().filter(|(uid, _)| **uid != 0);
        let users: usize = users.map(|(_, working)| working).sum();
        let mine = self.working.get(&uid).copied().unwrap_or_default();
        let room = match uid {
            0 => mine < ROOTS,
            _ => mine < USERS && users < ALL_USERS,
        };
        if room {
            self.working.insert(uid, mine + 1);
        }
        room
    }

    /// Its holder is gone.
    fn end(&mut self, lease: &Arc<Lease>) {
        let held = self
            .leases
            .iter()
            .position(|other| Arc::ptr_eq(other, lease));
        if let Some(at) = held {
            self.leases.swap_remove(at);
            self.release(&lease.of, Instant::now());
        }
    }

    fn release(&mut self, of: &Use, now: Instant) {
        let same = |kept: &Kept| kept.berth == of.berth;
        self.table.release(&of.key, same, now);
    }
}

struct Service {
    prepared: Prepared,
    den: Den,
    copies: Copies,
    server: Arc<Server>,
    places: Places,
    finder: Finder,
    shelf: Arc<Shelf>,
    bell: Bell,
    state: Mutex<State>,
    made: Condvar,
}

/// Serves until it is told to stop.
pub(crate) fn run(prepared: Prepared) -> Result<(), Failure> {
    let limits = limits(prepared.service());
    let shelf = Arc::new(Shelf::new());
    let mut left = Left::take();
    let mut table = Table::new(limits);
    let den = den(&prepared, &shelf, &mut left, &mut table)?;
    let bell = Bell::new()?;
    raise_descriptors();
    let socket = prepared.service().socket.clone();
    let server = Arc::new(Server::new(
        prepared.service(),
        Arc::clone(&shelf),
        &mut left,
    )?);
    let copies = Copies::new(&prepared.config.node);
    let places = Places::new(&prepared.config.node.run_dir)?;
    let finder = Finder::new(&prepared.path)?;
    let roots = root_socket(&socket);
    let listeners = [listen_at(&roots, 0o600)?, listen_at(&socket, 0o666)?];
    let service = Arc::new(Service {
        prepared,
        den,
        copies,
        server: Arc::clone(&server),
        places,
        finder,
        shelf,
        bell,
        state: Mutex::new(State {
            table,
            making: HashSet::new(),
            leases: Vec::new(),
            working: HashMap::new(),
            attached: HashMap::new(),
            draining: false,
            given: 0,
            made: 0,
        }),
        made: Condvar::new(),
    });
    tracing::info!(socket = %socket.display(), keep_s = limits.keep.as_secs(), images = limits.images, "ready");
    let hears = Arc::clone(&service);
    let life = Arc::clone(&server);
    let serving = std::thread::Builder::new().name("server".into());
    let news = move |news| match news {
        News::Ended(id) => hears.served_no_more(id),
        News::Whole(served) => hears.whole(&served),
    };
    (serving.spawn(move || life.run(&news)))
        .map_err(|e| Failure::system("cannot start a thread", e))?;
    service.share_cache();
    let copier = Arc::clone(&service);
    let copying = std::thread::Builder::new().name("copies".into());
    (copying.spawn(move || {
        copier.copies.run(&|served| copier.copied(served));
    }))
    .map_err(|e| Failure::system("cannot start a thread", e))?;
    service.shelf.ready();
    while service.turn(&listeners)? {}
    service.copies.stop();
    server.leave();
    service.places.clear();
    // Who connects from now on mounts without us.
    let _ = std::fs::remove_file(&socket);
    let _ = std::fs::remove_file(&roots);
    tracing::info!("stopped");
    Ok(())
}

/// The den, with what an earlier keeper left in it.
fn den(
    prepared: &Prepared,
    shelf: &Shelf,
    left: &mut Left,
    table: &mut Table<Key, Kept>,
) -> Result<Den, Failure> {
    let folder = &prepared.config.node.run_dir;
    let mut old: Vec<(u64, (Key, Kept))> = left.described("kept");
    // A mount that nobody would answer for is let go of.
    let answered = |id: u64| left.has(&format!("served-{id}"));
    old.retain(|(_, (_, kept))| kept.served.is_none_or(answered));
    let berths = old.iter().map(|(_, (_, kept))| kept.berth).collect();
    if let Some(namespace) = left.get("den") {
        match Den::new(folder, Some(Old { namespace, berths })) {
            Ok(den) => {
                for (_, (key, kept)) in old {
                    table.add(key, kept, Instant::now());
                }
                return Ok(den);
            }
            Err(failure) => {
                tracing::error!(why = failure.why, "what was left is not to be used");
                shelf.remove("den");
            }
        }
    }
    let den = Den::new(folder, None)?;
    shelf.put("den", &den.namespace);
    Ok(den)
}

fn limits(service: &NodeService) -> Limits {
    Limits {
        keep: Duration::from_secs(service.keep_s),
        images: service.keep_images,
    }
}

/// One descriptor for each step of the node and for each mount: as many as may be.
fn raise_descriptors() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    let _ = setrlimit(Resource::Nofile, limit);
}

/// `mode` says who may connect; who it is decides what is answered. An old socket in the way is replaced: the lock says
/// that nobody serves it.
fn listen_at(path: &Path, mode: u32) -> Result<OwnedFd, Failure> {
    let part = path.with_extension("new");
    let _ = std::fs::remove_file(&part);
    let made = || -> Result<OwnedFd, Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        bind(&socket, &SocketAddrUnix::new(&part)?)?;
        rustix::fs::chmod(&part, Bits::from(mode))?;
        listen(&socket, 128)?;
        rustix::fs::rename(&part, path)?;
        Ok(socket)
    };
    made().map_err(|e| Failure::system(&format!("cannot listen at `{}`", path.display()), e))
}

impl Service {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for one round of events and deals with them; false at the end.
    fn turn(self: &Arc<Self>, listeners: &[OwnedFd; 2]) -> Result<bool, Failure> {
        let (leases, timeout) = {
            let mut state = self.state();
            self.let_go(&mut state);
            let now = Instant::now();
            let attached = state.attached.values().map(|a| a.until);
            let attached = attached.map(|until| until.saturating_duration_since(now));
            let copied = |key: &_| self.is_copied(key);
            let copied = state.table.until_unused(self.recording(), now, copied);
            let next = state.table.next(now).into_iter();
            let next = next.chain(attached).chain(copied).min();
            (state.leases.clone(), next)
        };
        let timeout = timeout.and_then(|t| Timespec::try_from(t + Duration::from_millis(1)).ok());
        let mut fds = vec![
            PollFd::new(&self.bell.read, PollFlags::IN),
            PollFd::new(&listeners[0], PollFlags::IN),
            PollFd::new(&listeners[1], PollFlags::IN),
        ];
        let of_leases = leases
            .iter()
            .map(|l| PollFd::new(&l.connection, PollFlags::IN));
        fds.extend(of_leases);
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(Failure::system("poll", errno)),
        }
        let ended: Vec<&Arc<Lease>> = (fds[3..].iter().zip(&leases))
            .filter(|(fd, _)| !fd.revents().is_empty())
            .map(|(_, lease)| lease)
            .collect();
        if !ended.is_empty() {
            let mut state = self.state();
            ended.into_iter().for_each(|lease| state.end(lease));
        }
        // Root's requests go before users'.
        for (fd, listener) in fds[1..3].iter().zip(listeners) {
            if !fd.revents().is_empty() {
                self.accept(listener);
            }
        }
        Ok(!self.bell.drain().contains(&Told::Stop))
    }

    fn accept(self: &Arc<Self>, listener: &OwnedFd) {
        for _ in 0..A_TURN {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let connection = match accept_with(listener, flags) {
                Ok(connection) => connection,
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN | Errno::CONNABORTED) => return,
                Err(error) => {
                    tracing::error!(%error, "cannot accept a connection");
                    // Out of descriptors or memory: not at full speed.
                    std::thread::sleep(Duration::from_millis(50));
                    return;
                }
            };
            let Ok(peer) = peer::of(&connection) else {
                continue;
            };
            // Hung up on: root's runtime mounts by itself, a user's program says that the service is busy.
            if !self.state().admit(peer.uid) {
                continue;
            }
            let service = Arc::clone(self);
            let uid = peer.uid;
            let thread = std::thread::Builder::new()
                .name("request".into())
                .stack_size(256 << 10);
            let started = thread.spawn(move || {
                service.serve(Packets::new(connection), &peer);
                service.done(uid);
            });
            if let Err(error) = started {
                tracing::error!(%error, "cannot start a thread");
                self.done(uid);
            }
        }
    }

    fn done(&self, uid: u32) {
        let mut state = self.state();
        if let Some(working) = state.working.get_mut(&uid) {
            *working -= 1;
            if *working == 0 {
                state.working.remove(&uid);
            }
        }
    }

    /// One request and its answer.
    fn serve(&self, connection: Packets, peer: &Peer) {
        let deadline = Some(Instant::now() + SAYING);
        let received = match peer.uid {
            0 => connection.receive(deadline),
            _ => (connection.receive_bytes(deadline)).map(|bytes| {
                bytes.map(|bytes| Packet {
                    bytes,
                    descriptors: Vec::new(),
                })
            }),
        };
        let Ok(Some(Packet { bytes, descriptors })) = received else {
            return;
        };
        let image = descriptors.into_iter().next();
        let answered = decode::<Request>(&bytes)
            .map_err(|why| Failure::new(Failure::INTERNAL, format!("of a request: {why}")))
            .and_then(|request| self.answer(&request, image, peer));
        let (answer, given) = match answered {
            Ok((answer, given)) => (answer, given),
            Err(failure) => (refused(failure), None),
        };
        let Ok(bytes) = encode(&answer) else { return };
        let deadline = Instant::now() + SAYING;
        let trees: Vec<_> = given.iter().map(|(tree, _)| tree.as_fd()).collect();
        let sent = connection.send(&bytes, &trees, deadline);
        if let Some((_, of)) = given {
            let mut state = self.state();
            match sent {
                Ok(()) => {
                    let connection = connection.into();
                    let lease = Arc::new(Lease { connection, of });
                    if state.draining {
                        lease.hurry();
                    }
                    state.leases.push(lease);
                }
                Err(_) => state.release(&of, Instant::now()),
            }
            drop(state);
            self.bell.look();
        }
    }

    fn answer(
        &self,
        request: &Request,
        image: Option<OwnedFd>,
        peer: &Peer,
    ) -> Result<(Answer, Option<(OwnedFd, Use)>), Failure> {
        if let Request::Path { digest, platform } = request {
            let path = self.finder.find(digest, platform, peer)?;
            return Ok((Answer::At { path }, None));
        }
        if peer.uid != 0 {
            return Err(Failure::new(
                Failure::PERMISSION,
                "the node service does that for root only",
            ));
        }
        match request {
            Request::Mount(request) => {
                let (answer, tree, of) = self.mount(request, image)?;
                Ok((answer, Some((tree, of))))
            }
            Request::Status => Ok((Answer::Status(self.status()), None)),
            Request::Drain => Ok((self.drain(), None)),
            Request::Metrics => Ok((self.metrics(), None)),
            Request::Attach(request) => Ok((self.attach(request, image)?, None)),
            Request::Path { .. } => Err(Failure::new(Failure::INTERNAL, "answered above")),
        }
    }
}

fn refused(failure: Failure) -> Answer {
    Answer::Refused {
        code: failure.code,
        why: failure.why,
        hint: failure.hint,
    }
}
