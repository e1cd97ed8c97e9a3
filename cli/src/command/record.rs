//! `berth trace IMAGE -- COMMAND`: records what a start reads, and gives it to the daemon.
//!
//! The command runs as `berth exec` runs it, on a mount of its own that nothing was read from before; this program waits
//! for it. The mount's server notes what is read and writes it down when the mount has gone, with the command's last
//! process.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::time::{Duration, Instant};

use berth_image::Record;
use berth_image::trace::Trace;
use berth_runtime::user_view::UserJob;

use crate::args::ViewArgs;
use crate::command::image_file::{self, Bytes, ImageFile};
use crate::command::{exec, trace};
use crate::context::Context;
use crate::error::{Failure, OTHER, USAGE};
use crate::interrupt;

/// How long the last process may take to go, and the server to write down what was read.
const WRITING: Duration = Duration::from_secs(10);

pub fn record(
    context: &Context,
    image: &str,
    command: Vec<OsString>,
    view: ViewArgs,
) -> Result<(), Failure> {
    interrupt::watch_all()?;
    let image = image_file::open_image(context, image, None)?;
    let Some(record) = image.record.clone() else {
        let message = format!("`{}` is a file that nodes do not fetch", image.name);
        return Err(Failure::new(USAGE, message).hint("give a reference or a digest"));
    };
    let client = context.client()?;
    // The daemon is there, before the command's work is done for nothing.
    client.image(&record.manifest)?;
    let folder = Folder::new()?;
    let file = folder.0.join("trace.json");
    let mut job = exec::job(context, &image, command, view);
    if matches!(image.bytes, Bytes::File { .. }) {
        job.serve.extend(image_file::sealed_as(&record));
    }
    let mut option = OsString::from("--record=");
    option.push(&file);
    job.serve.push(option);
    let ended = run(&image, &job)?;
    let sent = written(&file, &record).and_then(|recorded| {
        trace::keep(&client, &record.manifest, &record, &recorded)?;
        context.say(&format!("berth: {}", trace::kept(&recorded)));
        Ok(())
    });
    drop(folder);
    match (code(ended), sent) {
        (0, sent) => sent,
        (code, sent) => {
            let _ = sent.map_err(|failure| failure.report());
            Err(Failure::silent(code))
        }
    }
}

/// Runs the command to its end.
fn run(image: &ImageFile, job: &UserJob) -> Result<ExitStatus, Failure> {
    interrupt::hand_over();
    let (mut command, _job) = exec::becoming(image, job)?;
    let mut child = command.spawn().map_err(|e| exec::not_run(&e))?;
    interrupt::handed_to(&child);
    let ended = child.wait();
    interrupt::ended();
    ended.map_err(|e| Failure::new(OTHER, format!("cannot wait for the command: {e}")))
}

/// As a shell has it.
fn code(ended: ExitStatus) -> u8 {
    let code = ended.code().or(ended.signal().map(|signal| 128 + signal));
    code.and_then(|code| u8::try_from(code).ok())
        .unwrap_or(OTHER)
}

/// What the server writes when the mount is gone.
fn written(file: &Path, record: &Record) -> Result<Trace, Failure> {
    let none = |why: String| Failure::new(OTHER, format!("no trace was recorded: {why}"));
    let end = Instant::now() + WRITING;
    let text = loop {
        match std::fs::read(file) {
            Ok(text) => break text,
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(none(error.to_string()));
            }
            Err(_) if Instant::now() > end => {
                let why = "the image is still in use".to_owned();
                return Err(none(why)
                    .hint("a process that the command left behind? The command must end with all that it started"));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    trace::read(record, &text).map_err(none)
}

/// A folder of this run's alone, gone with it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Self, Failure> {
        let folder = nix::unistd::mkdtemp(&std::env::temp_dir().join("berth-XXXXXX"));
        folder
            .map(Self)
            .map_err(|e| Failure::new(OTHER, format!("cannot make a temporary folder: {e}")))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
