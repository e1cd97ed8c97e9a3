//! An image served by `berth-fuse` through FUSE, for a mount that this process makes.
//!
//! The server runs outside of this process's namespaces-to-be, and ends when its mount is gone: a process inside would
//! keep the mount alive that keeps it alive. It is given the image's descriptor, one end of a socket, and nothing else.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use crate::channel::Channel;
use crate::refusal::{Refusal, code};
use crate::sys::{self, Child};
use crate::text::{one_line, plain};
use crate::user::User;

/// How long the server may take to look at the image.
const PATIENCE: Duration = Duration::from_secs(30);

/// The uid and gid that own nothing.
const NOBODY: u32 = 65_534;

/// Who serves an image.
#[derive(Debug, Clone, Copy)]
pub(crate) enum As<'a> {
    /// The user who runs this process, by a process that lives on when this one ends or becomes another program.
    Itself,
    /// The user that this name or number means, for a process of root's; the server's keeper does not outlive its
    /// parent.
    Service(&'a str),
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
    /// The server's keeper, where that is this process's child.
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
        let run = || {
            let error = become_server(&program, bytes, &theirs, who);
            let line = format!("ecannot run `{}`: {}", program.display(), plain(&error));
            let _ = theirs.send(line.as_bytes(), &[]);
            1
        };
        let keeper = match who {
            As::Service(_) => Some(sys::fork(run).map_err(broken)?),
            As::Itself => {
                // Twice, so that it is no child of the program that this process becomes.
                let between = sys::fork(|| {
                    let _ = rustix::process::setsid();
                    match sys::fork(run) {
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

/// The service's user where the node has it, else nobody. Asks the account database: only where that may take its time.
fn service_user(name: &str) -> User {
    let alone = |uid, gid| User {
        uid,
        gid,
        groups: Vec::new(),
    };
    let found = match name.parse() {
        Ok(number) => alone(number, number),
        Err(_) => match nix::unistd::User::from_name(name) {
            Ok(Some(entry)) => alone(entry.uid.as_raw(), entry.gid.as_raw()),
            _ => alone(NOBODY, NOBODY),
        },
    };
    // Never root, whatever somebody wrote into the account database.
    match found.uid {
        0 => alone(NOBODY, NOBODY),
        _ => found,
    }
}

/// `berth-fuse` of the same installation.
fn program() -> io::Result<PathBuf> {
    Ok(std::env::current_exe()?.with_file_name("berth-fuse"))
}

/// The life of the child: becomes the server, or gives the reason why not.
fn become_server(program: &Path, bytes: &Bytes<'_>, channel: &Channel, who: As<'_>) -> io::Error {
    let prepared = || {
        let kept: Vec<BorrowedFd<'_>> = bytes.file.into_iter().chain([channel.as_fd()]).collect();
        sys::keep_for_exec(&kept)?;
        rustix::process::chdir("/")?;
        match who {
            As::Itself => Ok(()),
            As::Service(name) => service_user(name).become_for_good(),
        }
    };
    if let Err(error) = prepared() {
        return error;
    }
    // It shares the terminal of whoever runs the command, who did not ask for its warnings.
    let log = std::env::var_os("BERTH_LOG").unwrap_or_else(|| "error".into());
    Command::new(program)
        .arg("hold")
        .args(["--channel", &channel.as_fd().as_raw_fd().to_string()])
        .args((bytes.file).map(|file| format!("--image={}", file.as_raw_fd())))
        .args(bytes.options)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .env_clear()
        .env("BERTH_LOG", log)
        .envs(bytes.grant.map(|grant| ("BERTH_GRANT", grant)))
        .exec()
}
