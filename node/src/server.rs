//! Root's side of the process that serves images on demand.
//!
//! Everything that must outlive that process is held here: each image's connection to the kernel, the memory of its
//! requests, its file. The process is started when there is something to serve, under a user of its own; when it dies
//! another one gets all of it again, and readers have only waited. One that does not answer is killed; if servers die
//! again and again, the connections are closed, and readers get an error instead of waiting for ever.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use berth_config::{NodeService, ServeMode};
use berth_mount::fuse::{detached, open_device, read_further_ahead, request_memory};
use berth_mount::keeper::{MountRequest, Source, decode, encode};
use berth_mount::packets::Packets;
use berth_mount::serving::{Order, Report, Served};
use nix::unistd::User;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use crate::copies::of_chunks;
use crate::setup::{Failure, program};
use crate::shelf::{Left, Shelf};

/// Requests are answered, with an error if need be, after this time: half of Slurm's UnkillableStepTimeout.
const DEADLINE: Duration = Duration::from_secs(30);
/// How long an image may take to open.
const OPENING: Duration = Duration::from_secs(45);
/// How often the server is asked how it stands, and how long it may take to say so.
const ROUND: Duration = Duration::from_secs(10);
/// How long the server may take to read an order.
const SAYING: Duration = Duration::from_secs(5);
/// How long whoever asks for figures waits for the server's.
const TELLING: Duration = Duration::from_secs(1);
/// So many deaths within [`WINDOW`] are too many.
const MOST_DEATHS: usize = 60;
const WINDOW: Duration = Duration::from_secs(60);

/// One image that is served.
#[derive(Debug)]
struct Connection {
    served: Served,
    device: OwnedFd,
    memory: OwnedFd,
    image: Option<OwnedFd>,
    /// What the server said of it, once it has.
    opened: Option<Result<(), String>>,
}

#[derive(Debug, Default)]
struct State {
    link: Option<Arc<Packets>>,
    pid: Option<u32>,
    connections: BTreeMap<u64, Connection>,
    next: u64,
    metrics: String,
    /// Bytes brought for each image that is served now.
    fetched: Vec<(u64, u64)>,
    /// Servers that took over from one that died.
    takeovers: u64,
    stopping: bool,
}

impl State {
    /// What an earlier keeper left; its server ends, so that the next one can take over.
    fn with(left: &mut Left) -> Self {
        if let Some(server) = left.get("server") {
            let _ = pidfd_send_signal(&server, Signal::KILL);
            let patience = Timespec::try_from(SAYING).ok();
            let _ = poll(
                &mut [PollFd::new(&server, PollFlags::IN)],
                patience.as_ref(),
            );
        }
        let mut state = Self::default();
        for (id, served) in left.described::<Served>("served") {
            let (device, memory) = (left.get(&name("device", id)), left.get(&name("memory", id)));
            let (Some(device), Some(memory)) = (device, memory) else {
                continue;
            };
            state.next = state.next.max(id + 1);
            let connection = Connection {
                served: Served {
                    taken_over: true,
                    ..served
                },
                device,
                memory,
                image: left.get(&name("image", id)),
                opened: Some(Ok(())),
            };
            state.connections.insert(id, connection);
        }
        state.takeovers = u64::from(!state.connections.is_empty());
        state
    }
}

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Server {
    program: PathBuf,
    arguments: Vec<String>,
    cache: PathBuf,
    /// What copies of whole images leave to the cache, where there are any.
    limit: Mutex<Option<u64>>,
    user: Result<(u32, u32), String>,
    /// Images are served as one file each.
    pub(crate) block: bool,
    shelf: Arc<Shelf>,
    state: Mutex<State>,
    changed: Condvar,
}

/// What the service has to know.
pub(crate) enum News {
    /// Nobody answers for this one any more.
    Ended(u64),
    /// The server says that it has all of this one.
    Whole(Served),
}

pub(crate) type Hears = dyn Fn(News) + Send;

impl Server {
    /// Starts nothing yet. A user that does not exist is told to those who ask for an image on demand.
    pub(crate) fn new(
        service: &NodeService,
        shelf: Arc<Shelf>,
        left: &mut Left,
    ) -> Result<Self, Failure> {
        let own = std::env::current_exe().map_err(|e| Failure::system("own path", e))?;
        let mut arguments = vec![
            "node".to_owned(),
            format!("--deadline={}", DEADLINE.as_secs()),
        ];
        if service.cache_bytes > 0 {
            arguments.push(format!("--cache-limit={}", service.cache_bytes));
        }
        arguments.push(format!("--record={}", service.record_s));
        arguments.push(format!("--fill={}", service.fill_bytes_per_s));
        arguments.extend(service.proxy.iter().map(|proxy| format!("--proxy={proxy}")));
        Ok(Self {
            program: program(&own, "berth-fuse"),
            arguments,
            cache: service.cache_dir.clone(),
            limit: Mutex::default(),
            user: user(&service.user),
            block: service.mode == ServeMode::Block,
            shelf,
            state: Mutex::new(State::with(left)),
            changed: Condvar::new(),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has an image served; gives its number and a detached mount of it once it can be read.
    pub(crate) fn serve(
        &self,
        request: &MountRequest,
        image: Option<OwnedFd>,
    ) -> Result<(u64, OwnedFd), Failure> {
        if let Err(why) = &self.user {
            return Err(Failure::new(Failure::CONFIG, why.clone())
                .hint("make that user, or name another one as `node.service.user`"));
        }
        let system = |e: &dyn std::fmt::Display| {
            Failure::new(Failure::INTERNAL, format!("cannot serve an image: {e}"))
        };
        let device = open_device().map_err(|e| system(&e))?;
        let tree = detached(device.as_fd()).map_err(|e| system(&e))?;
        if let Err(error) = read_further_ahead(tree.as_fd()) {
            tracing::debug!(%error, "the kernel reads ahead as it likes");
        }
        let memory = request_memory().map_err(|e| system(&e))?;
        let mut state = self.state();
        let id = state.next;
        state.next += 1;
        let connection = Connection {
            served: Served {
                id,
                digest: request.digest.clone(),
                verity_root: request.verity_root.clone(),
                hash_offset: request.hash_offset,
                sources: request.sources.clone(),
                block: self.block,
                taken_over: false,
            },
            device,
            memory,
            image,
            opened: None,
        };
        let parcel = state.link.clone().zip(connection.parcel().ok());
        state.connections.insert(id, connection);
        self.changed.notify_all();
        if let Some((link, parcel)) = parcel {
            drop(state);
            // A failure is the server's end, which the thread that listens to it sees too.
            let _ = parcel.send(&link);
            state = self.state();
        }
        let deadline = Instant::now() + OPENING;
        loop {
            let opened = state.connections.get(&id).map(|c| c.opened.clone());
            let failed = match opened {
                Some(Some(Ok(()))) => {
                    if let Some(connection) = state.connections.get(&id) {
                        connection.leave(&self.shelf);
                    }
                    return Ok((id, tree));
                }
                Some(Some(Err(why))) => why,
                Some(None) if Instant::now() < deadline => {
                    let left = deadline.saturating_duration_since(Instant::now());
                    let waited = self.changed.wait_timeout(state, left);
                    state = waited.unwrap_or_else(PoisonError::into_inner).0;
                    continue;
                }
                Some(None) => "its sources do not answer".to_owned(),
                None => "its server failed".to_owned(),
            };
            state.connections.remove(&id);
            let line = format!("cannot open the image {}: {failed}", request.digest);
            return Err(Failure::new(Failure::UNAVAILABLE, line));
        }
    }

    /// What is served goes on with a later request's grants: its own would end with the first user's.
    pub(crate) fn renew(&self, id: u64, sources: &[Source]) {
        let (link, sources) = {
            let mut state = self.state();
            let link = state.link.clone();
            let Some(connection) = state.connections.get_mut(&id) else {
                return;
            };
            if !connection.served.renew(sources) {
                return;
            }
            let described = &connection.served;
            self.shelf.describe(&name("served", id), described);
            (link, described.sources.clone())
        };
        // Without a link the next server hears of them.
        if let (Some(link), Ok(order)) = (link, encode(&Order::Renew { id, sources })) {
            let _ = link.send(&order, &[], Instant::now() + SAYING);
        }
    }

    /// The cache may take so many bytes from now on.
    pub(crate) fn limit_cache(&self, bytes: u64) {
        if self.limit().replace(bytes) != Some(bytes) {
            self.order(&Order::Limit { bytes });
        }
    }

    fn limit(&self) -> MutexGuard<'_, Option<u64>> {
        self.limit.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// There is a copy of an image that the server has all of.
    pub(crate) fn copied(&self, id: u64) {
        self.order(&Order::Copied { id });
    }

    /// The next server would not miss it.
    fn order(&self, order: &Order) {
        let link = self.state().link.clone();
        if let (Some(link), Ok(order)) = (link, encode(order)) {
            let _ = link.send(&order, &[], Instant::now() + SAYING);
        }
    }

    /// The life of the thread that keeps a server running; `news` hears what becomes of images.
    pub(crate) fn run(&self, news: &Hears) {
        let mut deaths = VecDeque::new();
        loop {
            let mut state = self.state();
            while state.connections.is_empty() && !state.stopping {
                state = (self.changed.wait(state)).unwrap_or_else(PoisonError::into_inner);
            }
            if state.stopping {
                return;
            }
            drop(state);
            if let Err(error) = self.one_life(news) {
                tracing::error!(%error, program = %self.program.display(), "cannot start the server");
                self.give_up(news);
                continue;
            }
            let now = Instant::now();
            deaths.push_back(now);
            while deaths.front().is_some_and(|death| now - *death > WINDOW) {
                deaths.pop_front();
            }
            if deaths.len() > MOST_DEATHS {
                tracing::error!(
                    deaths = deaths.len(),
                    "servers die again and again: closing all connections"
                );
                self.give_up(news);
                deaths.clear();
            }
        }
    }

    /// Closes every connection: who reads gets an error.
    fn give_up(&self, news: &Hears) {
        let gone = std::mem::take(&mut self.state().connections);
        self.changed.notify_all();
        for id in gone.into_keys() {
            forget(&self.shelf, id);
            news(News::Ended(id));
        }
    }

    /// One server, from its start to its end.
    fn one_life(&self, news: &Hears) -> io::Result<()> {
        let (link, mut child) = self.start()?;
        let link = Arc::new(link);
        tracing::info!(pid = child.id(), "serving on demand");
        self.shelf.remove("server");
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pid = pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok());
        if let Some(pid) = pid {
            self.shelf.put("server", pid);
        }
        let parcels: io::Result<Vec<Parcel>> = {
            let mut state = self.state();
            state.link = Some(Arc::clone(&link));
            state.pid = Some(child.id());
            state.connections.values().map(Connection::parcel).collect()
        };
        let limit = *self.limit();
        if let Some(bytes) = limit {
            self.order(&Order::Limit { bytes });
        }
        let sent = parcels.and_then(|all| all.iter().try_for_each(|parcel| parcel.send(&link)));
        match sent {
            Ok(()) => self.listen(&link, news),
            Err(error) => tracing::error!(%error, "cannot tell the server what to serve"),
        }
        let stopping = {
            let mut state = self.state();
            state.link = None;
            state.pid = None;
            let readable = state
                .connections
                .values_mut()
                .filter(|c| c.opened.is_some());
            let mut left = 0;
            for connection in readable {
                connection.served.taken_over = true;
                left += 1;
            }
            state.takeovers += u64::from(left > 0);
            state.stopping
        };
        if !stopping {
            let _ = child.kill();
        }
        drop(link);
        match stopping {
            // It serves on for those who still read.
            true => {}
            false => {
                let status = child.wait()?;
                tracing::warn!(%status, "the server ended");
            }
        }
        Ok(())
    }

    fn start(&self) -> io::Result<(Packets, Child)> {
        let (uid, gid) = self.user.clone().map_err(io::Error::other)?;
        let cache = of_chunks(&self.cache, uid, gid)?;
        let (ours, theirs) = Packets::pair()?;
        let child = Command::new(&self.program)
            .args(&self.arguments)
            .arg(format!("--cache={}", cache.display()))
            .env("MALLOC_ARENA_MAX", "4")
            .env_remove("NOTIFY_SOCKET")
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::null())
            .current_dir("/")
            .uid(uid)
            .gid(gid)
            .spawn()?;
        Ok((ours, child))
    }

    /// Hears the server until it ends or has nothing to say for too long.
    fn listen(&self, link: &Packets, news: &Hears) {
        let mut asked = None;
        loop {
            let bytes = match link.receive_bytes(Some(Instant::now() + ROUND)) {
                Ok(Some(bytes)) => bytes,
                Ok(None) => return,
                Err(error) if error.kind() == io::ErrorKind::TimedOut => {
                    if asked.is_some_and(|asked: Instant| asked.elapsed() > ROUND) {
                        tracing::error!("the server does not answer: killing it");
                        return;
                    }
                    if self.ask(link).is_err() {
                        return;
                    }
                    asked = asked.or(Some(Instant::now()));
                    continue;
                }
                Err(error) => {
                    tracing::error!(%error, "cannot hear the server");
                    return;
                }
            };
            let report = match decode::<Report>(&bytes) {
                Ok(report) => report,
                Err(why) => {
                    tracing::error!(why, "of the server");
                    return;
                }
            };
            match report {
                Report::Ready { id } => self.opened(id, Ok(())),
                Report::Failed { id, why } => self.opened(id, Err(why)),
                Report::Ended { id } => {
                    let gone = self.state().connections.remove(&id);
                    self.changed.notify_all();
                    if gone.is_some() {
                        forget(&self.shelf, id);
                        news(News::Ended(id));
                    }
                }
                Report::Whole { id } => {
                    let state = self.state();
                    let served = state.connections.get(&id).map(|c| c.served.clone());
                    drop(state);
                    if let Some(served) = served {
                        news(News::Whole(served));
                    }
                }
                Report::Standing {
                    oldest_ms,
                    metrics,
                    fetched,
                } => {
                    asked = None;
                    let mut state = self.state();
                    state.metrics = metrics;
                    state.fetched = fetched;
                    drop(state);
                    self.changed.notify_all();
                    if Duration::from_millis(oldest_ms) > DEADLINE * 2 {
                        tracing::error!(
                            oldest_ms,
                            "the server leaves a request unanswered: killing it"
                        );
                        return;
                    }
                }
            }
        }
    }

    fn opened(&self, id: u64, result: Result<(), String>) {
        let mut state = self.state();
        if let Some(connection) = state.connections.get_mut(&id) {
            connection.opened = Some(result);
        }
        self.changed.notify_all();
    }

    fn ask(&self, link: &Packets) -> io::Result<()> {
        link.send(&encode(&Order::Tell)?, &[], Instant::now() + SAYING)
    }

    /// The server's process, where one runs.
    pub(crate) fn pid(&self) -> Option<u32> {
        self.state().pid
    }

    /// What the server counted, and how often another one took over.
    pub(crate) fn metrics(&self) -> (String, u64) {
        let state = self.standing();
        (state.metrics.clone(), state.takeovers)
    }

    /// Bytes brought for each image that is served now, by its number.
    pub(crate) fn fetched(&self) -> BTreeMap<u64, u64> {
        self.standing().fetched.iter().copied().collect()
    }

    /// The state with the server's figures of now, where it answers in time.
    fn standing(&self) -> MutexGuard<'_, State> {
        let link = {
            let mut state = self.state();
            state.metrics.clear();
            state.link.clone()
        };
        let asked = link.filter(|link| self.ask(link).is_ok());
        let mut state = self.state();
        if let Some(link) = asked {
            let deadline = Instant::now() + TELLING;
            // Another server was not asked.
            let same = |state: &State| state.link.as_ref().is_some_and(|l| Arc::ptr_eq(l, &link));
            while state.metrics.is_empty() && same(&state) && Instant::now() < deadline {
                let left = deadline.saturating_duration_since(Instant::now());
                let waited = self.changed.wait_timeout(state, left);
                state = waited.unwrap_or_else(PoisonError::into_inner).0;
            }
        }
        state
    }

    /// The service ends: the server goes on by itself until nobody reads.
    pub(crate) fn leave(&self) {
        let mut state = self.state();
        state.stopping = true;
        self.changed.notify_all();
    }
}

fn name(part: &str, id: u64) -> String {
    format!("{part}-{id}")
}

/// Nothing of it is for the next keeper.
fn forget(shelf: &Shelf, id: u64) {
    for part in ["served", "device", "memory", "image"] {
        shelf.remove(&name(part, id));
    }
}

impl Connection {
    /// Everything of it is for the next keeper.
    fn leave(&self, shelf: &Shelf) {
        let id = self.served.id;
        shelf.put(&name("device", id), &self.device);
        shelf.put(&name("memory", id), &self.memory);
        if let Some(image) = &self.image {
            shelf.put(&name("image", id), image);
        }
        shelf.describe(&name("served", id), &self.served);
    }

    /// For the server, to be sent when no lock is held.
    fn parcel(&self) -> io::Result<Parcel> {
        let mut descriptors = vec![self.device.try_clone()?, self.memory.try_clone()?];
        if let Some(image) = &self.image {
            descriptors.push(image.try_clone()?);
        }
        Ok(Parcel {
            order: encode(&Order::Serve(self.served.clone()))?,
            descriptors,
        })
    }
}

/// An order and its descriptors.
struct Parcel {
    order: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

impl Parcel {
    fn send(&self, link: &Packets) -> io::Result<()> {
        let descriptors: Vec<BorrowedFd<'_>> = self.descriptors.iter().map(AsFd::as_fd).collect();
        link.send(&self.order, &descriptors, Instant::now() + SAYING)
    }
}

/// A name, or a number that needs no entry.
fn user(name: &str) -> Result<(u32, u32), String> {
    match name.parse::<u32>() {
        Ok(0) => return Err(format!("the user `{name}` is root")),
        Ok(number) => return Ok((number, number)),
        Err(_) => {}
    }
    match User::from_name(name) {
        Ok(Some(user)) if !user.uid.is_root() => Ok((user.uid.as_raw(), user.gid.as_raw())),
        Ok(Some(_)) => Err(format!("the user `{name}` is root")),
        Ok(None) => Err(format!("there is no user `{name}`")),
        Err(error) => Err(format!("the user `{name}` cannot be looked up: {error}")),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn root_does_not_serve_images_however_it_is_written() {
        for name in ["0", "00", "+0", "root"] {
            assert!(super::user(name).is_err(), "{name}");
        }
        assert_eq!(super::user("64304"), Ok((64304, 64304)));
    }
}
