//! One `berth-convert` process: started with nothing but its descriptors, listened to, killed when nobody wants its
//! work any more.
//!
//! The process parses what strangers wrote and may be in their hands: what it says is bounded and escaped, and
//! nothing it says is believed that can be checked.

#![allow(
    unsafe_code,
    reason = "descriptors are handed down by pre_exec, which std marks unsafe"
)]

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd, RawFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use berth_convert::job::{Done, Event, Failure, Job, LayerJob, Options, Progress};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Signal, set_parent_process_death_signal};

use super::manifest::Layer;

/// Longest line that a converter may say. A result with many notes is below 100 KiB.
const MAX_LINE: usize = 1 << 20;
/// Most reports of progress that it may give at once, and for each second that it has run: it gives ten.
const MAX_PROGRESS: (u64, u64) = (100, 20);
/// Most warnings that it may give: it has one for each thing that the kernel lacks.
const MAX_WARNINGS: usize = 100;
/// Most of its standard error that goes to the log.
const MAX_STDERR: usize = 4096;

/// How a conversion ended.
#[derive(Debug)]
pub(super) enum Outcome {
    Done(Box<Done>),
    Failed(Failure),
    /// The client went away.
    Abandoned,
    /// It ended without a result, or with a line that is none.
    Died(String),
}

/// Where the program lies.
pub(super) fn program(configured: Option<&Path>) -> PathBuf {
    const NAME: &str = "berth-convert";
    if let Some(path) = configured {
        return path.to_owned();
    }
    let beside = std::env::current_exe()
        .ok()
        .map(|exe| exe.with_file_name(NAME));
    (beside.filter(|path| path.exists()))
        .unwrap_or_else(|| Path::new("/usr/libexec/berth").join(NAME))
}

/// Everything a conversion gets.
#[derive(Debug)]
pub(super) struct Input<'a> {
    pub(super) output: &'a File,
    pub(super) spill: File,
    pub(super) pipes: Vec<OwnedFd>,
    pub(super) layers: &'a [Layer],
    pub(super) options: Options,
}

/// Runs a conversion to its end. `client` is watched: when it closes, the process is killed. `progress` returns
/// whether the client still listens.
///
/// # Errors
/// When the process cannot be started.
pub(super) fn run(
    program: &Path,
    input: Input<'_>,
    client: &impl std::os::fd::AsFd,
    mut progress: impl FnMut(Progress) -> bool,
) -> io::Result<Outcome> {
    let job = job(&input);
    let mut child = start(program, &input)?;
    // The process has copies; ours would keep a pipe open that the daemon closed.
    drop(input);
    let outcome = converse(&mut child, &job, client, &mut progress);
    // Already over, or to be over now.
    let _ = child.kill();
    let status = child.wait()?;
    log_stderr(&mut child);
    Ok(match outcome {
        Ok(Outcome::Done(done)) if status.success() => Outcome::Done(done),
        Ok(Outcome::Done(_)) => Outcome::Died(format!("it ended with {status}")),
        Ok(Outcome::Died(why)) => Outcome::Died(format!("{why} ({status})")),
        Ok(other) => other,
        Err(e) => Outcome::Died(e.to_string()),
    })
}

fn job(input: &Input<'_>) -> Job {
    Job {
        output_fd: input.output.as_raw_fd(),
        spill_fd: input.spill.as_raw_fd(),
        layers: (input.layers.iter().zip(&input.pipes))
            .map(|(layer, pipe)| LayerJob {
                fd: pipe.as_raw_fd(),
                digest: layer.digest,
                diff_id: layer.diff_id,
            })
            .collect(),
        options: input.options.clone(),
    }
}

fn start(program: &Path, input: &Input<'_>) -> io::Result<Child> {
    let mut keep: Vec<RawFd> = vec![input.output.as_raw_fd(), input.spill.as_raw_fd()];
    keep.extend(input.pipes.iter().map(|pipe| pipe.as_raw_fd()));
    let mut command = Command::new(program);
    command
        .env_clear()
        .current_dir("/")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // SAFETY: between fork and exec only async-signal-safe system calls run: fcntl and prctl, on numbers that stay
    // open in the parent until `input` is dropped.
    unsafe {
        command.pre_exec(move || {
            set_parent_process_death_signal(Some(Signal::KILL))?;
            for &fd in &keep {
                fcntl_setfd(rustix::fd::BorrowedFd::borrow_raw(fd), FdFlags::empty())?;
            }
            Ok(())
        });
    }
    command.spawn()
}

fn converse(
    child: &mut Child,
    job: &Job,
    client: &impl std::os::fd::AsFd,
    progress: &mut dyn FnMut(Progress) -> bool,
) -> io::Result<Outcome> {
    if let Some(stderr) = &child.stderr {
        // Nobody reads it before the end: a process that says too much loses the rest, instead of waiting for ever.
        rustix::io::ioctl_fionbio(stderr, true)?;
    }
    let Some(mut stdin) = child.stdin.take() else {
        return Err(io::ErrorKind::BrokenPipe.into());
    };
    stdin.write_all(&serde_json::to_vec(job)?)?;
    drop(stdin);
    let Some(stdout) = &mut child.stdout else {
        return Err(io::ErrorKind::BrokenPipe.into());
    };
    let mut buffer = Vec::new();
    let mut result = None;
    let (mut warnings, mut reports) = (0, 0);
    let begun = Instant::now();
    loop {
        let hangup = PollFlags::RDHUP | PollFlags::IN;
        let mut ready = [
            PollFd::from_borrowed_fd(stdout.as_fd(), PollFlags::IN),
            PollFd::from_borrowed_fd(client.as_fd(), hangup),
        ];
        match poll(&mut ready, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => continue,
            Err(e) => return Err(e.into()),
        }
        let (says, gone) = (
            !ready[0].revents().is_empty(),
            !ready[1].revents().is_empty(),
        );
        if gone {
            // A client says nothing after its request: whatever it is, it is over.
            return Ok(Outcome::Abandoned);
        }
        if !says {
            continue;
        }
        let mut piece = [0; 16 << 10];
        let n = stdout.read(&mut piece)?;
        if n == 0 {
            // Only now: until it has ended it could still write to the image.
            let missing = || Outcome::Died("it ended without a result".into());
            return Ok(result.map_or_else(missing, Outcome::Done));
        }
        if result.is_some() {
            return Ok(Outcome::Died("it spoke after its result".into()));
        }
        buffer.extend_from_slice(&piece[..n]);
        while let Some(end) = buffer.iter().position(|b| *b == b'\n') {
            let line: Vec<u8> = buffer.drain(..=end).collect();
            match serde_json::from_slice(&line) {
                Ok(Event::Progress(news)) => {
                    reports += 1;
                    if reports > MAX_PROGRESS.0 + MAX_PROGRESS.1 * begun.elapsed().as_secs() {
                        return Ok(Outcome::Died("it reports progress too often".into()));
                    }
                    if !progress(news) {
                        return Ok(Outcome::Abandoned);
                    }
                }
                Ok(Event::Warning(_)) if warnings == MAX_WARNINGS => {
                    return Ok(Outcome::Died("it warned too often".into()));
                }
                Ok(Event::Warning(text)) => {
                    warnings += 1;
                    tracing::warn!(text = %clean(&text), "the converter warns");
                }
                Ok(Event::Done(done)) => result = Some(Box::new(done)),
                Ok(Event::Error(failure)) => return Ok(Outcome::Failed(escape(failure))),
                Err(e) => return Ok(Outcome::Died(format!("it said what is no event: {e}"))),
            }
        }
        if buffer.len() > MAX_LINE {
            return Ok(Outcome::Died("it said too long a line".into()));
        }
    }
}

fn escape(failure: Failure) -> Failure {
    Failure {
        entry: failure.entry.as_deref().map(clean),
        message: clean(&failure.message),
        ..failure
    }
}

/// A line for people out of what a converter said.
pub(super) fn clean(text: &str) -> String {
    let visible = text.chars().map(|c| if c.is_control() { '?' } else { c });
    visible.take(1000).collect()
}

fn log_stderr(child: &mut Child) {
    let Some(stderr) = &mut child.stderr else {
        return;
    };
    let mut text = vec![0; MAX_STDERR];
    // The process is gone: what it said is in the pipe, or nothing is.
    let n = stderr.read(&mut text).unwrap_or(0);
    if n > 0 {
        let text = String::from_utf8_lossy(&text[..n]);
        tracing::warn!(text = %clean(&text), "the converter wrote to its standard error");
    }
}
