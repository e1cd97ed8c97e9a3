//! slurmstepd's own process, as root: decide what the step is to run in, and start the step's helper.
//!
//! Invariant: nothing here waits, and nothing here fails towards Slurm: a failure is kept, and each task says it and
//! ends in its own process. slurmstepd that dies, or returns −1, hangs srun or drains the node.

use crate::client::helper_environment;
use crate::ffi::{self, EnvError, Spank, errno_text};
use crate::names;
use crate::options;
use crate::plan::{self, StepEnv, Wish};
use crate::settings::Settings;
use crate::slurmconf;
use crate::sockets;
use crate::spawn::Program;
use crate::wire::Body;
use std::ffi::{CStr, OsStr};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// Exit code of a task that the plugin ended for a reason of its own.
pub const NOT_STARTED: u8 = 77;
/// What is said when this plugin itself went wrong.
pub const BUG: &str = "the plugin failed; this is a bug";
const EXTERN_STEP: u32 = 0xffff_fffc;
const BATCH_STEP: u32 = 0xffff_fffb;
/// Where Slurm is configured when slurmd does not say.
const SLURM_CONF: &[u8] = b"/etc/slurm/slurm.conf";

/// What is known about this step. A forked task has its own copy.
#[derive(Debug)]
pub enum Step {
    /// `init_post_opt` has not run, or not to its end.
    Undecided,
    /// No container was asked for.
    Host,
    Container(Link),
    /// A container was asked for and cannot be had.
    Failed(Failure),
}

/// The way to the step's helper.
#[derive(Debug)]
pub struct Link {
    /// Our end of the socket; the helper ends when the last copy is closed.
    pub helper: OwnedFd,
    pub wait: Duration,
    /// On the step's first node progress is shown.
    pub first_node: bool,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub code: u8,
    pub text: Vec<u8>,
}

impl Failure {
    pub fn new(text: impl Into<String>) -> Self {
        let text: String = text.into();
        Self {
            code: NOT_STARTED,
            text: format!("berth: container not started: {text}").into_bytes(),
        }
    }
}

static STEP: Mutex<Step> = Mutex::new(Step::Undecided);

pub fn step() -> MutexGuard<'static, Step> {
    STEP.lock().unwrap_or_else(PoisonError::into_inner)
}

pub fn init(spank: Spank, settings: &Settings) {
    options::register(spank, settings);
}

pub fn init_post_opt(spank: Spank, settings: &Settings) {
    if spank.step() == Some(EXTERN_STEP) {
        *step() = Step::Host;
        return;
    }
    let decided = match read_env(spank) {
        Ok(env) => plan::node(&env).map(|wish| start(spank, settings, &wish)),
        Err(failure) => Some(Err(failure)),
    };
    for name in names::STEP {
        spank.unset_env(name);
    }
    *step() = match decided {
        None => Step::Host,
        Some(Ok(link)) => Step::Container(link),
        Some(Err(failure)) => Step::Failed(failure),
    };
}

/// A bug of ours in slurmstepd's process: tasks of this step must not run.
pub fn poison() {
    *step() = Step::Failed(Failure::new(BUG));
}

/// The step's end: closing our end lets the helper go.
pub fn exit() {
    *step() = Step::Host;
}

fn read_env(spank: Spank) -> Result<StepEnv, Failure> {
    let get = |name: &CStr| {
        spank.env(name).map_err(|error| {
            let name = name.to_string_lossy();
            Failure::new(match error {
                EnvError::TooLong => format!("{name} is too long"),
                EnvError::Slurm(code) => format!("{name} cannot be read (Slurm's error {code})"),
            })
        })
    };
    Ok(StepEnv {
        container: get(names::CONTAINER)?,
        job_image: get(names::JOB_IMAGE)?,
        job_mounts: get(names::JOB_MOUNTS)?,
        job_workdir: get(names::JOB_WORKDIR)?,
        job_writable: get(names::JOB_WRITABLE)?,
        step_mounts: get(names::STEP_MOUNTS)?,
        step_workdir: get(names::STEP_WORKDIR)?,
        step_writable: get(names::STEP_WRITABLE)?,
    })
}

/// Has a helper, and tells it the step, without waiting for anything: the one that waits on this node, else a new one.
fn start(spank: Spank, settings: &Settings, wish: &Wish) -> Result<Link, Failure> {
    let (body, kind) = describe(spank, settings, wish)
        .ok_or_else(|| Failure::new("Slurm did not say who runs what"))?;
    let messages = body
        .messages(b'J')
        .ok_or_else(|| Failure::new("the mounts are too many"))?;
    let log = settings.log.as_deref().and_then(open_log);
    let waiting = match may_wait_elsewhere(&wish.reference) {
        true => waiting_helper(settings, log.as_ref(), kind, &messages),
        false => None,
    };
    let helper = match waiting {
        Some(helper) => helper,
        None => new_helper(settings, log.as_ref(), &messages)?,
    };
    Ok(Link {
        helper,
        wait: settings.wait,
        first_node: spank.node() == Some(0),
    })
}

/// Whether the helper may be a child of another process than this. A file of the user's own is served by a process that
/// the helper starts and that reads as much as the job asks for: that one belongs into the control group that this
/// process is in, with the job's processors and memory.
fn may_wait_elsewhere(reference: &[u8]) -> bool {
    !reference.starts_with(b"/")
}

/// The way to `berth-runtime standby`, which was given this process's mount namespace and log, the step's kind, and these
/// messages; none where none of this release answers, or it ended just now.
fn waiting_helper(
    settings: &Settings,
    log: Option<&OwnedFd>,
    kind: u64,
    messages: &[Vec<u8>],
) -> Option<OwnedFd> {
    let path = format!(
        "{}/step-{}.sock",
        settings.run_dir,
        env!("CARGO_PKG_VERSION")
    );
    let namespace = sockets::open(c"/proc/self/ns/mnt", libc::O_RDONLY).ok()?;
    let helper = sockets::connect_to_root(path.as_bytes()).ok()?;
    let mut descriptors = vec![namespace.as_raw_fd()];
    descriptors.extend(log.map(|log| log.as_raw_fd()));
    let first = format!("S{kind:016x}");
    sockets::try_send(helper.as_fd(), first.as_bytes(), &descriptors).ok()?;
    tell(&helper, messages).ok()?;
    Some(helper)
}

/// Starts a helper, which finds these messages.
fn new_helper(
    settings: &Settings,
    log: Option<&OwnedFd>,
    messages: &[Vec<u8>],
) -> Result<OwnedFd, Failure> {
    let (ours, theirs) = sockets::pair().map_err(not_started)?;
    // Before it starts, so that it finds them there, however late this process runs again.
    tell(&ours, messages)?;
    let program = Program {
        path: ffi::c_string(settings.runtime.as_bytes())
            .ok_or_else(|| not_started(libc::EINVAL))?,
        arguments: vec![c"step".to_owned()],
        env: helper_environment(&[]),
        fds: [None, None, log.map(OwnedFd::as_fd), Some(theirs.as_fd())],
        detached: true,
        on_failure: (3, exec_failure(settings)),
    };
    program.start().map_err(not_started)?;
    Ok(ours)
}

fn tell(helper: &OwnedFd, messages: &[Vec<u8>]) -> Result<(), Failure> {
    for message in messages {
        match sockets::try_send(helper.as_fd(), message, &[]) {
            Ok(()) => {}
            Err(libc::EAGAIN) => {
                return Err(Failure::new("the mounts are too many for one message"));
            }
            Err(number) => return Err(not_started(number)),
        }
    }
    Ok(())
}

fn not_started(number: i32) -> Failure {
    let reason = errno_text(number);
    Failure::new(format!("the helper was not started: {reason}"))
}

/// What the child says on the socket if it cannot become the helper: the beginning of an `E` message.
fn exec_failure(settings: &Settings) -> Vec<u8> {
    let text = format!(
        "berth: container not started: cannot run '{}' on this node: ",
        settings.runtime
    );
    let mut body = Body::default();
    body.number("code", NOT_STARTED.into())
        .field("text", text.as_bytes());
    body.messages(b'E')
        .and_then(|mut messages| messages.pop())
        .unwrap_or_default()
}

/// The step, and a number that steps of the same kind share: a helper that stayed after one of them may serve this one.
fn describe(spank: Spank, settings: &Settings, wish: &Wish) -> Option<(Body, u64)> {
    let step = spank.step()?;
    let env = |name: &CStr| spank.env(name).ok().flatten().unwrap_or_default();
    let groups: Vec<String> = spank.groups()?.iter().map(u32::to_string).collect();
    let told_conf = ffi::own_env(c"SLURM_CONF").unwrap_or_default();
    let slurm_conf = match told_conf.is_empty() {
        true => SLURM_CONF,
        false => &told_conf[..],
    };
    // A guess: the tasks' own folder is known when they are there. `PWD` is whatever the user's last shell left.
    let cwd = match env(names::STEP_CWD) {
        own if !own.is_empty() => own,
        _ => env(c"SLURM_SUBMIT_DIR"),
    };
    let (script, command) = if step == BATCH_STEP {
        (spank.command()?, Vec::new())
    } else {
        (Vec::new(), spank.command().unwrap_or_default())
    };
    let mut body = Body::default();
    body.field("config", settings.config.as_bytes())
        .field("slurm_conf", &told_conf)
        .number("uid", spank.uid()?)
        .number("gid", spank.gid()?)
        .field("groups", groups.join(",").as_bytes())
        .field("user", &env(c"USER"))
        .field("home", &env(c"HOME"))
        .field("nodename", &node_name())
        .field("cluster", &env(c"SLURM_CLUSTER_NAME"))
        .field("reference", &wish.reference)
        .field("pins", &env(names::JOB_PINS))
        .field("workdir", &wish.workdir)
        .field("writable", if wish.writable { b"1" } else { b"0" })
        .field("cwd", &cwd)
        .field("script", &script);
    for mount in &wish.mounts {
        body.field("mount", mount);
    }
    for prolog in slurmconf::task_scripts(Path::new(OsStr::from_bytes(slurm_conf))) {
        body.field("prolog", &prolog);
    }
    let kind = body.fingerprint();
    body.number("jobid", spank.job()?)
        .number("stepid", step)
        .number("nodeid", spank.node()?)
        .field("end", &env(c"SLURM_JOB_END_TIME"))
        .field("command", &command);
    Some((body, kind))
}

/// The machine's name: Slurm's own name for the node is not in the environment before the task's is made.
fn node_name() -> Vec<u8> {
    std::fs::read("/proc/sys/kernel/hostname")
        .map(|name| name.trim_ascii().to_vec())
        .unwrap_or_default()
}

fn open_log(path: &str) -> Option<OwnedFd> {
    let file = std::fs::OpenOptions::new()
        .append(true)
        .create(true)
        .mode(0o600)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
        .ok()?;
    Some(file.into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::MetadataExt as _;
    use std::os::unix::net::UnixListener;

    #[test]
    fn a_users_own_file_is_served_from_the_steps_control_group() {
        assert!(may_wait_elsewhere(b"docker://ghcr.io/group/app:2.1"));
        assert!(may_wait_elsewhere(b"app"));
        assert!(!may_wait_elsewhere(b"/home/me/my.sqsh"));
    }

    #[test]
    fn one_that_is_not_there_or_does_not_take_the_step_is_done_without() {
        let run_dir = std::env::temp_dir().join(format!("berth-node-{}", std::process::id()));
        std::fs::create_dir_all(&run_dir).unwrap();
        let settings = Settings {
            run_dir: run_dir.to_str().unwrap().into(),
            ..Settings::default()
        };
        let step = [b"Juid=7".to_vec()];
        assert!(waiting_helper(&settings, None, 7, &step).is_none());
        let name = concat!("step-", env!("CARGO_PKG_VERSION"), ".sock");
        let socket = run_dir.join(name);
        let other_kind = UnixListener::bind(&socket).unwrap();
        assert!(waiting_helper(&settings, None, 7, &step).is_none());
        drop(other_kind);
        assert!(waiting_helper(&settings, None, 7, &step).is_none());
        std::fs::remove_file(&socket).unwrap();
        let listener = sockets::listener(socket.to_str().unwrap());
        let root = std::fs::metadata("/proc/self").unwrap().uid() == 0;
        let waits = waiting_helper(&settings, None, 7, &step);
        assert_eq!(waits.is_some(), root, "root's alone is believed");
        // More than it takes: said by the helper of the step's own, if that does not take it either.
        let much = vec![vec![b'j'; crate::wire::MAX_MESSAGE]; 1000];
        assert!(waiting_helper(&settings, None, 7, &much).is_none());
        drop(listener);
        assert!(waiting_helper(&settings, None, 7, &step).is_none());
        std::fs::remove_dir_all(&run_dir).unwrap();
    }
}
