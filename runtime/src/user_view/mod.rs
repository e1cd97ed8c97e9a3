//! An image's view for an ordinary user without Slurm and without root: `berth exec`.
//!
//! The process that was started becomes the user's command, so that exit code, signals and terminal need nobody in
//! between: it starts a server for the image ([`server`]), enters a user and a mount namespace of its own
//! ([`namespace`]), builds the same view as a job's there, lets go of every capability and execs. The view goes with the
//! last process in it, and the server with the view, however they end.

mod job;
mod namespace;
pub(crate) mod server;

use std::convert::Infallible;
use std::ffi::OsString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use berth_config::Config;
use nix::sys::signal::SigSet;
use rustix::fs::CWD;
use rustix::mount::{OpenTreeFlags, open_tree};

use crate::environment;
use crate::mounts;
use crate::refusal::{Refusal, code};
use crate::slurm;
use crate::sys;
use crate::text::plain;
use crate::user::{self, User};
use crate::view::{self, ViewSpec};
use server::{As, Bytes, Server};

pub use job::UserJob;
pub use namespace::Ban;

/// A shell's exit codes for a command that cannot be run.
const NOT_RUNNABLE: u8 = 126;
const NOT_FOUND: u8 = 127;
/// Longest job that is read, in bytes: what an exec could carry.
const LONGEST: u64 = 4 << 20;

/// `berth-runtime user`: becomes the command of the job in descriptor `job`.
pub fn run(job: i32) -> ExitCode {
    let Err(refusal) = start(job);
    let _ = writeln!(io::stderr(), "{}", refusal.text());
    ExitCode::from(refusal.code)
}

fn start(job: i32) -> Result<Infallible, Refusal> {
    // `berth` kept signals for itself while it looked for the image: the command is to hear them.
    let _ = SigSet::empty().thread_set_mask();
    let (job, image) = take(job).map_err(|e| {
        let line = format!("cannot read what is to be run: {}", plain(&e));
        Refusal::new(code::INTERNAL, line).hint("`berth exec` starts this")
    })?;
    let config = match &job.config {
        Some(path) => Config::load(path).map_err(|e| Refusal::new(code::CONFIG, e.to_string()))?,
        None => Config::default(),
    };
    let (spec, environment) = plan(&job, &config)?;
    let mount = match &job.mounted {
        Some(folder) => {
            namespace::enter()?;
            clone_of(folder)?
        }
        None => serve(&job, image.as_ref(), &spec)?,
    };
    drop(image);
    let cwd = view::build_here(&spec, mount)?;
    Err(become_command(&job, &cwd, &environment))
}

/// A mount like the one at `folder`, attached nowhere: it lives on when that one goes.
fn clone_of(folder: &Path) -> Result<OwnedFd, Refusal> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    open_tree(CWD, folder, flags).map_err(|errno| {
        let (folder, why) = (crate::text::shown(folder), plain(&errno.into()));
        let line = format!("cannot use the image at `{folder}`: {why}");
        Refusal::new(code::UNAVAILABLE, line).hint("try again")
    })
}

/// Enters the namespaces and mounts the image there, with a server of its own outside of them.
fn serve(job: &UserJob, image: Option<&OwnedFd>, spec: &ViewSpec) -> Result<OwnedFd, Refusal> {
    let mut options = job.serve.clone();
    options.extend(owner(spec));
    let bytes = Bytes {
        file: image.map(AsFd::as_fd),
        options: &options,
        grant: job.grant.as_deref(),
    };
    let server = Server::start(&bytes, &job.name, As::Itself)?;
    namespace::enter()?;
    Ok(server.mount()?.0)
}

/// The job and the image's file.
fn take(number: i32) -> io::Result<(UserJob, Option<OwnedFd>)> {
    let file = File::from(sys::inherited(number)?);
    let job: UserJob = serde_json::from_reader(file.take(LONGEST))?;
    let image = job.image.map(sys::inherited).transpose()?;
    Ok((job, image))
}

/// What the view is made of, and the variables to set.
fn plan(job: &UserJob, config: &Config) -> Result<(ViewSpec, Vec<String>), Refusal> {
    let usage = |line: String| Refusal::new(code::USAGE, line);
    let node = &config.node;
    let binds = mounts::of_user(&job.mounts, true).map_err(|e| usage(e.to_string()))?;
    if job.writable && node.writable_bytes == 0 {
        return Err(usage("--writable is not allowed on this site".into()));
    }
    let slurm_conf = std::env::var_os("SLURM_CONF").map(PathBuf::from);
    let client = slurm::Client::new(&node.slurm, slurm_conf.as_deref());
    let (slurm, links) = client.parts(&node.run_dir, config.api.munge_socket.as_deref());
    let user = User::own().map_err(|e| Refusal::new(code::INTERNAL, plain(&e)))?;
    let account = user.look_up(&client.users());
    let cwd = std::env::current_dir().unwrap_or_else(|_| PathBuf::from("/"));
    let bin_dir = node.slurm.client.then_some(node.slurm.bin_dir.as_path());
    let environment = environment::of_image(&job.env, bin_dir).ok_or_else(|| {
        let line = format!("the environment of `{}` is too large", job.name);
        Refusal::new(code::OTHER, line)
    })?;
    let spec = ViewSpec {
        binds: mounts::of_view(node, &slurm, &account.home, &cwd, &binds),
        user,
        account,
        links,
        writable_bytes: job.writable.then_some(node.writable_bytes),
        workdir: job.workdir.clone(),
        job_cwd: cwd,
        image_cwd: job.image_cwd.clone(),
    };
    Ok((spec, environment))
}

/// In a writable view everything is the user's own, as nobody else exists in the user namespace.
fn owner(spec: &ViewSpec) -> Option<OsString> {
    let user = &spec.user;
    let owner = || format!("--owner={}:{}", user.uid, user.gid).into();
    spec.writable_bytes.map(|_| owner())
}

/// The last step: no way back to any right.
fn become_command(job: &UserJob, cwd: &Path, environment: &[String]) -> Refusal {
    let broken = |e: io::Error| Refusal::new(code::INTERNAL, plain(&e));
    let Some((program, arguments)) = job.command.split_first() else {
        return Refusal::new(code::USAGE, "no command was given");
    };
    if let Err(e) = rustix::process::chdir(cwd) {
        return broken(e.into());
    }
    if let Err(e) = user::drop_privileges() {
        return broken(e);
    }
    let mut command = Command::new(program);
    command.args(arguments).env("PWD", cwd);
    for variable in environment {
        if let Some((name, value)) = variable.split_once('=') {
            command.env(name, value);
        }
    }
    let error = command.exec();
    let shown = crate::text::shown(Path::new(program));
    let line = format!("cannot run `{shown}` in `{}`: {}", job.name, plain(&error));
    let code = match error.kind() {
        io::ErrorKind::NotFound => NOT_FOUND,
        _ => NOT_RUNNABLE,
    };
    Refusal::new(code, line)
}
