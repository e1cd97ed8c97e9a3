//! Requests and their answers: one thread for each request, one loop for everything that only waits.
//!
//! The loop accepts connections, sees leases end and lets go of what has been unused for long. A request's thread may
//! wait for a filesystem (the loop driver reads the image); its client stops waiting by its own deadline and mounts by
//! itself. All state is behind one lock that is never held over a call that could wait.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use berth_config::NodeService;
use berth_mount::keeper::{
    Answer, How, Mode, MountRequest, MountStatus, Request, Status, decode, encode,
};
use berth_mount::packets::{Packet, Packets};
use berth_mount::serving::BLOCK_FILE;
use berth_mount::{ImageFile, LoopDevice};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode as Bits, OFlags};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen, socket_with,
};

use serde::{Deserialize, Serialize};

use crate::den::{Berth, Den, Old};
use crate::finder::Finder;
use crate::image::{Bytes, Key};
use crate::peer::{self, Peer};
use crate::places::Places;
use crate::server::Server;
use crate::setup::{Failure, Prepared};
use crate::shelf::{Left, Shelf};
use crate::signals::{Bell, Told};
use crate::table::{Entry, Limits, Table};

/// How long a client may take to say what it wants, and to take its answer.
const SAYING: Duration = Duration::from_secs(5);
/// How long a request waits for another one that makes the same mount.
const MAKING: Duration = Duration::from_secs(60);
/// How often a user's folder that is over its time, and in use, is looked at.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// Folders of a user at a time.
const PLACES: usize = 64;
/// Requests in work at a time: root's, and each user's.
const ROOTS: usize = 256;
const USERS: usize = 4;

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
    fn release(&mut self, of: &Use, now: Instant) {
        let same = |kept: &Kept| kept.berth == of.berth;
        self.table.release(&of.key, same, now);
    }
}

struct Service {
    prepared: Prepared,
    den: Den,
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
    let places = Places::new(&prepared.config.node.run_dir)?;
    let finder = Finder::new(&prepared.path)?;
    let listener = listen_at(&socket)?;
    let service = Arc::new(Service {
        prepared,
        den,
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
    (serving.spawn(move || life.run(&move |id| hears.served_no_more(id))))
        .map_err(|e| Failure::system("cannot start a thread", e))?;
    service.shelf.ready();
    while service.turn(&listener)? {}
    server.leave();
    service.places.clear();
    // Who connects from now on mounts without us.
    let _ = std::fs::remove_file(&socket);
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

/// Everybody may connect; who it is decides what is answered. An old socket in the way is replaced: the lock says that
/// nobody serves it.
fn listen_at(path: &Path) -> Result<OwnedFd, Failure> {
    let part = path.with_extension("new");
    let _ = std::fs::remove_file(&part);
    let made = || -> Result<OwnedFd, Errno> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
        bind(&socket, &SocketAddrUnix::new(&part)?)?;
        rustix::fs::chmod(&part, Bits::from(0o666))?;
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
    fn turn(self: &Arc<Self>, listener: &OwnedFd) -> Result<bool, Failure> {
        let (leases, timeout) = {
            let mut state = self.state();
            self.let_go(&mut state);
            let now = Instant::now();
            let attached = state.attached.values().map(|a| a.until);
            let attached = attached.map(|until| until.saturating_duration_since(now));
            let next = state.table.next(now).into_iter().chain(attached).min();
            (state.leases.clone(), next)
        };
        let timeout = timeout.and_then(|t| Timespec::try_from(t + Duration::from_millis(1)).ok());
        let mut fds = vec![
            PollFd::new(&self.bell.read, PollFlags::IN),
            PollFd::new(listener, PollFlags::IN),
        ];
        let of_leases = leases
            .iter()
            .map(|l| PollFd::new(&l.connection, PollFlags::IN));
        fds.extend(of_leases);
        match poll(&mut fds, timeout.as_ref()) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(Failure::system("poll", errno)),
        }
        let ended: Vec<&Arc<Lease>> = (fds[2..].iter().zip(&leases))
            .filter(|(fd, _)| !fd.revents().is_empty())
            .map(|(_, lease)| lease)
            .collect();
        if !ended.is_empty() {
            let mut state = self.state();
            let now = Instant::now();
            for lease in ended {
                state.leases.retain(|other| !Arc::ptr_eq(other, lease));
                state.release(&lease.of, now);
            }
        }
        if !fds[1].revents().is_empty() {
            self.accept(listener);
        }
        Ok(!self.bell.drain().contains(&Told::Stop))
    }

    /// Drops what need not be kept.
    fn let_go(&self, state: &mut State) {
        let now = Instant::now();
        let late = state.attached.iter().filter(|(_, a)| a.until <= now);
        let late: Vec<(u32, Key)> = late.map(|(at, _)| at.clone()).collect();
        for at in late {
            let Some(attached) = state.attached.get_mut(&at) else {
                continue;
            };
            match self.places.detach(&attached.path) {
                // Somebody is in there.
                Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
                    attached.until = now + LOOK_AGAIN;
                }
                _ => {
                    let of = attached.of.clone();
                    state.attached.remove(&at);
                    state.release(&of, now);
                }
            }
        }
        for kept in state.table.expired(Instant::now()) {
            tracing::info!(digest = kept.digest, how = ?kept.how, "let go of an unused mount");
            self.drop_kept(&kept);
        }
    }

    fn drop_kept(&self, kept: &Kept) {
        self.den.drop_of(kept.berth);
        self.shelf.remove(&kept_name(kept));
    }

    fn accept(self: &Arc<Self>, listener: &OwnedFd) {
        loop {
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
            {
                let mut state = self.state();
                let working = state.working.entry(peer.uid).or_default();
                // Hung up on: root's runtime mounts by itself, a user's program says that the service is busy.
                if *working >= if peer.uid == 0 { ROOTS } else { USERS } {
                    continue;
                }
                *working += 1;
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
        let Ok(Some(packet)) = connection.receive(Some(Instant::now() + SAYING)) else {
            return;
        };
        let Packet { bytes, descriptors } = packet;
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
                Ok(()) => state.leases.push(Arc::new(Lease {
                    connection: connection.into(),
                    of,
                })),
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

    /// A mount that is kept, or one made now and kept.
    fn mount(
        &self,
        request: &MountRequest,
        image: Option<OwnedFd>,
    ) -> Result<(Answer, OwnedFd, Use), Failure> {
        let key = match (&image, request.mode) {
            (Some(image), Mode::Auto | Mode::Kernel) => Key::of_file(request, image.as_fd())?,
            (None, Mode::Kernel) => {
                let line = "the kernel mounts files only, and there is none";
                return Err(Failure::new(Failure::UNAVAILABLE, line));
            }
            (_, Mode::Lazy) | (None, Mode::Auto) => Key::of_root(request)?,
        };
        let (kept, there) = match self.take_or_begin(&key)? {
            Some(kept) => (kept, true),
            None => {
                let made = self.make(&key, request, image);
                let mut state = self.state();
                state.making.remove(&key);
                self.made.notify_all();
                let kept = made?;
                self.shelf.describe(&kept_name(&kept), &(&key, &kept));
                state.table.add(key.clone(), kept.clone(), Instant::now());
                state.table.take(&key);
                (kept, false)
            }
        };
        let of = Use {
            key,
            berth: kept.berth,
        };
        match self.den.clone_of(kept.berth) {
            Ok(tree) => {
                let how = kept.how;
                let mut state = self.state();
                state.given += 1;
                state.made += u64::from(!there);
                drop(state);
                let job = request.job.as_deref().unwrap_or_default();
                tracing::info!(
                    digest = request.digest,
                    uid = request.uid,
                    job,
                    ?how,
                    kept = there,
                    "mount given"
                );
                Ok((Answer::Mounted { how, kept: there }, tree, of))
            }
            Err(errno) => {
                self.state().release(&of, Instant::now());
                self.bell.look();
                Err(Failure::system("cannot clone a kept mount", errno))
            }
        }
    }

    /// The folder at which a user, whose right to it was verified, finds an image.
    fn attach(&self, request: &MountRequest, image: Option<OwnedFd>) -> Result<Answer, Failure> {
        let (_, tree, of) = self.mount(request, image)?;
        let at = (request.uid, of.key.clone());
        let keep = Duration::from_secs(self.prepared.service().keep_s).max(LOOK_AGAIN);
        let now = Instant::now();
        let mut state = self.state();
        let path = match state.attached.get_mut(&at) {
            // One made after its server was gone comes in the place of the old one.
            Some(there) if there.of.berth == of.berth => {
                there.until = now + keep;
                let path = there.path.clone();
                state.release(&of, now);
                path
            }
            _ => {
                let mine = state.attached.keys().filter(|(uid, _)| *uid == request.uid);
                let name = request.verity_root.get(..16).unwrap_or_default();
                let name = format!("{name}-{}", state.given);
                let made = match mine.count() < PLACES {
                    true => self.places.attach(tree.as_fd(), request.uid, &name),
                    false => Err(std::io::Error::other("this user has too many of them")),
                };
                match made {
                    Ok(path) => {
                        let attached = Attached {
                            path: path.clone(),
                            of,
                            until: now + keep,
                        };
                        if let Some(old) = state.attached.insert(at, attached) {
                            let _ = self.places.detach(&old.path);
                            state.release(&old.of, now);
                        }
                        path
                    }
                    Err(error) => {
                        state.release(&of, now);
                        drop(state);
                        self.bell.look();
                        return Err(Failure::system("cannot attach the image", error));
                    }
                }
            }
        };
        drop(state);
        self.bell.look();
        Ok(Answer::At { path })
    }

    /// The mount, with one user more; or none, and the caller is the one who makes it.
    fn take_or_begin(&self, key: &Key) -> Result<Option<Kept>, Failure> {
        let deadline = Instant::now() + MAKING;
        let mut state = self.state();
        loop {
            if let Some(kept) = state.table.take(key) {
                return Ok(Some(kept.clone()));
            }
            if state.making.insert(key.clone()) {
                return Ok(None);
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let line = "the image's filesystem does not answer";
                return Err(Failure::new(Failure::UNAVAILABLE, line));
            }
            let waited = self.made.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn make(
        &self,
        key: &Key,
        request: &MountRequest,
        image: Option<OwnedFd>,
    ) -> Result<Kept, Failure> {
        let (how, served, mount) = match (&key.bytes, image) {
            (Bytes::File(..), Some(image)) => (How::Kernel, None, self.by_kernel(request, &image)?),
            (_, image) => {
                let (id, mut tree) = self.server.serve(request, image)?;
                if self.server.block {
                    // The loop device holds the file, and with it the mount that the file is in.
                    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                    let file = rustix::fs::openat(&tree, BLOCK_FILE, flags, Bits::empty())
                        .map_err(|e| Failure::system("cannot open an image's one file", e))?;
                    tree = self.by_kernel(request, &file)?;
                }
                (How::Lazy, Some(id), tree)
            }
        };
        let put = self.den.put(mount);
        Ok(Kept {
            berth: put.map_err(|e| Failure::system("cannot keep a mount", e))?,
            how,
            served,
            digest: request.digest.clone(),
            platform: request.platform.clone(),
        })
    }

    fn by_kernel(&self, request: &MountRequest, image: &OwnedFd) -> Result<OwnedFd, Failure> {
        let failed = |error: berth_mount::MountError| {
            Failure::new(
                Failure::INTERNAL,
                format!("cannot mount the image: {error}"),
            )
        };
        let file = ImageFile {
            file: image.as_fd(),
            data_size: request.hash_offset,
            label: &format!("berth-{}", &request.verity_root[..48]),
        };
        let run_dir = &self.prepared.config.node.run_dir;
        let device = LoopDevice::attach(file, run_dir).map_err(failed)?;
        device.mount().map_err(failed)
    }

    /// The server answers no more for this one: who asks next gets a new one.
    fn served_no_more(&self, id: u64) {
        let mut state = self.state();
        let of = |(key, entry): (&Key, &Entry<Kept>)| {
            (entry.mount.served == Some(id)).then(|| key.clone())
        };
        let key = state.table.iter().find_map(of);
        if let Some(kept) = key.and_then(|key| state.table.remove(&key)) {
            tracing::warn!(digest = kept.digest, "a mount's server is gone");
            self.drop_kept(&kept);
        }
    }

    fn metrics(&self) -> Answer {
        let (mut text, takeovers) = self.server.metrics();
        let status = self.status();
        let mut add = |name: &str, kind: &str, help: &str, value: u64| {
            let _ = write!(
                text,
                "# HELP berth_node_{name} {help}\n# TYPE berth_node_{name} {kind}\nberth_node_{name} {value}\n"
            );
        };
        let used = status.mounts.iter().filter(|mount| mount.users > 0);
        let (used, all) = (used.count() as u64, status.mounts.len() as u64);
        let state = self.state();
        add("mounts", "gauge", "Mounts that are kept.", all);
        add("mounts_used", "gauge", "Mounts that jobs use.", used);
        let (made, given) = (state.made, state.given);
        drop(state);
        add(
            "mounts_made_total",
            "counter",
            "Mounts that were not there.",
            made,
        );
        add(
            "mounts_given_total",
            "counter",
            "Mounts given to steps.",
            given,
        );
        add(
            "takeovers_total",
            "counter",
            "Servers that went on where another died.",
            takeovers,
        );
        Answer::Text { text }
    }

    fn drain(&self) -> Answer {
        let mut state = self.state();
        state.draining = true;
        let now = Instant::now();
        for attached in state.attached.values_mut() {
            attached.until = now;
        }
        state.table.drain();
        self.let_go(&mut state);
        drop(state);
        Answer::Status(self.status())
    }

    fn status(&self) -> Status {
        let any = (self.state().table.iter()).any(|(_, entry)| entry.mount.served.is_some());
        let fetched = match any {
            true => self.server.fetched(),
            false => BTreeMap::new(),
        };
        let state = self.state();
        let now = Instant::now();
        let paths = |berth: Berth| {
            let of = state.attached.values().filter(|a| a.of.berth == berth);
            of.map(|attached| attached.path.clone()).collect()
        };
        let mounts = state.table.iter().map(|(_, entry)| MountStatus {
            digest: entry.mount.digest.clone(),
            platform: entry.mount.platform.clone(),
            how: entry.mount.how,
            users: entry.users,
            idle_s: entry.idle(now).as_secs(),
            given: entry.given,
            fetched: (entry.mount.served).map(|id| fetched.get(&id).copied().unwrap_or_default()),
            paths: paths(entry.mount.berth),
        });
        Status {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            draining: state.draining,
            server: self.server.pid(),
            mounts: mounts.collect(),
        }
    }
}

fn kept_name(kept: &Kept) -> String {
    format!("kept-{}", kept.berth.0)
}

fn refused(failure: Failure) -> Answer {
    Answer::Refused {
        code: failure.code,
        why: failure.why,
        hint: failure.hint,
    }
}
