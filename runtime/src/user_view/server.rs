//! An image served by `berth-fuse` through FUSE, for a mount that this process makes.
//!
//! The server runs outside of this process's namespaces-to-be, and ends when its mount is gone: a process inside would
//! keep the mount alive that keeps it alive. It is given the image's descriptor, one end of a socket, and nothing else.
//! Where root starts it, for a job's own file, root never has that descriptor.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::channel::Channel;
use crate::own_image;
use crate::refusal::{Refusal, code};
use crate::sys::{self, Child};
use crate::text::{one_line, plain};
use crate::user::User;

/// How long the server may take to look at the image.
const PATIENCE: Duration = Duration::from_secs(30);

/// Who serves an image.
#[derive(Debug, Clone, Copy)]
pub(crate) enum As<'a> {
    /// The user who runs this process, by a process that lives on when this one ends or becomes another program.
    Itself,
    /// Nobody that owns anything ([`apart`]), confined, for a process of root's that it does not outlive. The file at
    /// this path is opened by a process that is wholly this user, and given straight to the server: a file may lie on a
    /// filesystem of the user's that answers no close, and whoever holds it then cannot end.
    Apart { path: &'a Path, user: &'a User },
}

/// Where an image's bytes are.
#[derive(Clone, Copy)]
pub(crate) struct Bytes<'a> {
    pub(crate) file: Option<BorrowedFd<'a>>,
    /// More options of `berth-fuse hold`.
    pub(crate) options: &'a [OsString],
    /// A secret, for the server's environment.
    pub(crate) grant: Option<&'a str>,
}

/// A server that waits for its connection.
#[derive(Debug)]
pub(crate) struct Server {
    channel: Channel,
    /// The server, where that is this process's child.
    keeper: Option<Child>,
}

impl Server {
    /// Starts a server for an image, which it has looked at when this returns. `name` is for messages.
    pub(crate) fn start(bytes: &Bytes<'_>, name: &str, who: As<'_>) -> Result<Server, Refusal> {
        let broken = |e: io::Error| {
            let line = format!("cannot start the server of `{name}`: {}", plain(&e));
            Refusal::new(code::INTERNAL, line)
        };
        let program = program().map_err(broken)?;
        let (ours, theirs) = Channel::pair().map_err(broken)?;
        let run = |prepare: &dyn Fn() -> io::Result<Option<OwnedFd>>| {
            let error = become_server(&program, bytes, &theirs, prepare);
            let line = format!("e{}", plain(&error));
            let _ = theirs.send(line.as_bytes(), &[]);
            1
        };
        // Lives until the server has the image.
        let mut _opener = None;
        let keeper = match who {
            As::Apart { path, user } => {
                let (sends, receives) = Channel::pair().map_err(broken)?;
                let prepare = || become_apart(user, &theirs, &receives).map(Some);
                let server = sys::fork(|| run(&prepare)).map_err(broken)?;
                // From here the file can reach the server only.
                drop(receives);
                let opener = sys::fork(|| i32::from(give(path, user, &sends).is_err()));
                _opener = Some(opener.map_err(broken)?);
                Some(server)
            }
            As::Itself => {
                // Twice, so that it is no child of the program that this process becomes.
                let between = sys::fork(|| {
                    let _ = rustix::process::setsid();
                    match sys::fork(|| run(&|| Ok(None))) {
                        Ok(server) => server.let_go(),
                        Err(_) => return 1,
                    }
                    0
                });
                between.map_err(broken)?.wait();
                None
            }
        };
        drop(theirs);
        let packet = ours.receive_until(Instant::now() + PATIENCE);
        match packet.map(|p| p.map(|p| p.bytes)) {
            Ok(Some(said)) if said == b"k" => Ok(Server {
                channel: ours,
                keeper,
            }),
            Ok(Some(said)) => {
                let why = String::from_utf8_lossy(said.get(1..).unwrap_or_default()).into_owned();
                let line = format!("cannot use the image `{name}`: {}", one_line(&why));
                Err(Refusal::new(code::OTHER, line))
            }
            Err(e) if e.kind() == io::ErrorKind::TimedOut => {
                let line = format!(
                    "the filesystem of `{name}` did not answer within {} s",
                    PATIENCE.as_secs()
                );
                Err(Refusal::new(code::UNAVAILABLE, line))
            }
            Ok(None) => Err(broken(io::ErrorKind::UnexpectedEof.into())),
            Err(e) => Err(broken(e)),
        }
    }

    /// Makes the connection and its mount, which is attached nowhere, in this process's user namespace; and the keeper
    /// to hold on to, where there is one.
    pub(crate) fn mount(self) -> Result<(OwnedFd, Option<Child>), Refusal> {
        let of_node = |why: String| {
            Refusal::new(code::INTERNAL, why)
                .hint("`berth doctor` tells what this machine lacks: /dev/fuse must be there, and open to all")
        };
        let device = berth_mount::fuse::open_device().map_err(|e| of_node(e.to_string()))?;
        let mount =
            berth_mount::fuse::detached(device.as_fd()).map_err(|e| of_node(e.to_string()))?;
        let sent = self.channel.send_wait(b"d", &[device.as_fd()]);
        sent.map_err(|e| of_node(format!("the image's server is gone: {}", plain(&e))))?;
        Ok((mount, self.keeper))
    }
}

/// Where the numbers begin under which users' files are served, and how many there are: below 2^31, above what account
/// services of directories give out, and beyond what user namespaces and services on demand are given.
const APART: u32 = 2_100_000_000;
const NUMBERS: u32 = 40_000_000;

/// The number that serves the files of a user: no account's, so that it owns nothing, neither the user's, who could stop
/// it, nor the node service's, whose cache and server a file that breaks its reader must not reach. Different users'
/// servers have different ones as a rule.
fn apart(user: &User) -> User {
    let number = |of: u32| APART + of % NUMBERS;
    let uid = match number(user.uid) {
        same if same == user.uid => number(user.uid.wrapping_add(1)),
        uid => uid,
    };
    User {
        uid,
        gid: uid,
        groups: Vec::new(),
    }
}

/// In the child that opens the file, as the user: hands it to the server.
fn give(path: &Path, user: &User, to: &Channel) -> io::Result<()> {
    let to = Channel::from_fd(sys::close_all_but(to.as_fd())?);
    sys::die_after(u32::try_from(PATIENCE.as_secs()).unwrap_or(u32::MAX));
    user.become_for_good()?;
    match own_image::open(path) {
        Ok(file) => to.send_wait(b"i", &[file.as_fd()]),
        Err(_) => Err(io::ErrorKind::NotFound.into()),
    }
}

/// In the child that becomes the server: whom it runs as, and the image.
fn become_apart(user: &User, channel: &Channel, from: &Channel) -> io::Result<OwnedFd> {
    // Not the other end of `from`: when the opener ends without a word, this is to hear it.
    sys::keep_for_exec(&[channel.as_fd(), from.as_fd()])?;
    apart(user).become_for_good()?;
    let packet = from.receive_until(Instant::now() + PATIENCE)?;
    let image = packet.and_then(|packet| packet.descriptors.into_iter().next());
    image.ok_or_else(|| io::Error::other("it cannot be opened any more"))
}

/// `berth-fuse` of the same installation.
fn program() -> io::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name("berth-fuse"))
}

/// The life of the child: becomes the server, or gives the reason why not. `prepare` gives the image, where `bytes` has
/// none.
fn become_server(
    program: &Path,
    bytes: &Bytes<'_>,
    channel: &Channel,
    prepare: &dyn Fn() -> io::Result<Option<OwnedFd>>,
) -> io::Error {
    let given = match prepare() {
        Ok(given) => given,
        Err(error) => return error,
    };
    let file = bytes.file.or(given.as_ref().map(AsFd::as_fd));
    let kept: Vec<BorrowedFd<'_>> = file.into_iter().chain([channel.as_fd()]).collect();
    let prepared = sys::keep_for_exec(&kept).and_then(|()| Ok(rustix::process::chdir("/")?));
    if let Err(error) = prepared {
        return error;
    }
    // It shares the terminal of whoever runs the command, who did not ask for its warnings.
    let log = std::env::var_os("BERTH_LOG").unwrap_or_else(|| "error".into());
    let error = Command::new(program)
        .arg("hold")
        .args(["--channel", &channel.as_fd().as_raw_fd().to_string()])
        .args(file.map(|file| format!("--image={}", file.as_raw_fd())))
        .args(given.is_some().then_some("--confined"))
        .args(bytes.options)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .env_clear()
        .env("BERTH_LOG", log)
        .envs(bytes.grant.map(|grant| ("BERTH_GRANT", grant)))
        .exec();
    io::Error::other(format!(
        "cannot run `{}`: {}",
        program.display(),
        plain(&error)
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_served_under_numbers_of_nobody() {
        let serves = |uid| {
            let user = User {
                uid,
                gid: 100,
                groups: vec![0, 27],
            };
            apart(&user)
        };
        for uid in [
            0,
            1000,
            64_304,
            65_534,
            APART,
            APART + NUMBERS - 1,
            u32::MAX,
        ] {
            let server = serves(uid);
            assert!((APART..APART + NUMBERS).contains(&server.uid), "{uid}");
            assert_ne!(server.uid, uid);
            assert_eq!((server.gid, server.groups), (server.uid, vec![]));
        }
        assert_ne!(serves(1000).uid, serves(1001).uid);
    }
}
