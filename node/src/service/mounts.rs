//! Making mounts, giving them out, and letting go of them.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use berth_mount::keeper::{Answer, How, Mode, MountRequest};
use berth_mount::serving::BLOCK_FILE;
use berth_mount::{ImageFile, LoopDevice};
use rustix::fs::{Mode as Bits, OFlags};

use super::{Attached, Kept, Service, State, Use};
use crate::image::{Bytes, Key};
use crate::setup::Failure;
use crate::table::Entry;

/// How long a request waits for another one that makes the same mount.
const MAKING: Duration = Duration::from_secs(60);
/// How often a user's folder that is over its time, and in use, is looked at.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// Folders at a time: a user's, and all users'.
const PLACES: usize = 64;
const ALL_PLACES: usize = 512;

impl Service {
    /// Drops what need not be kept.
    pub(super) fn let_go(&self, state: &mut State) {
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

    pub(super) fn drop_kept(&self, kept: &Kept) {
        self.den.drop_of(kept.berth);
        self.shelf.remove(&kept_name(kept));
    }

    /// A mount that is kept, or one made now and kept.
    pub(super) fn mount(
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
            Some(kept) => {
                if let Some(id) = kept.served {
                    self.server.renew(id, &request.sources);
                }
                (kept, true)
            }
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
    pub(super) fn attach(
        &self,
        request: &MountRequest,
        image: Option<OwnedFd>,
    ) -> Result<Answer, Failure> {
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
                let made = if mine.count() >= PLACES {
                    Err(std::io::Error::other("this user has too many of them"))
                } else if state.attached.len() >= ALL_PLACES {
                    Err(std::io::Error::other("this node has too many of them"))
                } else {
                    self.places.attach(tree.as_fd(), request.uid, &name)
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
    pub(super) fn take_or_begin(&self, key: &Key) -> Result<Option<Kept>, Failure> {
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

    pub(super) fn make(
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

    pub(super) fn by_kernel(
        &self,
        request: &MountRequest,
        image: &OwnedFd,
    ) -> Result<OwnedFd, Failure> {
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
    pub(super) fn served_no_more(&self, id: u64) {
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
}

fn kept_name(kept: &Kept) -> String {
    format!("kept-{}", kept.berth.0)
}
