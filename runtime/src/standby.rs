//! `berth-runtime standby`: a service of each node that has the site's configuration and keys read, and forks for each step
//! what `berth-runtime step` would be: a program's start and reading all that anew are a third of a warm container's.
//!
//! It has one thread, touches nothing of a user's and parses the site's own files only; what it forks is on its own. It
//! listens to root alone. No job needs it: where nobody answers, the plugin starts the program by itself.
//!
//! A helper whose step is over may stay for the next one of the same kind ([`step::Stay`]): plugins say by a number which
//! kind a step is of, and a helper that has nothing to do is passed the connection. It looks itself whether the step is
//! one that it can serve.
//!
//! Before each fork it looks whether the files it has read are the same (inode, size, times); a child that is to have
//! another configuration reads that, and says what is wrong with it, and who stayed with the old one leaves. The socket's
//! name carries the release, so that plugin and helper are always of one.

use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, setns};
use nix::sys::signal::{SigSet, Signal};
use nix::sys::signalfd::{SfdFlags, SignalFd};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::{Mode, fstat, stat};
use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Shutdown, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, listen,
    shutdown, socket_with,
};
use rustix::process::{WaitOptions, wait};

use crate::channel::{Channel, Packet};
use crate::refusal::{Refusal, code};
use crate::step::{self, Stay, stay};
use crate::trusted::{self, Site, TrustError};
use crate::{sys, user};

/// Steps that may wait to be taken; for more, the plugin starts the program.
const BACKLOG: i32 = 64;
/// How long others may wait for a plugin's first word.
const FIRST_WORD: Duration = Duration::from_millis(10);
/// Helpers that may stay without a step; of each kind one.
const MOST_FREE: usize = 16;

/// Waits for steps until SIGTERM.
pub(crate) fn run(path: &Path) -> Result<(), Refusal> {
    if !rustix::process::geteuid().is_root() {
        let line = "what builds jobs' mount namespaces needs root";
        return Err(Refusal::new(code::PERMISSION, line));
    }
    let refused = |e: TrustError| Refusal::new(code::CONFIG, e.to_string());
    let site = Site::load(path).map_err(refused)?;
    trusted::own_folder(&site.config.node.run_dir).map_err(refused)?;
    let socket = site.config.node.step_socket();
    let served = Standby::new(path, site, &socket).and_then(Standby::serve);
    served.map_err(|error| {
        let line = format!("cannot serve steps at `{}`: {error}", socket.display());
        Refusal::new(code::INTERNAL, line)
    })
}

struct Standby<'a> {
    path: &'a Path,
    /// None where the files make no sense now.
    site: Option<Site>,
    socket: &'a Path,
    listener: OwnedFd,
    signals: SignalFd,
    /// Those that may stay when their steps are over.
    helpers: Vec<Helper>,
}

/// A helper of a kind of steps.
struct Helper {
    /// Closed, it leaves when its step is over.
    channel: Channel,
    kind: u64,
    /// It has no step.
    is_free: bool,
}

impl<'a> Standby<'a> {
    fn new(path: &'a Path, site: Site, socket: &'a Path) -> io::Result<Self> {
        user::be_root_alone()?;
        rustix::process::chdir("/")?;
        rustix::process::umask(Mode::from(0o022));
        let mut heard = SigSet::empty();
        for signal in [Signal::SIGTERM, Signal::SIGINT, Signal::SIGCHLD] {
            heard.add(signal);
        }
        heard.thread_block()?;
        let flags = SfdFlags::SFD_CLOEXEC | SfdFlags::SFD_NONBLOCK;
        Ok(Standby {
            path,
            site: Some(site),
            socket,
            listener: listen_at(socket)?,
            signals: SignalFd::with_flags(&heard, flags)?,
            helpers: Vec::new(),
        })
    }

    fn serve(mut self) -> io::Result<()> {
        loop {
            let mut fds = vec![
                PollFd::new(&self.signals, PollFlags::IN),
                PollFd::new(&self.listener, PollFlags::IN),
            ];
            let helpers = self.helpers.iter();
            fds.extend(helpers.map(|helper| PollFd::new(&helper.channel, PollFlags::IN)));
            match poll(&mut fds, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
            let heard = fds[2..].iter().map(|fd| !fd.revents().is_empty());
            self.hear_helpers(&heard.collect::<Vec<_>>());
            let stop = self.is_stopped()?;
            if stop {
                // Nobody finds it from here on, and who has found it and comes too late is refused, and starts a helper by
                // itself; who waits is served.
                let _ = std::fs::remove_file(self.socket);
                let _ = shutdown(&self.listener, Shutdown::Read);
            }
            while let Some(connection) = self.take()? {
                self.begin(connection);
            }
            if stop {
                return Ok(());
            }
        }
    }

    /// Takes signals: children that have ended, and the word to stop.
    fn is_stopped(&self) -> io::Result<bool> {
        let mut stop = false;
        while let Some(info) = self.signals.read_signal()? {
            stop |= info.ssi_signo != Signal::SIGCHLD as u32;
        }
        while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
        Ok(stop)
    }

    /// The next of root's connections that waits.
    fn take(&self) -> io::Result<Option<OwnedFd>> {
        loop {
            match accept_with(&self.listener, SocketFlags::CLOEXEC) {
                Ok(connection) => {
                    let peer = rustix::net::sockopt::socket_peercred(&connection);
                    if peer.is_ok_and(|peer| peer.uid.is_root()) {
                        return Ok(Some(connection));
                    }
                }
                Err(Errno::INTR | Errno::CONNABORTED) => {}
                Err(Errno::AGAIN) => return Ok(None),
                Err(errno) => return Err(errno.into()),
            }
        }
    }

    /// Who has no step any more may stay; who is gone is forgotten.
    fn hear_helpers(&mut self, heard: &[bool]) {
        let mut free = Vec::new();
        // From the back, so that what was heard stays beside whom it was heard of.
        for (at, _) in heard.iter().enumerate().filter(|(_, heard)| **heard).rev() {
            let helper = self.helpers.remove(at);
            let said = helper.channel.receive();
            if matches!(said, Ok(Some(packet)) if packet.bytes == stay::tag::FREE) {
                free.push(helper);
            }
        }
        for mut helper in free {
            // What it opened is younger than what another one of its kind did.
            (self.helpers).retain(|other| !other.is_free || other.kind != helper.kind);
            helper.is_free = true;
            // Behind those that have been free for longer.
            self.helpers.push(helper);
        }
        let free = self.helpers.iter().filter(|helper| helper.is_free).count();
        for _ in MOST_FREE..free {
            let oldest = self.helpers.iter().position(|helper| helper.is_free);
            oldest.map(|at| self.helpers.remove(at));
        }
    }

    /// Has a helper for the step: one that stayed, else a new one. Where that fails, the step's tasks see their connection
    /// end, and say so.
    fn begin(&mut self, connection: OwnedFd) {
        if !self
            .site
            .as_ref()
            .is_some_and(|site| site.files.are_of(self.path))
        {
            self.site = Site::load(self.path).ok();
            // Those who have a step leave when it is over.
            self.helpers.clear();
        }
        let connection = Channel::from_fd(connection);
        // A plugin's first word comes right after its connection; one that is late is waited for by the new helper.
        let first = match connection.receive_until(Instant::now() + FIRST_WORD) {
            Ok(Some(packet)) => match First::new(packet) {
                Ok(first) => Some(first),
                Err(_) => return,
            },
            Err(error) if error.kind() == io::ErrorKind::TimedOut => None,
            Ok(None) | Err(_) => return,
        };
        if !first
            .as_ref()
            .is_some_and(|first| self.pass_on(&connection, first))
            && let Err(error) = self.fork(connection, first)
        {
            let _ = writeln!(io::stderr(), "berth: cannot start a step's helper: {error}");
        }
    }

    /// Gives the step to a helper that stayed; false if there is none.
    fn pass_on(&mut self, connection: &Channel, first: &First) -> bool {
        let mut descriptors = vec![connection.as_fd()];
        descriptors.extend(first.log.as_ref().map(AsFd::as_fd));
        loop {
            let fits = |helper: &Helper| helper.is_free && Some(helper.kind) == first.kind;
            let Some(at) = self.helpers.iter().position(fits) else {
                return false;
            };
            let sent = self.helpers[at].channel.send(stay::tag::NEXT, &descriptors);
            if sent.is_ok() {
                self.helpers[at].is_free = false;
                return true;
            }
            // It has just left.
            self.helpers.remove(at);
        }
    }

    fn fork(&mut self, connection: Channel, first: Option<First>) -> io::Result<()> {
        let kind = first.as_ref().and_then(|first| first.kind);
        let (ours, theirs) = match kind {
            Some(_) => Channel::pair().map(|(ours, theirs)| (Some(ours), Some(theirs)))?,
            None => (None, None),
        };
        let site = &mut self.site;
        let child = sys::fork(|| {
            let lived = life(connection, first, theirs, site.take());
            i32::from(lived.is_err())
        })?;
        child.let_go();
        self.helpers
            .extend(ours.zip(kind).map(|(channel, kind)| Helper {
                channel,
                kind,
                is_free: false,
            }));
        Ok(())
    }
}

/// `S`, the first word of a plugin.
struct First {
    /// The plugin's mount namespace.
    namespace: OwnedFd,
    log: Option<OwnedFd>,
    /// Steps of one number are most likely of one kind. None where the step's namespace is not this process's.
    kind: Option<u64>,
}

impl First {
    fn new(packet: Packet) -> io::Result<First> {
        let mut descriptors = packet.descriptors.into_iter();
        let (Some((b'S', kind)), Some(namespace)) =
            (packet.bytes.split_first(), descriptors.next())
        else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        let kind = std::str::from_utf8(kind).ok();
        let kind = kind.and_then(|kind| u64::from_str_radix(kind, 16).ok());
        let is_own = is_own(&namespace)?;
        Ok(First {
            namespace,
            log: descriptors.next(),
            kind: kind.filter(|_| is_own),
        })
    }
}

/// Root alone may connect. What an earlier one left is replaced.
fn listen_at(path: &Path) -> io::Result<OwnedFd> {
    let part = path.with_extension("new");
    let _ = std::fs::remove_file(&part);
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)?;
    bind(&socket, &SocketAddrUnix::new(&part)?)?;
    rustix::fs::chmod(&part, Mode::from(0o600))?;
    listen(&socket, BACKLOG)?;
    rustix::fs::rename(&part, path)?;
    Ok(socket)
}

/// A child's life: wholly what the plugin would have started.
fn life(
    parent: Channel,
    first: Option<First>,
    stay: Option<Channel>,
    site: Option<Site>,
) -> io::Result<()> {
    let mut kept = vec![parent.as_fd()];
    if let Some(first) = &first {
        kept.push(first.namespace.as_fd());
        kept.extend(first.log.as_ref().map(AsFd::as_fd));
    }
    kept.extend(stay.as_ref().map(AsFd::as_fd));
    sys::close_others(&kept)?;
    sys::set_streams(None)?;
    SigSet::empty().thread_set_mask()?;
    rustix::process::setsid()?;
    let first = match first {
        Some(first) => first,
        None => First::new(parent.receive()?.ok_or(io::ErrorKind::UnexpectedEof)?)?,
    };
    sys::set_streams(first.log.as_ref().map(AsFd::as_fd))?;
    if !is_own(&first.namespace)? {
        setns(&first.namespace, CloneFlags::CLONE_NEWNS)?;
        rustix::process::chdir("/")?;
    }
    drop(first);
    step::run(parent, site, stay.and_then(Stay::new))
}

/// Whether a mount namespace is this process's.
fn is_own(namespace: &OwnedFd) -> io::Result<bool> {
    let (theirs, own) = (fstat(namespace)?, stat("/proc/self/ns/mnt")?);
    Ok((theirs.st_dev, theirs.st_ino) == (own.st_dev, own.st_ino))
}
