//! The image of a step: checked, and mounted by the node service where there is one, else by this process.
//!
//! The kernel's driver never sees a file that was not verified before ([`crate::sealed`]); the node service is given the
//! image's descriptor, opened as the job's user, and what the record says of it. Where the store is not on this node it
//! is given the daemons' grants instead, and serves the image on demand, or from its own verified copy; where it is to
//! serve it on demand anyway it is given both, and a daemon is asked when the store fails.

use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use berth_config::{Config, MountMode};
use berth_image::digest::hex;
use berth_image::{Digest, Platform, Record};
use berth_mount::keeper::{self, Given, How, KeeperError, Mode, MountRequest};
use berth_mount::{ImageFile, LoopDevice};

use crate::own_image::OwnImage;
use crate::refusal::{Refusal, code};

/// How long the node service may take to give a mount that needs nothing fetched.
const SERVICE: Duration = Duration::from_secs(5);

/// And to give one whose first bytes come from the daemon.
const FROM_DAEMON: Duration = Duration::from_secs(45);

/// How long the log waits for figures.
const FIGURES: Duration = Duration::from_secs(1);

/// An image that can be mounted any number of times.
pub(crate) struct Image {
    /// The image's own working directory.
    pub(crate) working_dir: Option<String>,
    /// Variables that each task gets, `NAME=VALUE`.
    pub(crate) environment: Vec<String>,
    source: Source,
    /// The first mount, made ahead of the first task.
    spare: Option<OwnedFd>,
    how: &'static str,
    warm: bool,
}

/// Where mounts come from.
enum Source {
    Sealed(Sealed),
    /// A file of the user's, which the kernel's driver never sees.
    Own(OwnImage),
}

/// Where an image's bytes are.
pub(crate) enum Bytes {
    /// The verified record's file, opened as the job's user, and who else has them.
    Store(OwnedFd, Vec<keeper::Source>),
    /// Daemons give them to who shows a grant.
    Daemons(Vec<keeper::Source>),
}

/// A verified image.
struct Sealed {
    /// Its file, where the store is on this node.
    data: Option<OwnedFd>,
    request: MountRequest,
    /// Kept as long as the step lives: they are the service's sign that its mounts are in use.
    leases: Vec<OwnedFd>,
    /// Bytes are brought here for it.
    on_demand: bool,
    /// The device of this step's own, where the service gave no mount.
    device: Option<LoopDevice>,
}

/// A mount, who serves it, and whether others read from it before.
struct Mounted {
    tree: OwnedFd,
    how: &'static str,
    warm: bool,
}

/// Whose image, for the service's books.
pub(crate) struct Owner {
    pub(crate) digest: Digest,
    pub(crate) platform: Platform,
    pub(crate) job: u32,
    pub(crate) uid: u32,
}

impl Image {
    /// An image with a verified record.
    pub(crate) fn mount(
        record: Record,
        environment: Vec<String>,
        bytes: Bytes,
        owner: &Owner,
        config: &Config,
    ) -> Result<Image, Refusal> {
        let (data, sources) = match bytes {
            Bytes::Store(data, others) => (Some(data), others),
            Bytes::Daemons(sources) => (None, sources),
        };
        let request = MountRequest {
            digest: owner.digest.to_string(),
            platform: owner.platform.to_string(),
            verity_root: hex(&record.file.verity_root),
            hash_offset: record.file.hash_offset,
            file_size: record.file.size,
            mode: mode(config),
            job: Some(owner.job.to_string()),
            uid: owner.uid,
            sources,
        };
        let sealed = Sealed {
            data,
            request,
            leases: Vec::new(),
            on_demand: false,
            device: None,
        };
        let working_dir = record.run.working_dir;
        Image::first(working_dir, environment, Source::Sealed(sealed), config)
    }

    /// A file of the user's own, which says nothing of its environment or where to start.
    pub(crate) fn own(
        own: OwnImage,
        environment: Vec<String>,
        config: &Config,
    ) -> Result<Image, Refusal> {
        Image::first(None, environment, Source::Own(own), config)
    }

    fn first(
        working_dir: Option<String>,
        environment: Vec<String>,
        source: Source,
        config: &Config,
    ) -> Result<Image, Refusal> {
        let mut image = Image {
            working_dir,
            environment,
            source,
            spare: None,
            how: "",
            warm: false,
        };
        image.spare = Some(image.take_mount(config)?);
        Ok(image)
    }

    /// A mount of the image, attached nowhere, `ro,nosuid,nodev`.
    pub(crate) fn take_mount(&mut self, config: &Config) -> Result<OwnedFd, Refusal> {
        if let Some(mount) = self.spare.take() {
            return Ok(mount);
        }
        let mounted = match &mut self.source {
            Source::Sealed(sealed) => sealed.mount(config)?,
            Source::Own(own) => Mounted {
                tree: own.mount()?,
                how: "user's file, on demand",
                // Nothing is read ahead of who reads it.
                warm: true,
            },
        };
        (self.how, self.warm) = (mounted.how, mounted.warm);
        Ok(mounted.tree)
    }

    /// Whether others read from this mount before, so that what they read is in memory.
    pub(crate) fn is_warm(&self) -> bool {
        self.warm
    }

    /// Whether the node service gave its mount for a file of the store's, and has nothing to fetch.
    pub(crate) fn is_kept_for_all(&self) -> bool {
        match &self.source {
            Source::Sealed(sealed) => {
                sealed.data.is_some() && sealed.device.is_none() && !sealed.on_demand
            }
            Source::Own(_) => false,
        }
    }

    /// What the node service says something on, or closes, when a mount is to be let go of.
    pub(crate) fn leases(&self) -> &[OwnedFd] {
        match &self.source {
            Source::Sealed(sealed) => &sealed.leases,
            Source::Own(_) => &[],
        }
    }

    /// Tells the node service that another job uses the image now. False where it does not hear.
    pub(crate) fn pass_on(&mut self, job: u32, config: &Config) -> bool {
        let Source::Sealed(sealed) = &mut self.source else {
            return false;
        };
        let before = sealed.leases.len();
        sealed.request.job = Some(job.to_string());
        let Ok(mounted) = sealed.by_service(config) else {
            return false;
        };
        sealed.leases.drain(..before);
        (self.how, self.warm) = (mounted.how, mounted.warm);
        true
    }

    /// For the log: bytes that the node service has brought to this node for the image, for this step or others; `None`
    /// where nothing has to be brought.
    pub(crate) fn fetched(&self, config: &Config) -> Option<u64> {
        let Source::Sealed(sealed) = &self.source else {
            return None;
        };
        if !sealed.on_demand {
            return None;
        }
        let (socket, deadline) = (&config.node.service.socket, Instant::now() + FIGURES);
        let answer = keeper::ask(socket, &keeper::Request::Status, None, deadline);
        let Ok(keeper::Answer::Status(status)) = answer else {
            return None;
        };
        let (digest, platform) = (&sealed.request.digest, &sealed.request.platform);
        let mut mounts = status.mounts.iter();
        mounts
            .find(|m| m.digest == *digest && m.platform == *platform && m.fetched.is_some())?
            .fetched
    }

    /// For the log: who serves the image, and whether it was there already.
    pub(crate) fn how(&self) -> &'static str {
        self.how
    }
}

impl Sealed {
    fn mount(&mut self, config: &Config) -> Result<Mounted, Refusal> {
        if self.device.is_none() {
            match self.by_service(config) {
                Ok(mounted) => return Ok(mounted),
                Err(error) if self.data.is_none() || self.request.mode == Mode::Lazy => {
                    return Err(of_service(error));
                }
                // Nothing of the service's is needed: the step mounts by itself.
                Err(_) => {}
            }
        }
        self.own_mount(config)
    }

    fn by_service(&mut self, config: &Config) -> Result<Mounted, KeeperError> {
        let socket = &config.node.service.socket;
        let limit = if self.data.is_some() {
            SERVICE
        } else {
            FROM_DAEMON
        };
        let file = self.data.as_ref().map(AsFd::as_fd);
        let given = keeper::mount(socket, &self.request, file, Instant::now() + limit);
        let given = given.and_then(|given| of_root(given, socket))?;
        let (how, warm) = (words(&given), given.kept);
        self.leases.push(given.lease);
        self.on_demand = given.how == How::Lazy;
        let tree = given.tree;
        Ok(Mounted { tree, how, warm })
    }

    fn own_mount(&mut self, config: &Config) -> Result<Mounted, Refusal> {
        let Some(data) = &self.data else {
            let line = "the image is not on this node, and what served it here is gone";
            return Err(Refusal::new(code::UNAVAILABLE, line));
        };
        let device = match self.device.take() {
            Some(device) => device,
            None => {
                let file = ImageFile {
                    file: data.as_fd(),
                    data_size: self.request.hash_offset,
                    label: &format!("berth-{}", &self.request.verity_root[..48]),
                };
                LoopDevice::attach(file, &config.node.run_dir).map_err(of_mount)?
            }
        };
        let warm = device.was_shared();
        let device = self.device.insert(device);
        Ok(Mounted {
            tree: device.mount().map_err(of_mount)?,
            how: match warm {
                true => "kernel, shared",
                false => "kernel",
            },
            warm,
        })
    }
}

/// Who is to serve an image, as the site has it. Where its file is not at hand, `auto` means on demand, or the node's own
/// copy; a site that says `lazy` keeps the kernel's driver away from both.
pub(crate) fn mode(config: &Config) -> Mode {
    match config.node.mount {
        MountMode::Auto => Mode::Auto,
        MountMode::Kernel => Mode::Kernel,
        MountMode::Lazy => Mode::Lazy,
    }
}

/// A mount from anybody but root is no mount of an image.
fn of_root(given: Given, socket: &Path) -> Result<Given, KeeperError> {
    match rustix::net::sockopt::socket_peercred(&given.lease) {
        Ok(peer) if peer.uid.is_root() => Ok(given),
        _ => Err(KeeperError::Absent {
            socket: socket.to_owned(),
            why: "it is not root's".into(),
        }),
    }
}

fn words(given: &Given) -> &'static str {
    match (given.how, given.kept) {
        (How::Kernel, true) => "kernel, kept",
        (How::Kernel, false) => "kernel, by the node service",
        (How::Cache, true) => "node's copy, kept",
        (How::Cache, false) => "node's copy",
        (How::Lazy, true) => "on demand, kept",
        (How::Lazy, false) => "on demand",
    }
}

fn of_service(error: KeeperError) -> Refusal {
    let line = format!("cannot mount the image: {error}");
    match error {
        KeeperError::Refused { code, hint, .. } => {
            let refusal = Refusal::new(code, line);
            match hint {
                Some(hint) => refusal.hint(hint),
                None => refusal,
            }
        }
        _ => Refusal::new(code::UNAVAILABLE, line).hint(
            "this node takes images on demand (`node.mount = \"lazy\"`, or it has no store): tell its admins that berth-node must run",
        ),
    }
}

fn of_mount(error: berth_mount::MountError) -> Refusal {
    Refusal::new(code::INTERNAL, format!("cannot mount the image: {error}"))
        .hint("this is the node's fault: tell its admins, `berth doctor` may know more")
}
