//! An image for a user of this node, outside of any job: `berth path --mounted`.
//!
//! The node service starts this, as root, for a user whose numbers it has from the kernel. A child that is wholly that
//! user opens the record and the data file on the store; what it found is verified here, as for a step, and handed to
//! the node service to be attached at a folder of the user's.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use berth_config::{Config, MountMode};
use berth_image::digest::hex;
use berth_image::envelope::MAX_ENVELOPE;
use berth_image::{Digest, Platform, PublicKey, Record, layout};
use berth_mount::keeper::{self, Answer, KeeperError, MountRequest, Request};
use rustix::fs::{Mode as Bits, OFlags, ResolveFlags, open, openat, openat2};
use rustix::io::Errno;

use crate::channel::Channel;
use crate::grant;
use crate::mounted;
use crate::refusal::{Refusal, code};
use crate::sealed;
use crate::serials;
use crate::sys;
use crate::text::plain;
use crate::trusted::{Site, TrustError};
use crate::user::{self, User};
use crate::wanted::Wanted;

/// How long the store may take.
const LOOKING: Duration = Duration::from_secs(30);
/// How long the node service may take to mount.
const MOUNTING: Duration = Duration::from_secs(60);

/// `berth-runtime attach`: prints the folder.
pub fn run(config: &Path, user: User, digest: &str, platform: &str) -> ExitCode {
    match attach(config, &user, digest, platform) {
        Ok(path) => {
            println!("{}", path.display());
            ExitCode::SUCCESS
        }
        Err(refusal) => {
            let _ = writeln!(io::stderr(), "{}", refusal.text());
            ExitCode::from(refusal.code)
        }
    }
}

fn attach(config: &Path, user: &User, digest: &str, platform: &str) -> Result<PathBuf, Refusal> {
    let site = |e: TrustError| Refusal::new(code::CONFIG, e.to_string());
    let usage = |line: String| Refusal::new(code::USAGE, line);
    let system = |e: io::Error| Refusal::new(code::INTERNAL, plain(&e));
    user::be_root_alone().map_err(system)?;
    let Site { config, keys, .. } = Site::load(config).map_err(site)?;
    let digest: Digest = (digest.parse()).map_err(|e| usage(format!("`{digest}`: {e}")))?;
    let platform = (platform.parse()).map_err(|e| usage(format!("`{platform}`: {e}")))?;
    let wanted = Wanted {
        reference: None,
        own: None,
        digest: Some(digest),
        may_be_index: false,
        platform,
    };
    let (record, data, format) = look(&config, &keys, &wanted, &digest, user)?;
    let record = sealed::verify(&wanted, &digest, &record, &keys, data.as_fd(), user)?;
    sealed::belongs_to_store(&wanted, data.as_fd(), format.as_fd())?;
    serials::look(&config.node.run_dir, &record, &wanted.name())?;
    let request = MountRequest {
        digest: digest.to_string(),
        platform: wanted.platform.to_string(),
        verity_root: hex(&record.file.verity_root),
        hash_offset: record.file.hash_offset,
        file_size: record.file.size,
        mode: mounted::mode(&config),
        job: None,
        uid: user.uid,
        sources: second(&config, &digest, &wanted.platform),
    };
    let asked = Request::Attach(request);
    let socket = &config.node.service.socket;
    match keeper::ask(
        socket,
        &asked,
        Some(data.as_fd()),
        Instant::now() + MOUNTING,
    ) {
        Ok(Answer::At { path }) => Ok(path),
        Ok(_) => Err(Refusal::new(
            code::INTERNAL,
            "the node service gave no folder",
        )),
        Err(KeeperError::Refused { code, why, .. }) => Err(Refusal::new(code, why)),
        Err(error) => Err(Refusal::new(code::UNAVAILABLE, error.to_string())),
    }
}

/// Who has the bytes besides the store, where they are served on demand: a job that comes to use the same mount brings
/// the grant.
fn second(config: &Config, digest: &Digest, platform: &Platform) -> Vec<keeper::Source> {
    match config.node.mount {
        MountMode::Lazy => grant::sources(config, digest, platform, &[]),
        _ => Vec::new(),
    }
}

/// The record and the data file, as the user finds them.
fn look(
    config: &Config,
    keys: &[PublicKey],
    wanted: &Wanted,
    digest: &Digest,
    user: &User,
) -> Result<(Vec<u8>, OwnedFd, OwnedFd), Refusal> {
    let system = |e: io::Error| Refusal::new(code::INTERNAL, plain(&e));
    let (ours, theirs) = Channel::pair().map_err(system)?;
    let store = &config.store.path;
    let child = sys::fork(|| {
        let said = || -> io::Result<()> {
            let channel = Channel::from_fd(sys::close_all_but(theirs.as_fd())?);
            sys::die_after(u32::try_from(LOOKING.as_secs()).unwrap_or(u32::MAX));
            user.become_for_good()?;
            match find(store, keys, wanted, digest) {
                Ok((record, data, format)) => {
                    for part in record.chunks(32 << 10) {
                        channel.send_wait(&[b"r", part].concat(), &[])?;
                    }
                    channel.send_wait(b"F", &[data.as_fd(), format.as_fd()])
                }
                Err(errno) => {
                    let errno = errno.raw_os_error().to_le_bytes();
                    channel.send_wait(&[&b"E"[..], &errno].concat(), &[])
                }
            }
        };
        i32::from(said().is_err())
    });
    let _child = child.map_err(system)?;
    drop(theirs);
    let deadline = Instant::now() + LOOKING;
    let mut record = Vec::new();
    loop {
        let packet = match ours.receive_until(deadline) {
            Ok(Some(packet)) => packet,
            Err(e) if e.kind() == io::ErrorKind::TimedOut => {
                let line = format!("the store `{}` does not answer", store.display());
                return Err(Refusal::new(code::UNAVAILABLE, line));
            }
            Ok(None) => return Err(system(io::ErrorKind::UnexpectedEof.into())),
            Err(e) => return Err(system(e)),
        };
        let mut descriptors = packet.descriptors.into_iter();
        match (packet.bytes.split_first(), descriptors.next()) {
            (Some((b'r', part)), None) if record.len() + part.len() <= MAX_ENVELOPE => {
                record.extend_from_slice(part);
            }
            (Some((b'F', _)), Some(data)) => {
                let format = descriptors.next();
                let format = format.ok_or_else(|| system(io::ErrorKind::UnexpectedEof.into()))?;
                return Ok((record, data, format));
            }
            (Some((b'E', number)), None) => {
                let number = number.try_into().map_or(0, i32::from_le_bytes);
                return Err(refused(&wanted.name(), store, number));
            }
            _ => return Err(system(io::ErrorKind::InvalidData.into())),
        }
    }
}

fn refused(name: &str, store: &Path, number: i32) -> Refusal {
    let error = io::Error::from_raw_os_error(number);
    let line = format!("cannot open `{name}` in the store: {}", plain(&error));
    match error.kind() {
        io::ErrorKind::PermissionDenied => Refusal::new(code::PERMISSION, line)
            .hint("the image is restricted: its owner or the site's admins may give you the right"),
        io::ErrorKind::NotFound => Refusal::new(code::OTHER, line)
            .hint("`berth images` lists what is there; `berth pull` brings it"),
        _ => Refusal::new(code::UNAVAILABLE, line).hint(format!(
            "is the store `{}` in order? `berth doctor` tells",
            store.display()
        )),
    }
}

/// In the child, as the user. Only the data file's name is taken from the record.
fn find(
    store: &Path,
    keys: &[PublicKey],
    wanted: &Wanted,
    digest: &Digest,
) -> Result<(Vec<u8>, OwnedFd, OwnedFd), Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let root = open(store, flags, Bits::empty())?;
    let within = |path: &Path| {
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS | ResolveFlags::NO_SYMLINKS;
        openat2(&root, path, flags, Bits::empty(), resolve)
    };
    let mut found = Err(Errno::NOENT);
    // Twice: a record may be replaced, and its old data file renamed away, between the two opens.
    for _ in 0..2 {
        let file = File::from(within(&layout::record(digest, &wanted.platform))?);
        let mut record = Vec::new();
        let read = file.take(MAX_ENVELOPE as u64).read_to_end(&mut record);
        read.map_err(|e| Errno::from_io_error(&e).unwrap_or(Errno::IO))?;
        let sealed = Record::open(&record, keys, digest, &wanted.platform);
        let (sealed, _) = sealed.map_err(|_| Errno::BADMSG)?;
        let path = layout::image_dir(digest, &wanted.platform).join(sealed.file.name());
        let place = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let format = openat(&root, layout::FORMAT, place, Bits::empty())?;
        found = within(&path).map(|data| (record, data, format));
        if !matches!(found, Err(Errno::NOENT | Errno::STALE)) {
            break;
        }
    }
    found
}
