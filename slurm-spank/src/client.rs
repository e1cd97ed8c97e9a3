//! sbatch, salloc and srun: forget inherited names, read the command line, ask the daemon, pass the answer on.
//!
//! Invariant: a client never waits longer than [`LIMIT`], and never lets a job through that was definitely refused.
//! Whatever goes wrong here otherwise costs a warning: the node decides.
//!
//! sbatch and salloc wait for the daemon's answer before they submit. srun asks before it submits and fetches the answer
//! just before it launches its tasks, so that the asking costs no time where nodes are free.
#![allow(unsafe_code, reason = "pipes, kill and waitpid")]

use crate::ffi::{self, Context, Spank, errno_text};
use crate::names;
use crate::options;
use crate::plan::{self, Asked, ClientPlan};
use crate::settings::Settings;
use crate::sockets;
use crate::spawn::Program;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// How long a submission may take longer because of us.
const LIMIT: Duration = Duration::from_secs(2);
/// Bytes taken of each of the helper's two outputs.
const MAX_OUTPUT: usize = 16 * 1024;
const USAGE: u8 = 2;
/// Exit codes of the helper that end the submission: malformed, bad data, not permitted.
const REFUSALS: [u8; 3] = [USAGE, 65, 77];

/// What an earlier call of `init_post_opt` in this process found: Slurm calls it once per component of a
/// heterogeneous job or step.
#[derive(Debug, Clone, Copy)]
struct Earlier {
    calls: u32,
    contained: bool,
}

static EARLIER: Mutex<Earlier> = Mutex::new(Earlier {
    calls: 0,
    contained: false,
});

/// What srun asked for and has not fetched yet.
static PENDING: Mutex<Option<Asking>> = Mutex::new(None);

/// Before the command line is read.
pub fn init(spank: Spank, settings: &Settings, context: Context) {
    // A step inside a container job would otherwise take the batch step's image for its own --container.
    for name in names::STEP {
        ffi::unset_own_env(name);
    }
    ffi::unset_own_env(names::TASK);
    if is_new_job(context) {
        for name in names::JOB {
            ffi::unset_own_env(name);
        }
    }
    if inside_job() {
        options::forget_inherited();
    }
    options::register(spank, settings);
}

/// After the command line was read.
pub fn init_post_opt(settings: &Settings, context: Context) {
    let given = options::given();
    let asked = Asked {
        // Empty is an empty --container, most likely from an unset variable in a script: refused below.
        container: ffi::own_env(names::CONTAINER),
        image: given.image,
        mounts: given.mounts,
        workdir: given.workdir,
        writable: given.writable,
        new_job: is_new_job(context),
        starts_step: context == Context::Local,
        job_image: ffi::own_env(names::JOB_IMAGE).filter(|value| !value.is_empty()),
        cwd: std::env::current_dir()
            .ok()
            .map(|path| path.into_os_string().into_encoded_bytes()),
    };
    let plan = match plan::client(&asked) {
        Ok(plan) => plan,
        Err(refusal) => refuse(USAGE, refusal.0.as_bytes()),
    };
    refuse_heterogeneous(plan.contained);
    if plan.contained {
        for unknown in &settings.unknown {
            warn(format!("plugstack.conf: '{unknown}' is not understood").as_bytes());
        }
    }
    carry_out(settings, &plan, context);
}

/// srun, when nodes and step are there and nothing is launched yet: fetch what `init_post_opt` asked for.
pub fn local_user_init() {
    let asking = PENDING
        .lock()
        .unwrap_or_else(PoisonError::into_inner)
        .take();
    if let Some(asking) = asking {
        pass_on(asking.finish());
    }
}

/// srun outside of a job makes one; inside it makes a step.
fn is_new_job(context: Context) -> bool {
    context == Context::Allocator || !inside_job()
}

fn inside_job() -> bool {
    ffi::own_env(c"SLURM_JOB_ID").is_some()
}

/// Slurm gives every component the first one's container: wrong, so not done.
fn refuse_heterogeneous(contained: bool) {
    let mut earlier = EARLIER.lock().unwrap_or_else(PoisonError::into_inner);
    if earlier.calls > 0 && (contained || earlier.contained) {
        refuse(USAGE, b"heterogeneous jobs and steps cannot run in containers: start the components as steps of their own");
    }
    earlier.calls += 1;
    earlier.contained |= contained;
}

fn carry_out(settings: &Settings, plan: &ClientPlan, context: Context) {
    for (name, value) in &plan.set {
        set(name, value);
    }
    let Some(reference) = &plan.ask else { return };
    match Asking::start(settings, reference, context == Context::Local) {
        Ok(asking) if context == Context::Local => {
            *PENDING.lock().unwrap_or_else(PoisonError::into_inner) = Some(asking);
        }
        Ok(asking) => pass_on(asking.finish()),
        Err(trouble) => pass_on(Err(trouble)),
    }
}

/// Lets the job know the pins, or ends the submission that was refused.
fn pass_on(answer: Result<Pins, Trouble>) {
    match answer {
        Ok(pins) => {
            let mut list = ffi::own_env(names::JOB_PINS).unwrap_or_default();
            for (name, digest) in &pins {
                list = plan::add_pin(&list, name, digest);
            }
            if !pins.is_empty() {
                set(names::JOB_PINS, &list);
            }
        }
        Err(Trouble::Refused { code, text }) => refuse(code, &text),
        Err(Trouble::Unsure(text)) if text.is_empty() => {}
        Err(Trouble::Unsure(text)) => warn(&text),
    }
}

/// Why there is no pin.
#[derive(Debug, PartialEq, Eq)]
enum Trouble {
    /// The image cannot be had: the submission ends.
    Refused { code: u8, text: Vec<u8> },
    /// Nobody could tell: the job goes on.
    Unsure(Vec<u8>),
}

type Pins = Vec<(Vec<u8>, Vec<u8>)>;

fn trouble(what: &str) -> Trouble {
    Trouble::Unsure(format!("the image service was not asked: {what}").into_bytes())
}

/// A running `berth-runtime submit`.
#[derive(Debug)]
struct Asking {
    pid: libc::pid_t,
    out: OwnedFd,
    err: OwnedFd,
    /// Where the helper hears that its answer was fetched. One that was refused and hears nothing for a while ends srun,
    /// which would else wait for nodes for a job that cannot be.
    fetched: Option<OwnedFd>,
    deadline: Instant,
}

impl Asking {
    /// Starts the helper. With `later` set the answer is fetched only when there are nodes.
    fn start(settings: &Settings, reference: &[u8], later: bool) -> Result<Self, Trouble> {
        let deadline = Instant::now() + LIMIT;
        let (out, out_end) = pipe().ok_or_else(|| trouble("no pipe"))?;
        let (err, err_end) = pipe().ok_or_else(|| trouble("no pipe"))?;
        let (fetched_end, fetched) = sockets::pair().map_err(|n| trouble(errno_text(n)))?;
        let own_pid = std::process::id().to_string();
        let mut words = vec![
            b"submit".as_slice(),
            b"--config",
            settings.config.as_bytes(),
        ];
        if later {
            words.extend([b"--for".as_slice(), own_pid.as_bytes()]);
        }
        words.push(reference);
        let stderr = std::io::stderr();
        let program = Program {
            path: ffi::c_string(settings.runtime.as_bytes()).ok_or_else(|| trouble("bad path"))?,
            arguments: words
                .iter()
                .filter_map(|word| ffi::c_string(word))
                .collect(),
            env: helper_environment(&[c"HOME", c"USER", c"SLURM_CONF", c"XDG_RUNTIME_DIR"]),
            fds: [
                later.then(|| fetched_end.as_fd()),
                Some(out_end.as_fd()),
                Some(err_end.as_fd()),
                later.then(|| stderr.as_fd()),
            ],
            detached: false,
            on_failure: (
                2,
                format!("cannot run '{}': ", settings.runtime).into_bytes(),
            ),
        };
        let pid = program
            .start()
            .map_err(|number| trouble(errno_text(number)))?;
        Ok(Self {
            pid,
            out,
            err,
            fetched: later.then_some(fetched),
            deadline,
        })
    }

    /// Reads the answer, which is there already if the time is over.
    fn finish(self) -> Result<Pins, Trouble> {
        let finished = read_both(&self.out, &self.err, self.deadline);
        if let Some(fetched) = &self.fetched {
            // A helper that had nothing to wait for has gone already.
            let _ = sockets::try_send(fetched.as_fd(), b"k", &[]);
        }
        let status = reap(self.pid, finished.is_some());
        let Some((out, err)) = finished else {
            return Err(trouble(
                "no answer within 2 s; the job is submitted all the same",
            ));
        };
        judge(status, &out, &err)
    }
}

/// What the helper's end and words mean.
fn judge(status: Option<u8>, out: &[u8], err: &[u8]) -> Result<Pins, Trouble> {
    match status {
        Some(0) => Ok(pins(out)),
        Some(code) if REFUSALS.contains(&code) => Err(Trouble::Refused {
            code,
            text: err.to_vec(),
        }),
        Some(69) => Err(Trouble::Unsure(first_line(err).to_vec())),
        _ if err.is_empty() => Err(Trouble::Unsure(
            b"the image service was not asked: the helper failed".to_vec(),
        )),
        _ => Err(Trouble::Unsure(first_line(err).to_vec())),
    }
}

fn first_line(text: &[u8]) -> &[u8] {
    text.split(|byte| *byte == b'\n').next().unwrap_or_default()
}

/// `pin REFERENCE DIGEST` lines; what could not be one entry of the list is left out.
fn pins(text: &[u8]) -> Pins {
    let mut pins = Vec::new();
    for line in text.split(|byte| *byte == b'\n') {
        let mut words = line.split(|byte| *byte == b' ');
        if let (Some(b"pin"), Some(reference), Some(digest), None) =
            (words.next(), words.next(), words.next(), words.next())
            && plan::check_reference(reference).is_ok()
            && digest.starts_with(b"sha256:")
            && digest
                .iter()
                .all(|byte| byte.is_ascii_alphanumeric() || *byte == b':')
        {
            pins.push((reference.to_vec(), digest.to_vec()));
        }
    }
    pins
}

/// A fixed environment and those of this process's variables that are named.
pub fn helper_environment(kept: &[&CStr]) -> Vec<CString> {
    let mut env = vec![
        c"PATH=/usr/bin:/bin:/usr/sbin:/sbin".to_owned(),
        c"LANG=C".to_owned(),
    ];
    for name in kept {
        if let Some(value) = ffi::own_env(name)
            && let Some(pair) = ffi::c_string(&[name.to_bytes(), b"=", &value].concat())
        {
            env.push(pair);
        }
    }
    env
}

fn pipe() -> Option<(OwnedFd, OwnedFd)> {
    let mut ends = [-1; 2];
    // SAFETY: room for two descriptors.
    if unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_CLOEXEC | libc::O_NONBLOCK) } != 0 {
        return None;
    }
    let [read, write] = ends;
    // SAFETY: fresh and ours. The helper's end must block as programs expect.
    unsafe {
        libc::fcntl(write, libc::F_SETFL, 0);
        Some((OwnedFd::from_raw_fd(read), OwnedFd::from_raw_fd(write)))
    }
}

/// Reads both outputs to their ends; `None` when the deadline came first.
fn read_both(out: &OwnedFd, err: &OwnedFd, deadline: Instant) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut texts = [Vec::new(), Vec::new()];
    let mut polled = [out, err].map(|fd| libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    });
    while polled.iter().any(|fd| fd.fd >= 0) {
        sockets::wait_any(&mut polled, deadline).ok()?;
        for (fd, text) in polled.iter_mut().zip(&mut texts) {
            if fd.fd >= 0 && fd.revents != 0 && read_some(fd.fd, text) {
                // poll leaves negative descriptors alone.
                fd.fd = -1;
            }
        }
    }
    let [out, err] = texts;
    Some((out, err))
}

/// True at the end of the stream. What is past the bound is read and forgotten, so that the writer is not stuck.
fn read_some(fd: i32, text: &mut Vec<u8>) -> bool {
    let mut buffer = [0u8; 4096];
    // SAFETY: the buffer's own pointer and length.
    let count = unsafe { libc::read(fd, buffer.as_mut_ptr().cast(), buffer.len()) };
    match usize::try_from(count) {
        Ok(0) => true,
        Ok(count) => {
            let room = MAX_OUTPUT.saturating_sub(text.len());
            text.extend_from_slice(buffer.get(..count.min(room)).unwrap_or_default());
            false
        }
        Err(_) => !matches!(ffi::errno(), libc::EINTR | libc::EAGAIN),
    }
}

/// How long a helper that said all it has to say may take to end.
const ENDING: Duration = Duration::from_millis(500);

/// The exit code, if it can be had; a helper that is late, or that stays after its last word, is killed and not waited
/// for.
fn reap(pid: libc::pid_t, finished: bool) -> Option<u8> {
    if !finished || !ends_soon(pid) {
        // SAFETY: our own child, not waited for yet: the number is still its own.
        unsafe { libc::kill(pid, libc::SIGKILL) };
    }
    let mut status = 0;
    // SAFETY: our own child; a client that ignores SIGCHLD answers ECHILD.
    let reaped = unsafe { libc::waitpid(pid, &raw mut status, libc::WNOHANG) };
    (finished && reaped == pid && libc::WIFEXITED(status))
        .then(|| u8::try_from(libc::WEXITSTATUS(status)).unwrap_or(255))
}

/// Waits for the child's end, for at most [`ENDING`].
fn ends_soon(pid: libc::pid_t) -> bool {
    const NO_FLAGS: libc::c_uint = 0;
    // SAFETY: numbers only; the child is not waited for yet.
    let number = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, NO_FLAGS) };
    let Ok(number @ 0..) = i32::try_from(number) else {
        // The process is gone altogether, or the kernel older than any that runs containers.
        return true;
    };
    // SAFETY: fresh and ours.
    let process = unsafe { OwnedFd::from_raw_fd(number) };
    sockets::wait(process.as_fd(), libc::POLLIN, Instant::now() + ENDING).is_ok()
}

fn set(name: &CStr, value: &[u8]) {
    if let Some(value) = ffi::c_string(value) {
        ffi::set_own_env(name, &value);
    }
}

/// Ends the client: plugstack's `optional` would turn a returned error into a submission.
fn refuse(code: u8, text: &[u8]) -> ! {
    say(b"", text);
    ffi::exit_now(code)
}

fn warn(text: &[u8]) {
    say(b"warning: ", text);
}

/// `berth: …`, once, whether the helper wrote it already or not.
fn say(kind: &[u8], text: &[u8]) {
    let text = text.trim_ascii_end();
    let text = text.strip_prefix(b"berth: ").unwrap_or(text);
    ffi::write_stderr(&[b"berth: ", kind, text, b"\n"].concat());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_helper_that_stays_after_its_last_word_is_not_waited_for() {
        let stays = "exec >&- 2>&-; while :; do :; done";
        let mut child = std::process::Command::new("/bin/sh")
            .args(["-c", stays])
            .spawn()
            .unwrap();
        assert_eq!(reap(child.id() as libc::pid_t, true), None);
        // Killed: this returns, or the test hangs.
        let _ = child.wait();
        let mut done = std::process::Command::new("/bin/sh")
            .args(["-c", "exit 65"])
            .spawn()
            .unwrap();
        assert_eq!(reap(done.id() as libc::pid_t, true), Some(65));
        assert!(done.wait().is_err(), "it is reaped");
    }

    #[test]
    fn answers_are_judged() {
        let pin = b"pin docker://a/b:1 sha256:12\nnoise\npin x,y sha256:1\npin z md5:1\n";
        assert_eq!(
            judge(Some(0), pin, b"").unwrap(),
            vec![(b"docker://a/b:1".to_vec(), b"sha256:12".to_vec())]
        );
        assert_eq!(
            judge(Some(77), b"", b"berth: denied"),
            Err(Trouble::Refused {
                code: 77,
                text: b"berth: denied".to_vec()
            })
        );
        assert_eq!(judge(Some(69), b"", b""), Err(Trouble::Unsure(Vec::new())));
        assert_eq!(
            judge(Some(1), b"", b"one\ntwo"),
            Err(Trouble::Unsure(b"one".to_vec()))
        );
        assert!(matches!(judge(None, b"", b""), Err(Trouble::Unsure(text)) if !text.is_empty()));
    }
}
