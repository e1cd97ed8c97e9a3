//! The process that builds one view, and the way to it.
//!
//! It is started before the image is there, and does meanwhile what needs no image: its namespace, the user's paths,
//! their mounts. It then hears who the user is, then gets the image, and answers once: `R` with the namespace, or `E`.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::channel::Channel;
use crate::prepared::Prepared;
use crate::refusal::{Refusal, code};
use crate::sys::{self, Child};
use crate::user::Account;
use crate::view::{Ground, View, ViewError};
use crate::wire::{Assembler, Body, Fields};

/// How long the building of a view may take. Opening users' paths has shorter limits of its own.
const BUILDING: Duration = Duration::from_secs(60);
/// How long opened paths may wait for the image; then they are opened anew.
pub(crate) const FRESH: Duration = Duration::from_secs(30);

/// Tags of the messages to it.
mod tag {
    /// The account, as the finder has it.
    pub(super) const ACCOUNT: u8 = b'A';
    /// The image's mount, and its working directory `cwd`.
    pub(super) const IMAGE: u8 = b'I';
}

/// The process, seen from its parent.
pub(crate) struct Builder {
    channel: Channel,
    _child: Child,
    started: Instant,
    knows_account: bool,
    deadline: Option<Instant>,
}

/// What it says at its end.
pub(crate) enum Built {
    View {
        namespace: OwnedFd,
        cwd: PathBuf,
        /// See [`View::names_users_folders`].
        names_users_folders: bool,
    },
    Refused(Refusal),
    /// It ended without a word.
    Gone,
}

impl Builder {
    /// Starts the process for tasks that come from `namespace` and whose directory is `cwd`.
    pub(crate) fn start(
        prepared: &Prepared,
        namespace: BorrowedFd<'_>,
        cwd: &Path,
    ) -> Result<Builder, Refusal> {
        let failed =
            |e: io::Error| Refusal::new(code::INTERNAL, format!("cannot start a process: {e}"));
        let (ours, theirs) = Channel::pair().map_err(failed)?;
        let child = sys::fork(|| {
            sys::die_with_parent();
            // Should it hang, nothing but its own may hang with it.
            if sys::close_others(&[namespace, theirs.as_fd()]).is_err() {
                return 1;
            }
            let sent = match life(prepared, namespace, cwd, &theirs) {
                Ok(view) => {
                    let names = if view.names_users_folders { "1" } else { "" };
                    let body = Body::default().path("cwd", &view.cwd);
                    let body = body.field("users", names.as_bytes());
                    body.send_wait(&theirs, b'R', &[view.namespace.as_fd()])
                }
                Err(Trouble::Refused(refusal)) => refusal.body().send_wait(&theirs, b'E', &[]),
                Err(Trouble::Left) => Ok(()),
            };
            i32::from(sent.is_err())
        })
        .map_err(failed)?;
        Ok(Builder {
            channel: ours,
            _child: child,
            started: Instant::now(),
            knows_account: false,
            deadline: None,
        })
    }

    /// Says who the user is: `account` is the finder's message. Once is enough.
    pub(crate) fn tell(&mut self, account: &[u8]) {
        if !self.knows_account {
            self.knows_account = true;
            // One that ended says why, or is found gone, when it is listened to.
            let _ = Body::from_bytes(account).send(&self.channel, tag::ACCOUNT, &[]);
        }
    }

    /// Gives it the image, after [`Builder::tell`].
    pub(crate) fn give(&mut self, mount: BorrowedFd<'_>, image_cwd: Option<&str>) {
        let cwd = image_cwd.unwrap_or_default();
        let body = Body::default().field("cwd", cwd.as_bytes());
        let _ = body.send(&self.channel, tag::IMAGE, &[mount]);
        self.deadline = Some(Instant::now() + BUILDING);
    }

    /// Whether what it opened is still as good as new.
    pub(crate) fn is_fresh(&self) -> bool {
        Instant::now() < self.fresh_until()
    }

    /// Until when it is.
    pub(crate) fn fresh_until(&self) -> Instant {
        self.started + FRESH
    }

    pub(crate) fn has_image(&self) -> bool {
        self.deadline.is_some()
    }

    /// When it must have answered; none before it has its image.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.deadline
    }

    /// The answer, when there is something to read.
    pub(crate) fn hear(&self) -> Built {
        // One that refused before it read what it was told leaves an error before its own words.
        let mut packets = (0..2).filter_map(|_| self.channel.receive().ok().flatten());
        let Some(packet) = packets.next() else {
            return Built::Gone;
        };
        let body = packet.bytes.get(1..).unwrap_or_default();
        let namespace = packet.descriptors.into_iter().next();
        match (packet.bytes.first(), namespace, Fields(body).path("cwd")) {
            (Some(b'R'), Some(namespace), Some(cwd)) => Built::View {
                namespace,
                cwd,
                names_users_folders: Fields(body).get("users").is_some(),
            },
            (Some(b'E'), ..) => Built::Refused(Refusal::from_body(body)),
            _ => Built::Gone,
        }
    }
}

impl AsFd for Builder {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }
}

/// Why a builder ends without a view.
enum Trouble {
    Refused(Refusal),
    /// The parent needs no view any more.
    Left,
}

impl From<ViewError> for Trouble {
    fn from(error: ViewError) -> Self {
        Trouble::Refused(error.into())
    }
}

/// The child's life.
fn life(
    prepared: &Prepared,
    namespace: BorrowedFd<'_>,
    cwd: &Path,
    channel: &Channel,
) -> Result<View, Trouble> {
    let mut ground = Ground::enter(&prepared.job.user, namespace)?;
    // Most likely the home folder is where the job's environment says; the account decides.
    let home = prepared.job.home.as_deref().unwrap_or(Path::new("/"));
    ground.foresee(&prepared.binds(home, cwd));
    let (account, _) = hear(channel, tag::ACCOUNT)?;
    let spec = prepared.view(&Account::read(&account), cwd);
    let laid = ground.lay(&spec)?;
    let (image, mount) = hear(channel, tag::IMAGE)?;
    let mount = mount.ok_or(Trouble::Left)?;
    Ok(laid.build(mount, Fields(&image).path("cwd").as_deref())?)
}

/// The next whole message, which must be of this kind.
fn hear(channel: &Channel, tag: u8) -> Result<(Vec<u8>, Option<OwnedFd>), Trouble> {
    let mut assembler = Assembler::default();
    loop {
        let packet = channel.receive().ok().flatten().ok_or(Trouble::Left)?;
        match assembler.push(tag, &packet.bytes) {
            Ok(Some(body)) => return Ok((body, packet.descriptors.into_iter().next())),
            Ok(None) => {}
            Err(_) => return Err(Trouble::Left),
        }
    }
}
