//! Opens paths that a user named, with that user's rights and nothing else.
//!
//! A forked child becomes the user for good, closes every descriptor but its socket, and opens what it is asked to;
//! descriptors come back over the socket. Magic links (`/proc/self/fd/N`, `/proc/self/root`) are never followed, so a
//! path leads nowhere that the user could not go. Each open has a deadline: a dead filesystem costs an error, not a
//! hang. The child lives in the mount namespace that its parent had when it was started.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, openat2};
use rustix::io::Errno;
use thiserror::Error;

use crate::channel::Channel;
use crate::sys::{self, Child};
use crate::text::plain;
use crate::user::{self, User};

/// How long one path may take to open.
const PATIENCE: Duration = Duration::from_secs(10);
/// How long the child may live at all.
const LIFETIME_SECONDS: u32 = 120;
/// Longest path, as the kernel has it (`PATH_MAX`).
const LONGEST: usize = 4096;
/// Largest file that is read through the child.
const LARGEST: u64 = 48 << 10;

/// Why a path was not opened.
#[derive(Debug, Error)]
pub enum OpenError {
    /// The system refused.
    #[error("{}", plain(.0))]
    Refused(#[source] io::Error),
    /// The filesystem did not answer in time.
    #[error("its filesystem did not answer within {} s", PATIENCE.as_secs())]
    Slow,
    /// The child ended, or could not be started.
    #[error("the process that opens it as the user ended: {}", plain(.0))]
    Ended(#[source] io::Error),
}

impl OpenError {
    /// Whether there is nothing of that name.
    pub fn is_absent(&self) -> bool {
        match self {
            OpenError::Refused(e) => e.kind() == io::ErrorKind::NotFound,
            _ => false,
        }
    }
}

/// What to do with a path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Ask {
    /// An `O_PATH` descriptor.
    Place = b'p' as isize,
    /// The same for a folder that the user may make the working directory.
    Enter = b'e' as isize,
    /// The content of a small file.
    Read = b'r' as isize,
    /// An `O_PATH` descriptor below the folder that comes with the question, which no name can leave.
    Inside = b'i' as isize,
}

/// The child, seen from its parent.
#[derive(Debug)]
pub(crate) struct Opener {
    channel: Channel,
    child: Child,
    dead: bool,
    /// Asked ahead and not answered yet, in order.
    asked: VecDeque<(Ask, PathBuf)>,
    /// Answers to what was asked ahead, until somebody wants them.
    known: Vec<((Ask, PathBuf), Result<Answer, OpenError>)>,
}

impl Opener {
    /// Starts the child in this process's mount namespace.
    pub(crate) fn start(user: &User) -> io::Result<Opener> {
        Opener::start_after(|| user.become_for_good())
    }

    /// The same where this process is the user already.
    pub(crate) fn start_as_is() -> io::Result<Opener> {
        Opener::start_after(user::stay_for_good)
    }

    fn start_after(change: impl FnOnce() -> io::Result<()>) -> io::Result<Opener> {
        let (ours, theirs) = Channel::pair()?;
        let child = sys::fork(|| i32::from(serve(change, &theirs).is_err()))?;
        Ok(Opener {
            channel: ours,
            child,
            dead: false,
            asked: VecDeque::new(),
            known: Vec::new(),
        })
    }

    /// Ends the child, and waits for that.
    pub(crate) fn end(self) {
        self.child.end();
    }

    /// Asks for places and files that will be wanted, and waits for none: the child opens them while this process does
    /// something else.
    pub(crate) fn foresee<'a>(
        &mut self,
        places: impl Iterator<Item = &'a Path>,
        files: impl Iterator<Item = &'a Path>,
    ) {
        let places = places.map(|path| (Ask::Place, path));
        for (ask, path) in places.chain(files.map(|path| (Ask::Read, path))) {
            if self.send(ask, path, &[]).is_ok() {
                self.asked.push_back((ask, path.to_owned()));
            }
        }
    }

    /// Opens each path, whatever it is, for use as a place (`O_PATH`). Answers come in the order of the questions.
    pub(crate) fn places(&mut self, paths: &[&Path]) -> Vec<Result<OwnedFd, OpenError>> {
        // First all questions, then all answers.
        let asked: Vec<_> = (paths.iter())
            .map(|path| match self.foreseen(Ask::Place, path) {
                Some(answer) => Ok(Some(answer)),
                None => self.send(Ask::Place, path, &[]).map(|()| None),
            })
            .collect();
        let answers = asked.into_iter().map(|asked| match asked? {
            Some(answer) => answer?.descriptor(),
            None => self.answer()?.descriptor(),
        });
        answers.collect()
    }

    /// A folder in which the user may be.
    pub(crate) fn enter(&mut self, path: &Path) -> Result<OwnedFd, OpenError> {
        self.ask(Ask::Enter, path, &[])?.descriptor()
    }

    /// A place below `root`, whatever it is; absolute links, too, stay inside.
    pub(crate) fn inside(
        &mut self,
        root: BorrowedFd<'_>,
        path: &Path,
    ) -> Result<OwnedFd, OpenError> {
        self.ask(Ask::Inside, path, &[root])?.descriptor()
    }

    /// The content of a regular file of at most 48 KiB.
    pub(crate) fn read(&mut self, path: &Path) -> Result<Vec<u8>, OpenError> {
        let answer = match self.foreseen(Ask::Read, path) {
            Some(answer) => answer?,
            None => self.ask(Ask::Read, path, &[])?,
        };
        Ok(answer.bytes)
    }

    /// The answer to a question that was asked ahead.
    fn foreseen(&mut self, ask: Ask, path: &Path) -> Option<Result<Answer, OpenError>> {
        self.hear_foreseen();
        let is_it = |((a, p), _): &((Ask, PathBuf), _)| *a == ask && p == path;
        let index = self.known.iter().position(is_it)?;
        Some(self.known.swap_remove(index).1)
    }

    fn hear_foreseen(&mut self) {
        while let Some(question) = self.asked.pop_front() {
            let answer = self.answer();
            self.known.push((question, answer));
        }
    }

    fn ask(&mut self, ask: Ask, path: &Path, fds: &[BorrowedFd<'_>]) -> Result<Answer, OpenError> {
        self.hear_foreseen();
        self.send(ask, path, fds)?;
        self.answer()
    }

    fn send(&mut self, ask: Ask, path: &Path, fds: &[BorrowedFd<'_>]) -> Result<(), OpenError> {
        let path = path.as_os_str().as_bytes();
        if path.len() >= LONGEST || path.contains(&0) {
            return Err(OpenError::Refused(Errno::NAMETOOLONG.into()));
        }
        if self.dead {
            return Err(OpenError::Slow);
        }
        let mut packet = Vec::with_capacity(path.len() + 1);
        packet.push(ask as u8);
        packet.extend_from_slice(path);
        self.channel
            .send_wait(&packet, fds)
            .map_err(OpenError::Ended)
    }

    fn answer(&mut self) -> Result<Answer, OpenError> {
        if self.dead {
            return Err(OpenError::Slow);
        }
        let packet = match self.channel.receive_until(Instant::now() + PATIENCE) {
            Ok(Some(packet)) => packet,
            Ok(None) => return Err(OpenError::Ended(io::ErrorKind::UnexpectedEof.into())),
            Err(e) if e.kind() == io::ErrorKind::TimedOut => {
                self.dead = true;
                return Err(OpenError::Slow);
            }
            Err(e) => return Err(OpenError::Ended(e)),
        };
        let Some((errno, rest)) = packet.bytes.split_first_chunk::<4>() else {
            return Err(OpenError::Ended(io::ErrorKind::InvalidData.into()));
        };
        match i32::from_le_bytes(*errno) {
            0 => Ok(Answer {
                bytes: rest.to_vec(),
                descriptor: packet.descriptors.into_iter().next(),
            }),
            errno => Err(OpenError::Refused(io::Error::from_raw_os_error(errno))),
        }
    }
}

/// A good answer of the child's.
#[derive(Debug)]
struct Answer {
    bytes: Vec<u8>,
    descriptor: Option<OwnedFd>,
}

impl Answer {
    fn descriptor(self) -> Result<OwnedFd, OpenError> {
        self.descriptor
            .ok_or_else(|| OpenError::Ended(io::ErrorKind::InvalidData.into()))
    }
}

/// The child's life. It owns no descriptor but `channel`, which it takes over.
fn serve(change: impl FnOnce() -> io::Result<()>, channel: &Channel) -> io::Result<()> {
    let channel = Channel::from_fd(sys::close_all_but(channel.as_fd())?);
    sys::die_after(LIFETIME_SECONDS);
    change()?;
    rustix::process::chdir("/")?;
    while let Some(packet) = channel.receive()? {
        let Some((ask, path)) = packet.bytes.split_first() else {
            continue;
        };
        let path = Path::new(OsStr::from_bytes(path));
        let done = match *ask {
            b'p' => place(path).map(Done::Opened),
            b'e' => enter(path).map(Done::Opened),
            b'i' => inside(packet.descriptors.first(), path).map(Done::Opened),
            _ => read(path).map(Done::Read),
        };
        match done {
            Ok(Done::Opened(fd)) => channel.send_wait(&0i32.to_le_bytes(), &[fd.as_fd()])?,
            Ok(Done::Read(bytes)) => {
                let mut packet = 0i32.to_le_bytes().to_vec();
                packet.extend_from_slice(&bytes);
                channel.send_wait(&packet, &[])?;
            }
            Err(errno) => channel.send_wait(&errno.raw_os_error().to_le_bytes(), &[])?,
        }
    }
    Ok(())
}

enum Done {
    Opened(OwnedFd),
    Read(Vec<u8>),
}

fn place(path: &Path) -> Result<OwnedFd, Errno> {
    // As a folder first: that is what makes an automounter mount.
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    match open_plain(path, flags | OFlags::DIRECTORY) {
        Err(Errno::NOTDIR) => open_plain(path, flags),
        other => other,
    }
}

fn enter(path: &Path) -> Result<OwnedFd, Errno> {
    // The last dot asks for the right to search the folder itself.
    let inside: PathBuf = path.join(".");
    let flags = OFlags::PATH | OFlags::CLOEXEC | OFlags::DIRECTORY;
    open_plain(&inside, flags)
}

fn inside(root: Option<&OwnedFd>, path: &Path) -> Result<OwnedFd, Errno> {
    let root = root.ok_or(Errno::BADF)?;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    openat2(root, path, flags, Mode::empty(), resolve)
}

fn read(path: &Path) -> Result<Vec<u8>, Errno> {
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let file = File::from(open_plain(path, flags)?);
    let mut bytes = Vec::new();
    match file.take(LARGEST + 1).read_to_end(&mut bytes) {
        Ok(read) if read as u64 > LARGEST => Err(Errno::FBIG),
        Ok(_) => Ok(bytes),
        Err(error) => Err(Errno::from_io_error(&error).unwrap_or(Errno::IO)),
    }
}

fn open_plain(path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    if !path.is_absolute() {
        return Err(Errno::INVAL);
    }
    openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS)
}
