//! Whole images of this node: copies that root made of what the server had fetched, verified, and lets the kernel mount.
//!
//! The server that fetches runs as a user of its own, and could change its files under the kernel's driver. So what is
//! mounted is another file: made by root, in a folder of root's alone, never open for writing anywhere else, and hashed
//! after it was made, until the root of its tree is the one of the signed record. Files of an earlier keeper are hashed
//! again before they are mounted: a power cut or a bad disk is found out, and nothing has to be believed.
//!
//! Root does this itself, in a thread. It is reads, SHA-256 and writes over a length that is known ([`verity`],
//! [`folder`]), with nothing to parse; a process with fewer rights would hold a descriptor that can write to what the
//! kernel is to read, and would have to be kept from everybody's hands by more code than it runs.
//!
//! One thing is done at a time, by a thread that others do not wait for: the heavy part runs at the lowest priority and
//! takes no lock. Whatever fails, images are served on demand as before.
//!
//! - [`list`]: which there are, and which go;
//! - [`folder`]: the files;
//! - [`verity`]: the root of a file's tree.

mod folder;
mod list;
mod verity;

use std::collections::{HashMap, HashSet, VecDeque};
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use berth_config::{MountMode, Node};
use berth_mount::{ImageFile, LoopDevice, keeper};

pub(crate) use folder::of_chunks;
use folder::{Folder, copy};
use list::List;
use verity::{file_len, root_of};

use crate::image::root;
use crate::setup::Failure;

/// How long an image of which no copy could be made is left alone: its server could say without end that it is whole.
const REST: Duration = Duration::from_secs(600);
/// The same where copies that are mounted left no room for it.
const NO_ROOM: Duration = Duration::from_secs(5);
/// Priority of copying and hashing: processors and disks are the jobs'.
const NICE: i32 = 19;

/// What a copy is a copy of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Id {
    /// The sealed root of the image's hash tree.
    pub(crate) root: [u8; 32],
    /// Bytes of the SquashFS part.
    pub(crate) data: u64,
}

impl Id {
    pub(crate) fn root_hex(&self) -> String {
        self.root.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// Of its file.
    fn name(&self) -> String {
        format!("{}-{}", self.root_hex(), self.data)
    }

    fn from_name(name: &str) -> Option<Self> {
        let (hex, data) = name.split_once('-')?;
        let id = Self {
            root: root(hex).ok()?,
            data: data.parse().ok()?,
        };
        file_len(id.data)?;
        (id.name() == name).then_some(id)
    }

    /// Of its loop device.
    fn label(&self) -> String {
        crate::image::label(&self.root_hex())
    }
}

#[derive(Debug)]
enum Job {
    /// A file that an earlier keeper left.
    Verify(Id),
    /// An image that a server says it has all of.
    Copy {
        id: Id,
        /// The server's number for it.
        served: u64,
        /// For people.
        digest: String,
    },
}

#[derive(Debug, Default)]
struct State {
    list: List,
    /// Most bytes of copies and the server's cache together, once the folder is known.
    limit: u64,
    jobs: VecDeque<Job>,
    resting: HashMap<Id, Instant>,
    stopped: bool,
    made: u64,
    failed: u64,
}

/// What the service counted since its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Counted {
    pub(crate) made: u64,
    pub(crate) failed: u64,
}

/// Hears that something may have changed; the number is the server's for an image of which there is a copy now.
pub(crate) type Told<'a> = dyn Fn(Option<u64>) + 'a;

/// See the module's head.
#[derive(Debug)]
pub(crate) struct Copies {
    /// The cache's folder; `None` where the site keeps the kernel's driver away from images.
    cache_dir: Option<PathBuf>,
    cache_bytes: u64,
    folder: OnceLock<Folder>,
    state: Mutex<State>,
    news: Condvar,
}

impl Copies {
    /// Looks at what an earlier keeper left.
    pub(crate) fn new(node: &Node) -> Self {
        let service = &node.service;
        let wanted = node.mount != MountMode::Lazy;
        let copies = Self {
            cache_dir: wanted.then(|| service.cache_dir.clone()),
            cache_bytes: service.cache_bytes,
            folder: OnceLock::new(),
            state: Mutex::default(),
            news: Condvar::new(),
        };
        if let Err(failure) = copies.take_over(&service.cache_dir) {
            tracing::error!(why = failure.why, "images are served on demand");
        }
        copies
    }

    fn take_over(&self, cache_dir: &Path) -> Result<(), Failure> {
        let Some(folder) = Folder::find(cache_dir)? else {
            return Ok(());
        };
        let left = folder.list();
        let mut left = left.map_err(|e| Failure::system("cannot list whole images", e))?;
        if self.cache_dir.is_none() {
            left.iter().for_each(|(id, _)| folder.remove(id));
            return Ok(());
        }
        left.sort_by_key(|(_, last)| std::cmp::Reverse(*last));
        let folder = self.settle(folder)?;
        let mut state = self.state();
        for (id, last) in left {
            state.list.add(id, last, false);
            state.jobs.push_back(Job::Verify(id));
        }
        drop(state);
        // The site may have lowered the limit.
        self.make_room(folder, 0);
        Ok(())
    }

    /// From now on this is the folder, and the limit is known.
    fn settle(&self, folder: Folder) -> Result<&Folder, Failure> {
        let limit = match self.cache_bytes {
            0 => {
                let disk = folder.disk();
                disk.map_err(|e| Failure::system("the cache's disk", e))? / 10
            }
            bytes => bytes,
        };
        let mut state = self.state();
        state.limit = limit;
        // The server needs room to bring other images.
        state.list.most = limit / 2;
        drop(state);
        Ok(self.folder.get_or_init(|| folder))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has a copy made of what a server says it has all of.
    pub(crate) fn want(&self, id: Id, served: u64, digest: &str) {
        if self.cache_dir.is_none() {
            return;
        }
        let mut state = self.state();
        let queued = |job: &Job| matches!(job, Job::Copy { id: other, .. } if *other == id);
        if state.jobs.iter().any(queued) || state.stopped {
            return;
        }
        state.jobs.push_back(Job::Copy {
            id,
            served,
            digest: digest.to_owned(),
        });
        drop(state);
        self.news.notify_all();
    }

    /// Whether there is a copy, be it one that has to be verified again first.
    pub(crate) fn knows(&self, id: &Id) -> bool {
        self.state().list.has(id)
    }

    /// Whether there is a copy that may be mounted.
    pub(crate) fn has(&self, id: &Id) -> bool {
        self.state().list.is_verified(id)
    }

    /// A copy that may be mounted. One whose file is gone is forgotten.
    pub(crate) fn open(&self, id: &Id) -> io::Result<File> {
        if !self.has(id) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let opened = self.open_any(id);
        match &opened {
            // For the next keeper.
            Ok(file) => drop(file.set_modified(SystemTime::now())),
            Err(_) => self.state().list.remove(id),
        }
        opened
    }

    /// A copy that may not have been verified: for who checks what is read of it.
    pub(crate) fn open_any(&self, id: &Id) -> io::Result<File> {
        let folder = self.folder.get().ok_or(io::ErrorKind::NotFound)?;
        folder.open_copy(id)
    }

    /// A mount of it is given out.
    pub(crate) fn used(&self, id: &Id) {
        self.state().list.used(id, SystemTime::now());
    }

    /// What copies leave of the limit to the server's cache; `None` while there never was one.
    pub(crate) fn left(&self) -> Option<u64> {
        self.folder.get()?;
        let state = self.state();
        Some(state.limit.saturating_sub(state.list.bytes()))
    }

    pub(crate) fn status(&self) -> keeper::Copies {
        let state = self.state();
        keeper::Copies {
            count: state.list.count(),
            bytes: state.list.bytes(),
            limit: state.list.most,
        }
    }

    pub(crate) fn counted(&self) -> Counted {
        let state = self.state();
        Counted {
            made: state.made,
            failed: state.failed,
        }
    }

    /// Begins nothing any more.
    pub(crate) fn stop(&self) {
        self.state().stopped = true;
        self.news.notify_all();
    }

    /// The life of the thread that makes and verifies copies; `told` hears when it is done with one.
    pub(crate) fn run(&self, told: &Told<'_>) {
        while let Some(job) = self.next() {
            let copied = match job {
                Job::Verify(id) => {
                    self.verify(&id);
                    None
                }
                Job::Copy { id, served, digest } => {
                    let there = self.has(&id) || self.make(&id, &digest);
                    there.then_some(served)
                }
            };
            told(copied);
        }
    }

    fn next(&self) -> Option<Job> {
        let mut state = self.state();
        loop {
            if state.stopped {
                return None;
            }
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            state = self
                .news
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Whether a file that was left is what its name says. Any other goes.
    fn verify(&self, id: &Id) {
        // No room was left for it.
        if !self.knows(id) {
            return;
        }
        let Some(folder) = self.folder.get() else {
            return;
        };
        let opened = folder.open_copy(id);
        let right = opened.and_then(|file| gently(|| root_of(&file, id.data)));
        let why = match right {
            Ok(Some(root)) if root == id.root => {
                self.state().list.verified(id);
                return;
            }
            Ok(_) => "it is not what was sealed".to_owned(),
            Err(error) => error.to_string(),
        };
        tracing::warn!(name = id.name(), why, "a whole image is thrown away");
        folder.remove(id);
        let mut state = self.state();
        state.list.remove(id);
        state.failed += 1;
    }

    fn make(&self, id: &Id, digest: &str) -> bool {
        let now = Instant::now();
        {
            let mut state = self.state();
            state.resting.retain(|_, until| *until > now);
            // Verified in its turn, or known not to come of anything.
            if state.list.has(id) || state.resting.contains_key(id) {
                return false;
            }
        }
        let made = self.try_make(id);
        let mut state = self.state();
        match made {
            Ok(()) => {
                state.made += 1;
                state.list.add(*id, SystemTime::now(), true);
                let bytes = file_len(id.data);
                drop(state);
                let ms = now.elapsed().as_millis();
                tracing::info!(digest, bytes, ms, "an image is whole on this node");
                true
            }
            Err(failure) => {
                state.failed += 1;
                let rest = match failure.code {
                    Failure::UNAVAILABLE => NO_ROOM,
                    _ => REST,
                };
                state.resting.insert(*id, Instant::now() + rest);
                drop(state);
                tracing::warn!(
                    digest,
                    why = failure.why,
                    "no copy of an image that is here"
                );
                false
            }
        }
    }

    fn try_make(&self, id: &Id) -> Result<(), Failure> {
        let failed = |what: &'static str| move |e: io::Error| Failure::system(what, e);
        let folder = match (self.folder.get(), &self.cache_dir) {
            (Some(folder), _) => folder,
            (None, Some(cache_dir)) => self.settle(Folder::ensure(cache_dir)?)?,
            (None, None) => return Err(Failure::new(Failure::INTERNAL, "no folder")),
        };
        let bytes = file_len(id.data)
            .ok_or_else(|| Failure::new(Failure::INTERNAL, "no image is so long"))?;
        if !self.make_room(folder, bytes) {
            let line = "copies may take half of `node.service.cache_bytes`, and that is in use";
            return Err(Failure::new(Failure::UNAVAILABLE, line));
        }
        let chunks = folder.open_chunks(id).map_err(failed("the cache's file"))?;
        let file = folder.nameless().map_err(failed("a file for it"))?;
        let root = gently(|| {
            copy(&chunks, &file, bytes)?;
            root_of(&file, id.data)
        });
        if root.map_err(failed("copying"))? != Some(id.root) {
            let line = "what the cache has is not what was sealed";
            return Err(Failure::new(Failure::PERMISSION, line));
        }
        folder.remove(id);
        folder
            .publish(&file, id)
            .map_err(failed("giving it a name"))
    }

    /// Throws out copies that nobody has mounted so that so many bytes more have room; `false` if that were not enough.
    fn make_room(&self, folder: &Folder, bytes: u64) -> bool {
        let ids = self.state().list.ids();
        let held = ids.into_iter().filter(|id| is_mounted(folder, id));
        let held: HashSet<Id> = held.collect();
        let mut state = self.state();
        let Some(gone) = state.list.room_for(bytes, &held) else {
            return false;
        };
        // Who asks for one from now on gets it on demand; who has just opened it reads on.
        gone.iter().for_each(|id| state.list.remove(id));
        drop(state);
        gone.iter().for_each(|id| folder.remove(id));
        true
    }
}

/// Whether the kernel reads it, for whatever mount of whomever.
fn is_mounted(folder: &Folder, id: &Id) -> bool {
    folder.open_copy(id).is_ok_and(|file| {
        let image = ImageFile {
            file: file.as_fd(),
            data_size: id.data,
            label: &id.label(),
        };
        LoopDevice::find(image).is_ok_and(|device| device.is_some())
    })
}

/// In a thread that gives way to everything else on the node. It takes no lock that others wait for.
fn gently<T: Send>(work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("copy".into());
        let started = thread.spawn_scoped(scope, || {
            // Of this thread alone (setpriority(2)); the disk's priority follows.
            let _ = rustix::process::setpriority_process(None, NICE);
            work()
        })?;
        started
            .join()
            .unwrap_or_else(|_| Err(io::Error::other("a thread ended")))
    })
}
