//! `berth exec`: a command in an image, as whoever asks, without root.
//!
//! This program finds the image and its file and then becomes `berth-runtime user`, which becomes the command.

use std::ffi::{CString, OsString};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use berth_runtime::user_view::UserJob;
use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::memfd::{MFdFlags, memfd_create};

use crate::args::{ExecArgs, ViewArgs};
use crate::command::image_file::{self, Bytes, ImageFile};
use crate::command::path;
use crate::context::Context;
use crate::error::{Failure, OTHER};
use crate::programs;

/// How long the node service may take to mount an image that nobody here uses yet.
const PATIENCE: Duration = Duration::from_secs(5);

pub fn exec(context: &Context, args: ExecArgs) -> Result<(), Failure> {
    let image = image_file::open_image(context, &args.image, args.platform.platform)?;
    let mut job = job(context, &image, args.command, args.view);
    if !job.writable {
        job.mounted = mounted_here(context, &image);
    }
    let (mut command, _job) = becoming(&image, &job)?;
    Err(not_run(&command.exec()))
}

/// The program that becomes the job's command, and the job, which it inherits.
pub fn becoming(image: &ImageFile, job: &UserJob) -> Result<(Command, OwnedFd), Failure> {
    let job_file = inherited_file(job)?;
    if let Bytes::File { file, .. } = &image.bytes {
        inherit(file)?;
    }
    let mut command = Command::new(programs::find("berth-runtime")?);
    let number = job_file.as_raw_fd().to_string();
    command.args(["user", "--job", &number]);
    Ok((command, job_file))
}

pub fn not_run(error: &std::io::Error) -> Failure {
    Failure::new(OTHER, format!("cannot run `berth-runtime`: {error}"))
}

/// The folder where this machine's node service shows the image to this user: what jobs read from it is in memory.
/// Without one the image is served by a process of the user's own, and so it is where everything in a writable view is
/// to belong to the user.
fn mounted_here(context: &Context, image: &ImageFile) -> Option<PathBuf> {
    let record = image.record.as_ref()?;
    path::folder(context, record, PATIENCE).ok()
}

/// What is to be run, by a server of the user's own.
pub fn job(
    context: &Context,
    image: &ImageFile,
    command: Vec<OsString>,
    view: ViewArgs,
) -> UserJob {
    let run = image.record.as_ref().map(|record| &record.run);
    let exists = context.config_path.exists();
    let (file, serve, grant) = match &image.bytes {
        Bytes::File { file, .. } => (Some(file.as_raw_fd()), Vec::new(), None),
        Bytes::Daemon { options, grant } => (None, options.clone(), Some(grant.clone())),
    };
    UserJob {
        config: exists.then(|| absolute(&context.config_path)),
        name: image.name.clone(),
        image: file,
        serve,
        grant,
        mounted: None,
        env: run.map(|run| run.env.clone()).unwrap_or_default(),
        image_cwd: run.and_then(|run| run.working_dir.as_ref().map(Into::into)),
        mounts: view.mounts,
        workdir: view.workdir,
        writable: view.writable,
        command,
    }
}

fn absolute(path: &Path) -> PathBuf {
    std::path::absolute(path).unwrap_or_else(|_| path.to_owned())
}

/// The job in a file without a name, which the next program inherits.
fn inherited_file(job: &UserJob) -> Result<OwnedFd, Failure> {
    let failed =
        |e: std::io::Error| Failure::new(OTHER, format!("cannot hand the command over: {e}"));
    let name = CString::default();
    let fd = memfd_create(name.as_c_str(), MFdFlags::empty()).map_err(|e| failed(e.into()))?;
    let mut file = std::fs::File::from(fd);
    let text = serde_json::to_vec(job).map_err(|e| failed(e.into()))?;
    file.write_all(&text).map_err(failed)?;
    std::io::Seek::rewind(&mut file).map_err(failed)?;
    Ok(file.into())
}

fn inherit(file: &OwnedFd) -> Result<(), Failure> {
    fcntl(file, FcntlArg::F_SETFD(FdFlag::empty()))
        .map(drop)
        .map_err(|e| Failure::new(OTHER, format!("cannot hand the image over: {e}")))
}
