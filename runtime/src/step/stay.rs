//! A helper whose step is over stays a while, for the next step of the same kind: many short steps one after another, or
//! the tasks of an array, then share one view, and a start costs a message instead of five processes.
//!
//! Of the same kind are steps of one user with the same groups that ask for the same bits, mounts and places
//! ([`Job::is_like`]), under the same configuration. What the user's rights were looked at for is as old then as what a
//! builder may have opened before its image came: half a minute, from when it was opened. With a next step is shared
//! neither a view that the user writes to, nor one that shows folders or files which the user named (they may have been
//! replaced), a file of the user's own, a tag that nobody pinned, bytes that are fetched with a job's grant, nor a
//! namespace that is one job's alone.
//!
//! `berth-runtime standby` knows who stays, and passes a connection on. The node service's lease is kept meanwhile, so
//! what is mounted is known to be in use. When the service closes it or says a word on it (it drains, it ends), and
//! whenever a mount comes to the node or goes (an epilog unmounts), the helper leaves.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Instant;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags, open, stat};
use rustix::io::Errno;
use rustix::net::{Shutdown, shutdown};
use rustix::process::{WaitOptions, wait};

use super::{ImageState, PlaceView, Step, ViewState};
use crate::builder::FRESH;
use crate::channel::Channel;
use crate::mounted::Image;
use crate::prepared::Prepared;
use crate::sys;
use crate::wire::Job;

/// The way to the one who knows of the next step.
pub(crate) struct Stay {
    channel: Channel,
    /// Changes when mounts of the node do.
    mounts: OwnedFd,
}

/// A next step.
pub(super) struct Next {
    parent: Channel,
    log: Option<OwnedFd>,
}

/// Messages between [`Stay`] and who holds the other end.
pub(crate) mod tag {
    /// From the helper: it has nothing to do.
    pub(crate) const FREE: &[u8] = b"P";
    /// To the helper: a connection to a plugin, and its log if it has one.
    pub(crate) const NEXT: &[u8] = b"C";
}

impl Stay {
    /// Before anything is opened for a step. None where nothing could be told of mounts.
    pub(crate) fn new(channel: Channel) -> Option<Stay> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC;
        let mounts = open("/proc/self/mountinfo", flags, Mode::empty()).ok()?;
        Some(Stay { channel, mounts })
    }

    /// The next step; none when that time is over, something is heard of what is leased, or a mount came to the node or
    /// went.
    fn wait(&self, leases: &[OwnedFd], until: Instant) -> Option<Next> {
        self.channel.send(tag::FREE, &[]).ok()?;
        loop {
            let left = until.saturating_duration_since(Instant::now());
            let timeout = Timespec::try_from(left).ok()?;
            let mut fds = vec![
                PollFd::new(&self.channel, PollFlags::IN),
                PollFd::new(&self.mounts, PollFlags::PRI),
            ];
            fds.extend(leases.iter().map(|lease| PollFd::new(lease, PollFlags::IN)));
            match poll(&mut fds, Some(&timeout)) {
                Err(Errno::INTR) => continue,
                Err(_) => return None,
                Ok(_) if !fds[0].revents().is_empty() => {}
                // From here on nothing can be sent to this process; what has been sent is still served.
                Ok(_) => shutdown(&self.channel, Shutdown::Read).ok()?,
            }
            let packet = self.channel.receive().ok()??;
            let mut descriptors = packet.descriptors.into_iter();
            let parent = descriptors.next().map(Channel::from_fd)?;
            let log = descriptors.next();
            return (packet.bytes == tag::NEXT).then_some(Next { parent, log });
        }
    }
}

/// What a step leaves to the next one of its kind.
pub(super) struct Kept {
    prepared: Box<Prepared>,
    account: Option<Vec<u8>>,
    image: Box<Image>,
    found: Instant,
    views: Vec<PlaceView>,
}

impl Kept {
    /// What may be shared of an ended step.
    fn of(step: &mut Step) -> Option<Kept> {
        let ImageState::Ready(image) = std::mem::replace(&mut step.image, ImageState::NoJob) else {
            return None;
        };
        let own = stat("/proc/self/ns/mnt").ok()?;
        let is_good = |view: &PlaceView| {
            let of_all = (view.place.device, view.place.inode) == (own.st_dev, own.st_ino);
            let names_nothing = matches!(
                view.state,
                ViewState::Ready {
                    names_users_folders: false,
                    ..
                }
            );
            of_all && names_nothing && view.is_used
        };
        let mut views = std::mem::take(&mut step.views);
        views.retain(is_good);
        let kept = Kept {
            prepared: step.prepared.take()?,
            account: step.account.take(),
            image,
            found: step.found,
            views,
        };
        let (job, wanted) = (&kept.prepared.job, &kept.prepared.wanted);
        let keeps = kept.prepared.config.node.service.keep_s > 0;
        let is_shared = keeps && !job.writable && job.script.is_none() && wanted.digest.is_some();
        let is_kept = kept.image.is_kept_for_all() && !kept.image.leases().is_empty();
        (is_shared && is_kept).then_some(kept)
    }

    /// Until when it is as good as new; none where that is over.
    fn until(&self) -> Option<Instant> {
        let fresh_until = |view: &PlaceView| match view.state {
            ViewState::Ready { fresh_until, .. } => Some(fresh_until),
            _ => None,
        };
        let of_views = self.views.iter().filter_map(fresh_until).min()?;
        let until = of_views.min(self.found + FRESH);
        (until > Instant::now()).then_some(until)
    }

    /// Whether it is good for this step, of which the node service then knows.
    fn serves(&mut self, job: &Job) -> bool {
        let prepared = &self.prepared;
        prepared.job.is_like(job)
            && prepared.files.are_of(&job.config)
            && self.image.pass_on(job.job, &prepared.config)
    }
}

impl Step {
    /// Waits for a next step, which begins with what this one leaves; none where there is nothing to wait with, or nobody
    /// comes in time.
    pub(super) fn next(&mut self, stay: &Stay) -> Option<io::Result<Step>> {
        // Nobody's any more.
        self.tasks.clear();
        (self.reader, self.cold) = (None, None);
        // A plugin that said nothing has taken nothing.
        let kept = self.kept.take().or_else(|| Kept::of(self))?;
        let until = kept.until()?;
        // Those that looked and built were let go of, and ended before or since.
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        let next = stay.wait(kept.image.leases(), until)?;
        let streams = sys::set_streams(next.log.as_ref().map(AsFd::as_fd));
        Some(streams.map(|()| Step {
            kept: Some(kept),
            ..Step::new(next.parent, None)
        }))
    }

    /// Serves a step with what an earlier one left; one for which there is nothing, or nothing good, is given back.
    pub(super) fn go_on_with(&mut self, job: Job) -> Option<Job> {
        let kept = self.kept.take();
        let Some(mut kept) = kept else {
            return Some(job);
        };
        if !kept.serves(&job) {
            return Some(job);
        }
        kept.prepared.job = job;
        for view in &mut kept.views {
            view.begun = "before";
        }
        self.prepared = Some(kept.prepared);
        self.account = kept.account;
        self.image = ImageState::Ready(kept.image);
        self.found = kept.found;
        self.views = kept.views;
        None
    }
}
