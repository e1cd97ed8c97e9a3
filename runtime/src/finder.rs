//! Finds the image, as the job's user: everything here that may hang, hangs in a child that can be left behind.
//!
//! The child reads the record and opens the data file with the user's rights, and asks the daemon as the user where
//! the store does not have the image. Nothing it says is believed: the parent verifies the record and looks at the
//! file again ([`crate::sealed`]). Where the store is not on this node the daemon gives the record and a grant to fetch
//! the image's bytes, which the node service does; where it is, and the site has the image served on demand all the same,
//! a grant that comes in time makes the daemon the second source, for when the store fails under the job. Each of several
//! daemons that grants is a source ([`crate::grant`]). Opens on the store: its root, the record, the data file, and a look
//! at FORMAT; a reference's entry first where no digest is known and the daemon does not answer.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use berth_client::api::{ErrorKind, Job as SlurmJob, Pull, PullRequest, PullState, ResolveRequest};
use berth_client::{Client, ClientError};
use berth_config::{Config, MountMode};
use berth_image::envelope::MAX_ENVELOPE;
use berth_image::{Digest, ImageRef, PublicKey, Record, RefEntry, layout};
use rustix::fs::{Mode, OFlags, ResolveFlags, open, openat, openat2};
use rustix::io::Errno;

use crate::channel::Channel;
use crate::grant::{Aside, Ask, Grant, NEEDED, SPARE_TIME};
use crate::own_image;
use crate::refusal::{Refusal, code};
use crate::sys;
use crate::text::plain;
use crate::wanted::Wanted;
use crate::wire::{Body, Job};

/// How long a remote filesystem may keep saying that a new file is not there (NFS: `acdirmax`, 60 s).
const STALE_NAMES: Duration = Duration::from_secs(65);
/// How long to look for a daemon before saying that there is none.
const DAEMON_GRACE: Duration = Duration::from_secs(5);
/// How long a daemon is waited for where the store may know the answer: it answers within 5 s what it knows itself.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long one is waited for that has to ask a registry.
const RESOLVE: Duration = Duration::from_secs(60);
/// One long poll.
const POLL: Duration = Duration::from_secs(10);
/// The first: what is there in so short a time needs no word of progress in the job's output.
const SILENCE: Duration = Duration::from_secs(2);

/// What the child works with.
pub(crate) struct Search<'a> {
    pub(crate) job: &'a Job,
    pub(crate) config: &'a Config,
    pub(crate) keys: &'a [PublicKey],
    pub(crate) wanted: &'a Wanted,
    /// Users to look up besides the job's.
    pub(crate) users: &'a [String],
}

/// Tags of the child's messages.
pub(crate) mod tag {
    /// The account: `name`, `home`, `group=GID:NAME`, `other=UID:GID:NAME`.
    pub(crate) const ACCOUNT: u8 = b'A';
    /// Progress, plain text.
    pub(crate) const PROGRESS: u8 = b'P';
    /// `digest`, `record`, and `of`, `grant` and `until` of each grant, with the descriptors of the data file and of the
    /// store's FORMAT; without them the daemon has the bytes. Nothing at all for a file of the user's own, which can be
    /// opened.
    pub(crate) const FOUND: u8 = b'F';
    /// A refusal.
    pub(crate) const REFUSED: u8 = b'E';
}

/// An image as found, unverified.
struct Found {
    digest: Digest,
    record: Vec<u8>,
    /// Where this node has the store.
    store: Option<InStore>,
    /// What daemons give the bytes for.
    grants: Vec<Grant>,
}

/// An image's file.
struct InStore {
    data: OwnedFd,
    /// The store's FORMAT file, as a place: its owner is the store's.
    format: OwnedFd,
}

/// The child's life.
pub(crate) fn run(search: &Search<'_>, channel: &Channel) -> io::Result<()> {
    let channel = Channel::from_fd(sys::close_all_but(channel.as_fd())?);
    let wait = u32::try_from(search.config.node.wait_s).unwrap_or(u32::MAX);
    sys::die_after(wait.saturating_add(60));
    search.job.user.become_for_good()?;
    let account = search.job.user.look_up(search.users);
    let mut body = Body::default()
        .field("name", account.name.as_bytes())
        .path("home", &account.home);
    for (gid, name) in &account.groups {
        body = body.field("group", format!("{gid}:{name}").as_bytes());
    }
    for (name, uid, gid) in &account.others {
        body = body.field("other", format!("{uid}:{gid}:{name}").as_bytes());
    }
    body.send_wait(&channel, tag::ACCOUNT, &[])?;
    if let Some(path) = &search.wanted.own {
        return match own_image::open(path) {
            // Root gets no descriptor of it: who serves it has it opened anew.
            Ok(_) => Body::default().send_wait(&channel, tag::FOUND, &[]),
            Err(refusal) => refusal.body().send_wait(&channel, tag::REFUSED, &[]),
        };
    }
    match search.find(&channel) {
        Ok(found) => {
            let mut body = Body::default()
                .field("digest", found.digest.to_string().as_bytes())
                .field("record", &found.record);
            for grant in &found.grants {
                body = grant.to_body(body);
            }
            let store = found.store.iter();
            let descriptors: Vec<_> = store
                .flat_map(|store| [store.data.as_fd(), store.format.as_fd()])
                .collect();
            body.send_wait(&channel, tag::FOUND, &descriptors)
        }
        Err(refusal) => refusal.body().send_wait(&channel, tag::REFUSED, &[]),
    }
}

impl Search<'_> {
    fn find(&self, channel: &Channel) -> Result<Found, Refusal> {
        let second = self.config.node.mount == MountMode::Lazy;
        // A known digest's is asked for while the store is looked at.
        let early = self.wanted.digest.filter(|_| second);
        let aside = |digest| self.ask(digest).aside(self.config, SPARE_TIME);
        let early = early.map(aside);
        let mut found = self.look_everywhere(channel)?;
        if second && found.store.is_some() {
            let said = match early.map(Aside::gather) {
                Some(said) if !said.is_refused() => said,
                // None, or that was before the image was made, or an index was meant.
                _ => aside(found.digest).gather(),
            };
            found.grants = said.grants();
        }
        Ok(found)
    }

    /// What a grant is asked for.
    fn ask(&self, digest: Digest) -> Ask {
        Ask {
            digest,
            platform: self.wanted.platform.clone(),
            end: self.job.end,
        }
    }

    fn look_everywhere(&self, channel: &Channel) -> Result<Found, Refusal> {
        let store = match StoreDir::open(&self.config.store.path) {
            Ok(store) => store,
            Err(refusal) => return self.on_demand(refusal, channel),
        };
        let digest = match self.wanted.digest {
            Some(digest) => digest,
            None => self.resolve(Some(&store))?,
        };
        if let Some(found) = self.look(&store, digest)? {
            return Ok(found);
        }
        if self.wanted.may_be_index
            && let Some(digest) = self.entry(&store)?
            && let Some(found) = self.look(&store, digest)?
        {
            return Ok(found);
        }
        if matches!(store.format(), Err(Errno::NOENT)) {
            let refusal = store.unlike_the_daemon_says(&self.wanted.name());
            return self.on_demand(refusal, channel);
        }
        let digest = self.pull(digest, channel)?;
        let deadline = Instant::now() + STALE_NAMES;
        loop {
            if let Some(found) = self.look(&store, digest)? {
                return Ok(found);
            }
            if Instant::now() > deadline {
                return Err(store.unlike_the_daemon_says(&self.wanted.name()));
            }
            std::thread::sleep(Duration::from_millis(500));
        }
    }

    /// The image from the daemon, where the store is not on this node, as `no_store` says: its record, and a grant for
    /// the node service.
    fn on_demand(&self, no_store: Refusal, channel: &Channel) -> Result<Found, Refusal> {
        if self.config.node.mount == MountMode::Kernel {
            return Err(no_store);
        }
        let Ok(client) = Client::from_config(self.config) else {
            return Err(no_store);
        };
        let digest = match self.wanted.digest {
            Some(digest) => digest,
            None => self.resolve(None)?,
        };
        let digest = match self.wanted.reference {
            Some(_) => self.pull(digest, channel)?,
            None => digest,
        };
        let platform = &self.wanted.platform;
        let aside = self.ask(digest).aside(self.config, NEEDED);
        let record = client.record(&digest, platform).map_err(of_daemon)?;
        let grants = aside.gather().some().map_err(of_daemon)?;
        Ok(Found {
            digest,
            record,
            store: None,
            grants,
        })
    }

    /// The image of `digest`, if the store has it.
    fn look(&self, store: &StoreDir<'_>, digest: Digest) -> Result<Option<Found>, Refusal> {
        let name = self.wanted.name();
        let platform = &self.wanted.platform;
        // Twice: a record may be replaced, and its old data file renamed away, between the two opens.
        for _ in 0..2 {
            let path = layout::record(&digest, platform);
            let record = match store.read(&path) {
                Ok(record) => record,
                Err(Errno::NOENT) => return Ok(None),
                Err(errno) => return Err(store.refused(&name, "record", errno)),
            };
            let (sealed, _) = Record::open(&record, self.keys, &digest, platform)
                .map_err(|e| crate::sealed::not_believed(&name, &e))?;
            let path = layout::image_dir(&digest, platform).join(sealed.file.name());
            match store.open_file(&path) {
                Ok(data) => {
                    let format = store.format();
                    let format = format.map_err(|e| store.refused(&name, "owner", e))?;
                    return Ok(Some(Found {
                        digest,
                        record,
                        store: Some(InStore { data, format }),
                        grants: Vec::new(),
                    }));
                }
                Err(Errno::NOENT | Errno::STALE) => {}
                Err(errno) => return Err(store.refused(&name, "data file", errno)),
            }
        }
        Err(store.refused(&name, "data file", Errno::NOENT))
    }

    /// The digest for a tag: the daemon's word, or the signed entry in the store when there is no daemon.
    fn resolve(&self, store: Option<&StoreDir<'_>>) -> Result<Digest, Refusal> {
        let job = self.job.cluster.as_ref().map(|cluster| SlurmJob {
            cluster: cluster.clone(),
            id: self.job.job,
        });
        let request = ResolveRequest {
            reference: self.wanted.name(),
            platform: Some(self.wanted.platform.to_string()),
            job,
        };
        let ask = |limit| {
            Client::from_config(self.config).and_then(|c| c.within(limit).resolve(&request))
        };
        let mut answer = ask(PATIENCE);
        let mut entry = None;
        if let Some(store) = store
            && matches!(&answer, Err(e) if !matches!(e, ClientError::Api(_)))
        {
            entry = self.entry(store)?;
        }
        // What the store does not know either, a busy daemon may take longer for.
        if entry.is_none() && matches!(&answer, Err(error) if error.is_timeout()) {
            answer = ask(RESOLVE);
        }
        match answer {
            Ok(resolved) => parse_digest(&resolved.digest),
            Err(ClientError::Api(body)) => Err(of_daemon(ClientError::Api(body))),
            Err(error) => match entry {
                Some(digest) => Ok(digest),
                None => {
                    let name = self.wanted.name();
                    let line = format!("the store has no `{name}`, and {error}");
                    let refusal = Refusal::new(code::UNAVAILABLE, line);
                    Err(match error.hint() {
                        Some(hint) => refusal.hint(hint),
                        None => refusal,
                    })
                }
            },
        }
    }

    /// What the signed entry of the reference says for this platform.
    fn entry(&self, store: &StoreDir<'_>) -> Result<Option<Digest>, Refusal> {
        let Some(reference) = &self.wanted.reference else {
            return Ok(None);
        };
        let name = self.wanted.name();
        let bytes = match store.read(&layout::ref_entry(reference)) {
            Ok(bytes) => bytes,
            Err(Errno::NOENT) => return Ok(None),
            Err(errno) => return Err(store.refused(&name, "entry", errno)),
        };
        let (entry, _) = RefEntry::open(&bytes, self.keys, reference)
            .map_err(|e| crate::sealed::not_believed(&name, &e))?;
        Ok(entry.manifests.get(&self.wanted.platform).copied())
    }

    /// Has the daemon make the image, and waits for it; the parent ends the wait.
    fn pull(&self, digest: Digest, channel: &Channel) -> Result<Digest, Refusal> {
        let name = self.wanted.name();
        let Some(reference) = &self.wanted.reference else {
            let line = format!("the image {digest} is not in the store");
            return Err(Refusal::new(code::OTHER, line).hint(
                "it may have been removed: give its reference (docker://…) instead of a path",
            ));
        };
        let request = PullRequest {
            reference: pinned(reference, digest),
            platform: Some(self.wanted.platform.to_string()),
            fresh: false,
        };
        let mut last_answer = Instant::now();
        let mut heard = false;
        loop {
            match self.pull_once(&request, &name, channel, &mut heard) {
                Ok(digest) => return Ok(digest),
                Err(ClientError::Api(body)) => return Err(of_daemon(ClientError::Api(body))),
                // A daemon that was there comes back, and goes on where it was.
                Err(error) if !heard && last_answer.elapsed() > DAEMON_GRACE => {
                    let line = format!("the store has no `{name}`, and {error}");
                    let refusal = Refusal::new(code::UNAVAILABLE, line);
                    return Err(match error.hint() {
                        Some(hint) => refusal.hint(hint),
                        None => refusal,
                    });
                }
                Err(_) if heard => last_answer = Instant::now(),
                Err(_) => {}
            }
            std::thread::sleep(Duration::from_secs(1));
        }
    }

    fn pull_once(
        &self,
        request: &PullRequest,
        name: &str,
        channel: &Channel,
        heard: &mut bool,
    ) -> Result<Digest, ClientError> {
        let client = Client::from_config(self.config)?;
        let mut pull = client.pull(request)?;
        if !*heard && !pull.state.is_final() {
            pull = wait(&client, request, &pull, SILENCE)?;
        }
        *heard = true;
        loop {
            let digest = pull.digest.as_deref().and_then(|d| d.parse().ok());
            match (pull.state, digest) {
                (PullState::Ready, Some(digest)) => return Ok(digest),
                (PullState::Failed | PullState::Ready, _) => {
                    return Err(match pull.error {
                        Some(error) => ClientError::Api(error),
                        None => ClientError::Protocol {
                            place: client.place().to_owned(),
                            why: "a pull ended without an image or an error".into(),
                        },
                    });
                }
                _ => {
                    let text = progress(name, &pull);
                    let packet = [&[tag::PROGRESS], text.as_bytes()].concat();
                    let _ = channel.send(&packet, &[]);
                    pull = wait(&client, request, &pull, POLL)?;
                }
            }
        }
    }
}

/// How a pull stands after a while. Where another daemon answers than the one that began it, or one that was made anew,
/// it is asked for once more.
fn wait(
    client: &Client,
    request: &PullRequest,
    pull: &Pull,
    time: Duration,
) -> Result<Pull, ClientError> {
    match client.wait_pull(&pull.id, time) {
        Err(ClientError::Api(body)) if body.kind == ErrorKind::NotFound => {
            std::thread::sleep(Duration::from_secs(1));
            client.pull(request)
        }
        said => said,
    }
}

/// The reference with the digest that was decided on.
fn pinned(reference: &ImageRef, digest: Digest) -> String {
    reference.with_digest(digest).to_string()
}

fn parse_digest(text: &str) -> Result<Digest, Refusal> {
    text.parse().map_err(|e| {
        Refusal::new(
            code::INTERNAL,
            format!("the daemon's answer makes no sense: {e}"),
        )
    })
}

fn of_daemon(error: ClientError) -> Refusal {
    let refusal = Refusal::new(error.exit_code(), error.to_string());
    match error.hint() {
        Some(hint) => refusal.hint(hint),
        None => refusal,
    }
}

/// One line on how a pull stands.
fn progress(name: &str, pull: &Pull) -> String {
    let mib = |bytes: u64| bytes >> 20;
    match pull.state {
        PullState::Resolving => format!("berth: {name}: asking the registry"),
        PullState::Fetching | PullState::Converting if pull.bytes_total > 0 => format!(
            "berth: {name}: {} of {} MiB fetched, {} made into the image",
            mib(pull.bytes_fetched),
            mib(pull.bytes_total),
            mib(pull.bytes_converted)
        ),
        PullState::Publishing => format!("berth: {name}: sealing the image"),
        _ => format!("berth: {name}: waiting for the image"),
    }
}

/// The store's root folder.
struct StoreDir<'a> {
    root: OwnedFd,
    path: &'a Path,
}

impl<'a> StoreDir<'a> {
    fn open(path: &'a Path) -> Result<Self, Refusal> {
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        match open(path, flags, Mode::empty()) {
            Ok(root) => Ok(StoreDir { root, path }),
            Err(errno) => {
                let line = format!(
                    "cannot open the image store `{}`: {}",
                    path.display(),
                    plain(&errno.into())
                );
                Err(Refusal::new(code::UNAVAILABLE, line)
                    .hint("is its filesystem mounted on this node? `berth doctor` tells"))
            }
        }
    }

    fn open_file(&self, path: &Path) -> Result<OwnedFd, Errno> {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
        openat2(&self.root, path, flags, Mode::empty(), resolve)
    }

    /// The FORMAT file, not opened: whose it is says whose the store is.
    fn format(&self) -> Result<OwnedFd, Errno> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        openat(&self.root, layout::FORMAT, flags, Mode::empty())
    }

    fn read(&self, path: &Path) -> Result<Vec<u8>, Errno> {
        let file = File::from(self.open_file(path)?);
        let mut bytes = Vec::new();
        let read = file.take(MAX_ENVELOPE as u64 + 1).read_to_end(&mut bytes);
        match read {
            Ok(_) => Ok(bytes),
            Err(e) => Err(Errno::from_io_error(&e).unwrap_or(Errno::IO)),
        }
    }

    fn refused(&self, name: &str, part: &str, errno: Errno) -> Refusal {
        let why = plain(&errno.into());
        let line = format!("cannot open the {part} of `{name}` in the store: {why}");
        match errno {
            Errno::ACCESS | Errno::PERM => Refusal::new(code::PERMISSION, line).hint(
                "the image is restricted: its owner or the site's admins may give you the right",
            ),
            _ => Refusal::new(code::UNAVAILABLE, line).hint(format!(
                "is the store `{}` in order? `berth doctor` tells",
                self.path.display()
            )),
        }
    }

    fn unlike_the_daemon_says(&self, name: &str) -> Refusal {
        let path = self.path.display();
        let line = match self.open_file(Path::new(layout::FORMAT)) {
            Ok(_) => format!(
                "the daemon says that `{name}` is ready, but the store `{path}` on this node lacks it"
            ),
            Err(_) => format!(
                "`{path}` on this node is not a store: it has no {} file",
                layout::FORMAT
            ),
        };
        Refusal::new(code::UNAVAILABLE, line)
            .hint("is the store's filesystem mounted on this node? `berth doctor` tells")
    }
}
