//! The threads that serve one connection to the kernel.
//!
//! A worker reads a request into its slot, answers it and reads the next. Another worker is started only when all are
//! busy, so that an idle mount has one thread. Every request has a deadline: when it is over the watchdog answers EIO
//! in the worker's place. Whoever claims a request first, by its slot's entry in [`InWork`], answers it: worker,
//! watchdog, or the worker that read its INTERRUPT.

use std::io::IoSlice;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::abi::{Request, op, out_header};
use crate::filesystem::FileSystem;
use crate::fuse::{Action, dispatch};
use crate::lock;
use crate::meter::{KINDS, Latency, Meter};
use crate::near::{Near, Seat};
use crate::slots::Slot;

/// How a connection is served.
#[derive(Debug, Clone, Copy)]
pub struct Options {
    /// Most requests worked on at once; at most one a slot.
    pub threads: usize,
    /// After this time a request is answered with EIO.
    pub deadline: Duration,
    /// Serve a reader that is bound to some CPUs on these: for what one user reads.
    pub beside_reader: bool,
}

impl Default for Options {
    /// All slots, and half the time after which Slurm drains a node whose step cannot be killed.
    fn default() -> Self {
        Self {
            threads: crate::slots::SLOTS,
            deadline: Duration::from_secs(30),
            beside_reader: false,
        }
    }
}

/// A request that was in work when this many servers died, one after another, is taken for what killed them and answered
/// with EIO. Far above what a server that others kill again and again loses by bad luck.
const TRIES: u32 = 8;

/// Why serving ended.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum ServeError {
    /// Somebody aborted the connection; what is mounted is dead.
    #[error("the kernel's side of the connection was aborted")]
    Aborted,
    /// Reading requests failed.
    #[error("cannot read requests: {0}")]
    Device(Errno),
}

/// One request in work, as far as others than its worker need to know.
#[derive(Debug, Default)]
struct InWork {
    /// Its number; 0 when it is answered or there is none.
    unique: AtomicU64,
    /// When it came, in milliseconds of the session.
    since: AtomicU64,
}

/// One connection, served until it is unmounted.
#[allow(
    missing_debug_implementations,
    reason = "a file system need not have it"
)]
pub struct Session {
    fs: Arc<dyn FileSystem>,
    device: OwnedFd,
    options: Options,
    started: Instant,
    in_work: Vec<InWork>,
    /// Slots without a worker.
    spare: Mutex<Vec<(usize, Slot)>>,
    idle: AtomicUsize,
    near: Near,
    meter: Meter,
    ended: Sender<Result<(), ServeError>>,
    end: Mutex<Receiver<Result<(), ServeError>>>,
}

/// Serves `device`, a connection that is or will be mounted, until it is unmounted. First answers what an earlier
/// server left in `slots`.
pub fn serve(
    fs: Arc<dyn FileSystem>,
    device: OwnedFd,
    slots: Vec<Slot>,
    options: Options,
) -> Result<(), ServeError> {
    Session::new(fs, device, slots, options).run()
}

impl Session {
    /// A session that answers nothing yet.
    pub fn new(
        fs: Arc<dyn FileSystem>,
        device: OwnedFd,
        slots: Vec<Slot>,
        options: Options,
    ) -> Arc<Self> {
        let (ended, end) = mpsc::channel();
        Arc::new(Session {
            fs,
            device,
            options,
            started: Instant::now(),
            in_work: slots.iter().map(|_| InWork::default()).collect(),
            spare: Mutex::new(slots.into_iter().enumerate().collect()),
            idle: AtomicUsize::new(0),
            near: Near::new(options.beside_reader),
            meter: Meter::default(),
            ended,
            end: Mutex::new(end),
        })
    }

    /// See [`serve`]. Once a session.
    pub fn run(self: &Arc<Self>) -> Result<(), ServeError> {
        // Each left request gets a worker of its own, which goes on serving.
        let mut left = Vec::new();
        {
            let mut spare = lock(&self.spare);
            for at in (0..spare.len()).rev() {
                if spare[at].1.in_use() {
                    left.push(spare.remove(at));
                }
            }
            let most = self.options.threads.max(1).saturating_sub(left.len());
            spare.truncate(most.max(1));
        }
        if !left.is_empty() {
            tracing::info!(requests = left.len(), "took over from a server that died");
        }
        for (index, slot) in left {
            spawn_worker(self, index, slot);
        }
        spawn_spare(self);
        let end = lock(&self.end);
        loop {
            match end.recv_timeout(self.options.deadline / 4) {
                Ok(end) => return end,
                Err(RecvTimeoutError::Timeout) => self.expire(),
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            }
        }
    }

    /// How long the oldest unanswered request has been waiting.
    pub fn oldest(&self) -> Duration {
        let now = self.started.elapsed().as_millis() as u64;
        let waiting = self.in_work.iter().filter_map(|work| {
            let since = work.since.load(Ordering::Relaxed);
            (work.unique.load(Ordering::Acquire) != 0).then(|| now.saturating_sub(since))
        });
        Duration::from_millis(waiting.max().unwrap_or(0))
    }

    /// How long requests took, by kind.
    pub fn latencies(&self) -> [Latency; KINDS.len()] {
        self.meter.read()
    }
}

fn spawn_spare(session: &Arc<Session>) {
    let spare = lock(&session.spare).pop();
    if let Some((index, slot)) = spare {
        spawn_worker(session, index, slot);
    }
}

fn spawn_worker(session: &Arc<Session>, index: usize, slot: Slot) {
    let mine = Arc::clone(session);
    let started = std::thread::Builder::new()
        .name(format!("fuse-{index}"))
        .spawn(move || {
            let end = work(&mine, index, slot);
            // Nobody listens once the first worker has ended.
            let _ = mine.ended.send(end);
        });
    if let Err(error) = started {
        tracing::warn!(%error, "cannot start another worker");
    }
}

fn work(session: &Arc<Session>, index: usize, mut slot: Slot) -> Result<(), ServeError> {
    let mut out = Vec::new();
    let mut seat = session.near.seat();
    if slot.in_use() {
        let tries = slot.count_try();
        session.handle(index, slot.bytes(), tries, &mut seat, &mut out);
    }
    loop {
        slot.clear();
        session.idle.fetch_add(1, Ordering::SeqCst);
        let read = rustix::io::read(&session.device, slot.bytes());
        let idle = session.idle.fetch_sub(1, Ordering::SeqCst) - 1;
        match read {
            Ok(0) => return Ok(()),
            Ok(_) => {
                if idle == 0 {
                    spawn_spare(session);
                }
                session.handle(index, slot.bytes(), 0, &mut seat, &mut out);
            }
            // The request was taken back, or a signal came.
            Err(Errno::NOENT | Errno::INTR | Errno::AGAIN) => {}
            Err(Errno::NODEV) => return Ok(()),
            Err(Errno::CONNABORTED) => return Err(ServeError::Aborted),
            Err(errno) => return Err(ServeError::Device(errno)),
        }
    }
}

impl Session {
    fn handle(&self, index: usize, bytes: &[u8], tries: u32, seat: &mut Seat, out: &mut Vec<u8>) {
        let Some(request) = Request::parse(bytes) else {
            tracing::error!("the kernel sent a request that is cut short");
            return;
        };
        let unique = request.unique;
        let begun = Instant::now();
        out.clear();
        let expects = !matches!(
            request.opcode,
            op::FORGET | op::BATCH_FORGET | op::INTERRUPT
        );
        if expects {
            let now = self.started.elapsed().as_millis() as u64;
            self.in_work[index].since.store(now, Ordering::Relaxed);
            self.in_work[index].unique.store(unique, Ordering::Release);
            let others = (self.in_work.iter().enumerate())
                .any(|(at, work)| at != index && work.unique.load(Ordering::Relaxed) != 0);
            self.near.taken(&request, begun, others, seat);
        }
        let action = match tries >= TRIES {
            false => dispatch(&*self.fs, &request, out),
            true => {
                tracing::error!(opcode = request.opcode, "a request killed its servers");
                Action::Answer(Err(Errno::IO))
            }
        };
        match action {
            Action::Answer(result) => {
                if self.in_work[index].claim(unique) {
                    self.reply(unique, result, out);
                }
                self.meter.count(request.opcode, begun.elapsed());
            }
            Action::Nothing => {}
            Action::Interrupt(other) => self.interrupt(unique, other),
        }
        // A big answer's memory is not kept for every worker for ever.
        if out.capacity() > 1 << 18 {
            out.shrink_to(1 << 18);
        }
    }

    /// Ends request `other` at once, or asks the kernel to say it again if its worker has not begun.
    fn interrupt(&self, unique: u64, other: u64) {
        if self.in_work.iter().any(|work| work.claim(other)) {
            self.reply(other, Err(Errno::INTR), &[]);
        } else {
            self.reply(unique, Err(Errno::AGAIN), &[]);
        }
    }

    /// Answers what is over its deadline.
    fn expire(&self) {
        let now = self.started.elapsed().as_millis() as u64;
        let deadline = self.options.deadline.as_millis() as u64;
        for work in &self.in_work {
            let unique = work.unique.load(Ordering::Acquire);
            let late = now.saturating_sub(work.since.load(Ordering::Relaxed)) > deadline;
            if unique != 0 && late && work.claim(unique) {
                tracing::warn!(unique, "a request was not answered in time");
                self.reply(unique, Err(Errno::IO), &[]);
            }
        }
    }

    fn reply(&self, unique: u64, result: Result<(), Errno>, body: &[u8]) {
        let (errno, body) = match result {
            Ok(()) => (0, body),
            Err(errno) => (errno.raw_os_error(), &[][..]),
        };
        let header = out_header(unique, errno, body.len());
        let parts = [IoSlice::new(&header), IoSlice::new(body)];
        match rustix::io::writev(&self.device, &parts) {
            // Interrupted, answered by an earlier server, or unmounted.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV) => {}
            Err(error) => {
                tracing::warn!(unique, %error, "an answer was not taken");
                // Whoever asked is still waiting; an error is little enough to be taken.
                let header = out_header(unique, Errno::IO.raw_os_error(), 0);
                let _ = rustix::io::write(&self.device, &header);
            }
        }
    }
}

impl InWork {
    fn claim(&self, unique: u64) -> bool {
        self.unique
            .compare_exchange(unique, 0, Ordering::AcqRel, Ordering::Relaxed)
            .is_ok()
    }
}
