//! Making mounts, giving them out, and letting go of them.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use berth_mount::keeper::{Answer, How, Mode, MountRequest};
use berth_mount::serving::{BLOCK_FILE, Served};
use berth_mount::{ImageFile, LoopDevice};
use rustix::fs::{Mode as Bits, OFlags};

use super::{Attached, Kept, Service, State, Use};
use crate::copies::Id;
use crate::image::{Bytes, Key, label, root};
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
        let mut gone = (state.table).unused(self.recording(), now, |key| self.is_copied(key));
        gone.extend(state.table.expired(Instant::now()));
        for kept in gone {
            tracing::info!(digest = kept.digest, how = ?kept.how, "let go of an unused mount");
            self.drop_kept(&kept);
        }
    }

    /// Whether whoever asks next gets the node's copy, and not this.
    pub(super) fn is_copied(&self, key: &Key) -> bool {
        key.bytes == Bytes::Demand && self.copies.has(&key.id())
    }

    /// A mount on demand that nobody needs is left so long: its server may record a start for other nodes.
    pub(super) fn recording(&self) -> Duration {
        Duration::from_secs(self.prepared.service().record_s)
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
            (_, Mode::Lazy) => Key::of_root(request)?,
            (None, Mode::Auto) => {
                let key = Key::of_root(request)?;
                if let Some(given) = self.mount_copy(&key, request) {
                    return Ok(given);
                }
                key
            }
        };
        self.mount_of(key, request, image)
    }

    /// A mount of the node's own copy, where there is one. Whatever is wrong with it, the image is served on demand.
    fn mount_copy(&self, key: &Key, request: &MountRequest) -> Option<(Answer, OwnedFd, Use)> {
        let key = key.with(Bytes::Copy);
        let id = key.id();
        // One that an earlier keeper verified and mounted is good until its file turns out not to be.
        let kept = || self.copies.knows(&id) && self.state().table.has(&key);
        if !self.copies.has(&id) && !kept() {
            return None;
        }
        match self.mount_of(key, request, None) {
            Ok(given) => {
                self.copies.used(&id);
                Some(given)
            }
            Err(failure) => {
                let (digest, why) = (&request.digest, &failure.why);
                tracing::warn!(digest, why, "a whole image is served on demand");
                None
            }
        }
    }

    fn mount_of(
        &self,
        key: Key,
        request: &MountRequest,
        image: Option<OwnedFd>,
    ) -> Result<(Answer, OwnedFd, Use), Failure> {
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
            (Bytes::Copy, _) => {
                let copy = self.copies.open(&key.id());
                let copy = copy.map_err(|e| Failure::system("the node's copy", e))?;
                (How::Cache, None, self.by_kernel(request, &copy.into())?)
            }
            (_, image) => {
                // The server checks what it reads of a copy that root has not verified yet.
                let image = image.or_else(|| Some(self.copies.open_any(&key.id()).ok()?.into()));
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
            label: &label(&request.verity_root),
        };
        let run_dir = &self.prepared.config.node.run_dir;
        let device = LoopDevice::attach(file, run_dir).map_err(failed)?;
        device.mount().map_err(failed)
    }

    /// A server says that it has all of an image.
    pub(super) fn whole(&self, served: &Served) {
        if let Ok(root) = root(&served.verity_root) {
            let id = Id {
                root,
                data: served.hash_offset,
            };
            self.copies.want(id, served.id, &served.digest);
        }
    }

    /// Something changed; of the image with the number `served` there is a copy.
    pub(super) fn copied(&self, served: Option<u64>) {
        if let Some(served) = served {
            self.server.copied(served);
        }
        self.share_cache();
        // Unused mounts on demand of the same image go.
        self.bell.look();
    }

    /// The server's cache gets what copies leave.
    pub(super) fn share_cache(&self) {
        if let Some(bytes) = self.copies.left() {
            self.server.limit_cache(bytes);
        }
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
