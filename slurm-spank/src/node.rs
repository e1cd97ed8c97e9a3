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
use std::os::fd::{AsFd as _, OwnedFd};
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

/// Starts the helper and tells it the step, without waiting for anything.
fn start(spank: Spank, settings: &Settings, wish: &Wish) -> Result<Link, Failure> {
    let body = describe(spank, settings, wish)
        .ok_or_else(|| Failure::new("Slurm did not say who runs what"))?;
    let messages = body
        .messages(b'J')
        .ok_or_else(|| Failure::new("the mounts are too many"))?;
    let failed = |number| {
        Failure::new(format!(
            "the helper was not started: {}",
            errno_text(number)
        ))
    };
    let (ours, theirs) = sockets::pair().map_err(failed)?;
    // Before the helper starts, so that it finds them there, however late this process runs again.
    for message in &messages {
        match sockets::try_send(ours.as_fd(), message, &[]) {
            Ok(()) => {}
            Err(libc::EAGAIN) => {
                return Err(Failure::new("the mounts are too many for one message"));
            }
            Err(number) => return Err(failed(number)),
        }
    }
    let log = settings.log.as_deref().and_then(open_log);
    let program = Program {
        path: ffi::c_string(settings.runtime.as_bytes()).ok_or_else(|| failed(libc::EINVAL))?,
        arguments: vec![c"step".to_owned()],
        env: helper_environment(&[c"SLURM_CONF"]),
        fds: [
            None,
            None,
            log.as_ref().map(OwnedFd::as_fd),
            Some(theirs.as_fd()),
        ],
        detached: true,
        on_failure: (3, exec_failure(settings)),
    };
    program.start().map_err(failed)?;
    Ok(Link {
        helper: ours,
        wait: settings.wait,
        first_node: spank.node() == Some(0),
    })
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

fn describe(spank: Spank, settings: &Settings, wish: &Wish) -> Option<Body> {
    let step = spank.step()?;
    let env = |name: &CStr| spank.env(name).ok().flatten().unwrap_or_default();
    let groups: Vec<String> = spank.groups()?.iter().map(u32::to_string).collect();
    let slurm_conf = ffi::own_env(c"SLURM_CONF").unwrap_or_else(|| SLURM_CONF.to_vec());
    let (script, command) = if step == BATCH_STEP {
        (spank.command()?, Vec::new())
    } else {
        (Vec::new(), spank.command().unwrap_or_default())
    };
    let mut body = Body::default();
    body.field("config", settings.config.as_bytes())
        .number("uid", spank.uid()?)
        .number("gid", spank.gid()?)
        .field("groups", groups.join(",").as_bytes())
        .field("user", &env(c"USER"))
        .field("home", &env(c"HOME"))
        .number("jobid", spank.job()?)
        .number("stepid", step)
        .number("nodeid", spank.node()?)
        .field("nodename", &node_name())
        .field("cluster", &env(c"SLURM_CLUSTER_NAME"))
        .field("reference", &wish.reference)
        .field("pins", &env(names::JOB_PINS))
        .field("workdir", &wish.workdir)
        .field("writable", if wish.writable { b"1" } else { b"0" })
        .field("cwd", &env(c"PWD"))
        .field("script", &script)
        .field("command", &command);
    for mount in &wish.mounts {
        body.field("mount", mount);
    }
    for prolog in slurmconf::task_scripts(Path::new(OsStr::from_bytes(&slurm_conf))) {
        body.field("prolog", &prolog);
    }
    Some(body)
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
