//! A task's own process: wait for the container, enter it as the last thing, or end.
//!
//! Invariant: after `task_init` the task is either where it was asked to run or it has ended. Waiting happens here and
//! not in slurmstepd, where scancel would not be heard.
#![allow(unsafe_code, reason = "prctl and signal calls")]

use crate::caps;
use crate::ffi::{self, Spank, errno_text};
use crate::names;
use crate::node::{self, Failure, Link, Step};
use crate::sockets;
use crate::wire::{Answer, Body, Reader, Ready};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

/// How far this task's container is. Each task has its own copy.
#[derive(Debug)]
enum Container {
    /// `task_init_privileged` has not run to its end.
    Unknown,
    Ready {
        namespace: OwnedFd,
        ready: Ready,
    },
    Failed(Failure),
}

static CONTAINER: Mutex<Container> = Mutex::new(Container::Unknown);

fn container() -> MutexGuard<'static, Container> {
    CONTAINER.lock().unwrap_or_else(PoisonError::into_inner)
}

/// As root: ask the step's helper for the namespace and wait for it. The end, if it must be, comes in [`init`]: slurmstepd
/// still puts this process into its groups and containers and expects to find it.
pub fn init_privileged(spank: Spank) {
    let Some(link) = take_link() else { return };
    become_cancellable();
    *container() = match obtain(spank, link) {
        Ok((namespace, ready)) => Container::Ready { namespace, ready },
        Err(failure) => Container::Failed(failure),
    };
}

/// The link, once. What stays behind keeps this task from running, should anything below go wrong.
fn take_link() -> Option<Link> {
    let mut step = node::step();
    if !matches!(&*step, Step::Container(_)) {
        return None;
    }
    let failed = Step::Failed(Failure::new(node::BUG));
    match std::mem::replace(&mut *step, failed) {
        Step::Container(link) => Some(link),
        _ => None,
    }
}

/// As the user, after Slurm has done everything else: enter the container, or end the task.
pub fn init(spank: Spank) {
    match std::mem::replace(&mut *container(), Container::Unknown) {
        Container::Ready { namespace, ready } => {
            if let Err(failure) = enter(spank, &namespace, &ready) {
                end(&failure);
            }
        }
        Container::Failed(failure) => end(&failure),
        Container::Unknown => match &*node::step() {
            Step::Failed(failure) => end(&only_first(spank, failure.clone())),
            Step::Host => mark(spank),
            Step::Container(_) => end(&Failure::new("the plugin was called out of order")),
            Step::Undecided => end_if_container_wanted(spank),
        },
    }
}

/// A bug of ours in a task hook.
pub fn poison() {
    if !matches!(&*node::step(), Step::Host) {
        end(&Failure::new(node::BUG));
    }
}

/// `init_post_opt` did not get to a decision, so look again: what nobody asked to contain may run.
fn end_if_container_wanted(spank: Spank) {
    let wanted = |name| {
        spank
            .env(name)
            .map_or(true, |value| value.is_some_and(|value| !value.is_empty()))
    };
    if wanted(names::CONTAINER) || wanted(names::JOB_IMAGE) {
        end(&Failure::new("the plugin did not get to prepare it"));
    }
}

/// One line per node is enough for what failed for the whole node.
fn only_first(spank: Spank, failure: Failure) -> Failure {
    if spank.local_task() == Some(0) {
        failure
    } else {
        Failure {
            text: Vec::new(),
            ..failure
        }
    }
}

/// Lets scancel end this process while it waits: slurmd signals nothing that is still called slurmstepd, and Slurm
/// blocks the signals until later.
fn become_cancellable() {
    // SAFETY: a name of less than 16 bytes, a default disposition, an empty mask: all on local memory.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, c"berth-wait".as_ptr());
        let mut default: libc::sigaction = std::mem::zeroed();
        default.sa_sigaction = libc::SIG_DFL;
        libc::sigaction(libc::SIGTERM, &raw const default, std::ptr::null_mut());
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
    }
}

/// Asks for this task's namespace and waits for the answer, at most as long as the site allows.
fn obtain(spank: Spank, link: Link) -> Result<(OwnedFd, Ready), Failure> {
    let deadline = Instant::now() + link.wait;
    let failed = |number| {
        Failure::new(format!(
            "this task cannot ask for it: {}",
            errno_text(number)
        ))
    };
    let (ours, theirs) = sockets::pair().map_err(failed)?;
    let own_view = sockets::open(c"/proc/self/ns/mnt", libc::O_RDONLY).map_err(failed)?;
    let local = spank.local_task().ok_or_else(|| failed(libc::EINVAL))?;
    let cwd = std::env::current_dir().map_or_else(
        |_| b"/".to_vec(),
        |path| path.into_os_string().into_encoded_bytes(),
    );
    let mut body = Body::default();
    body.number("task", local)
        .number("procid", spank.global_task().unwrap_or(local))
        .field("cwd", &cwd);
    let message = body
        .messages(b'T')
        .and_then(|mut parts| parts.pop())
        .ok_or_else(|| failed(libc::E2BIG))?;
    let sent = sockets::send(
        link.helper.as_fd(),
        &message,
        &[theirs.as_raw_fd(), own_view.as_raw_fd()],
        deadline,
    );
    drop(theirs);
    let obtained = match sent {
        Ok(()) => listen(&ours, deadline, link.first_node && local == 0),
        Err(libc::ETIMEDOUT) => Err(Silence::TooLong),
        Err(_) => Err(Silence::Ended),
    };
    obtained.map_err(|silence| match silence {
        Silence::Said(failure) => failure,
        Silence::TooLong => only_first(
            spank,
            Failure::new(format!("not ready within {} s", link.wait.as_secs())),
        ),
        Silence::Ended => only_first(spank, last_words(&link)),
    })
}

/// Why no namespace came.
enum Silence {
    Said(Failure),
    TooLong,
    Ended,
}

fn listen(
    socket: &OwnedFd,
    deadline: Instant,
    show_progress: bool,
) -> Result<(OwnedFd, Ready), Silence> {
    let nonsense = || Silence::Said(Failure::new("the node's helper answered nonsense"));
    let mut reader = Reader::default();
    loop {
        let received = match sockets::receive(socket.as_fd(), deadline) {
            Ok(received) if received.message.is_empty() => return Err(Silence::Ended),
            Ok(received) => received,
            Err(libc::ETIMEDOUT) => return Err(Silence::TooLong),
            Err(libc::EMSGSIZE) => return Err(nonsense()),
            Err(_) => return Err(Silence::Ended),
        };
        match reader.take(&received.message).map_err(|_| nonsense())? {
            None => {}
            Some(Answer::Progress(text)) if show_progress => {
                ffi::write_stderr(&[&text[..], b"\n"].concat())
            }
            Some(Answer::Progress(_)) => {}
            Some(Answer::Error { code, text }) => {
                return Err(Silence::Said(Failure { code, text }));
            }
            Some(Answer::Ready(ready)) => {
                let namespace = received.fd.ok_or_else(nonsense)?;
                return caps::keep_over_user_change()
                    .map(|()| (namespace, ready))
                    .map_err(|caps::Failed(what, number)| Silence::Said(cannot(what, number)));
            }
        }
    }
}

/// What a helper that ended left in the step's socket, for all tasks to read.
fn last_words(link: &Link) -> Failure {
    let words = sockets::peek(link.helper.as_fd())
        .and_then(|message| Reader::default().take(&message).ok().flatten());
    match words {
        Some(Answer::Error { code, text }) => Failure { code, text },
        _ => Failure::new(
            "the node's helper ended early\nhint: an admin finds its messages in the file that 'log=' in plugstack.conf names",
        ),
    }
}

fn enter(spank: Spank, namespace: &OwnedFd, ready: &Ready) -> Result<(), Failure> {
    let bad = || Failure::new("the node's helper answered nonsense");
    let cwd = ffi::c_string(&ready.cwd).ok_or_else(bad)?;
    for name in &ready.unset {
        spank.unset_env(&ffi::c_string(name).ok_or_else(bad)?);
    }
    for (name, value) in &ready.env {
        let (name, value) = (
            ffi::c_string(name).ok_or_else(bad)?,
            ffi::c_string(value).ok_or_else(bad)?,
        );
        if !spank.set_env(&name, &value) {
            return Err(Failure::new("Slurm did not take the image's environment"));
        }
    }
    mark(spank);
    // Nothing of Slurm's or libc's that looks at files may be called from here on.
    caps::enter(namespace.as_fd(), &cwd).map_err(|caps::Failed(what, number)| {
        if what != caps::CHDIR {
            return cannot(what, number);
        }
        let cwd = String::from_utf8_lossy(&ready.cwd);
        let reason = errno_text(number);
        let text = format!(
            "cannot enter the working directory '{cwd}': {reason}\n\
             hint: name another with --container-workdir=PATH, or mount it with --container-mounts={cwd}"
        );
        only_first(spank, Failure::new(text))
    })
}

fn cannot(what: &str, number: i32) -> Failure {
    Failure::new(format!("cannot {what}: {}", errno_text(number)))
}

/// Tells `berth-guard` that the plugin has seen this task.
fn mark(spank: Spank) {
    let get = |name| spank.env(name).ok().flatten();
    if let (Some(job), Some(node), Some(_)) = (
        get(c"SLURM_JOB_ID"),
        get(c"SLURMD_NODENAME"),
        get(names::JOB_IMAGE),
    ) && let Some(value) = ffi::c_string(&[&job[..], b"@", &node].concat())
    {
        spank.set_env(names::TASK, &value);
    }
}

fn end(failure: &Failure) -> ! {
    if !failure.text.is_empty() {
        ffi::write_stderr(&[failure.text.trim_ascii_end(), b"\n"].concat());
    }
    ffi::exit_now(if failure.code == 0 {
        node::NOT_STARTED
    } else {
        failure.code
    })
}
