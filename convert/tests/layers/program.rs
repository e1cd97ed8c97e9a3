//! The program `berth-convert` as the sealer starts it, fed from memory or by a generator, and measured.

#![allow(
    unsafe_code,
    reason = "descriptors and limits are handed down by pre_exec, and wait4 has no safe form"
)]

use std::io::{BufRead as _, BufReader, Write};
use std::os::fd::AsRawFd as _;
use std::os::unix::process::{CommandExt as _, ExitStatusExt as _};
use std::process::{Child, Command, ExitStatus, Stdio};

use berth_convert::job::{Event, Job, LayerJob, Options};
use berth_image::Digest;

/// Where a layer's bytes come from; called on a thread of its own. It may be told to stop by an error.
pub type Feed = Box<dyn FnOnce(&mut dyn Write) -> std::io::Result<()> + Send>;

/// A layer and the diff_id that the configuration gives it.
pub struct Layer {
    pub feed: Feed,
    pub diff_id: Digest,
}

/// A layer given as bytes, not compressed.
pub fn plain(layer: Vec<u8>) -> Layer {
    let diff_id = Digest::of(&layer);
    Layer {
        feed: Box::new(move |out| out.write_all(&layer)),
        diff_id,
    }
}

/// A layer that is never read to its end, or is empty.
pub fn fed(feed: impl FnOnce(&mut dyn Write) -> std::io::Result<()> + Send + 'static) -> Layer {
    Layer {
        feed: Box::new(feed),
        diff_id: Digest::of(b""),
    }
}

/// How a run ended.
#[derive(Debug)]
pub struct Ran {
    pub last: Event,
    pub status: ExitStatus,
    /// Most memory that was resident, in bytes.
    pub peak: u64,
}

/// A converter that was given its job.
pub struct Running {
    pub child: Child,
}

/// CPU seconds that any test's conversion may take: many times what the slowest takes.
const CPU: libc::rlim_t = 120;

/// Starts the program on `layers`, base first.
pub fn start(layers: Vec<Layer>, options: &Options) -> Running {
    let (image, spill) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
    let mut keep = vec![image.as_raw_fd(), spill.as_raw_fd()];
    let mut pipes = Vec::new();
    let diff_ids: Vec<Digest> = layers.iter().map(|l| l.diff_id).collect();
    for Layer { feed, .. } in layers {
        let (read, mut write) = std::io::pipe().unwrap();
        keep.push(read.as_raw_fd());
        pipes.push(read);
        std::thread::spawn(move || {
            // The converter has had enough of it: that is what most tests are about.
            let _ = feed(&mut write);
        });
    }
    let job = Job {
        output_fd: keep[0],
        spill_fd: keep[1],
        layers: (keep[2..].iter().zip(diff_ids))
            .map(|(&fd, diff_id)| LayerJob {
                fd,
                digest: Digest::of(b""),
                diff_id,
            })
            .collect(),
        options: options.clone(),
    };
    let mut command = Command::new(env!("CARGO_BIN_EXE_berth-convert"));
    // As the sealer does; a backtrace would look for files.
    command
        .env_clear()
        .stdin(Stdio::piped())
        .stdout(Stdio::piped());
    // SAFETY: between fork and exec only fcntl and setrlimit run, on numbers and a value on this stack.
    unsafe {
        command.pre_exec(move || {
            let cpu = libc::rlimit {
                rlim_cur: CPU,
                rlim_max: CPU,
            };
            for &fd in &keep {
                if libc::fcntl(fd, libc::F_SETFD, 0) < 0 {
                    return Err(std::io::Error::last_os_error());
                }
            }
            match libc::setrlimit(libc::RLIMIT_CPU, &cpu) {
                0 => Ok(()),
                _ => Err(std::io::Error::last_os_error()),
            }
        });
    }
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&serde_json::to_vec(&job).unwrap()).unwrap();
    Running { child }
}

/// Listens to the program until it ends.
pub fn finish(mut running: Running) -> Ran {
    let mut last = None;
    for line in BufReader::new(running.child.stdout.take().unwrap()).lines() {
        match serde_json::from_str(&line.unwrap()).unwrap() {
            Event::Warning(_) | Event::Progress(_) => {}
            event => last = Some(event),
        }
    }
    let mut status = 0;
    // SAFETY: all zeros is a valid rusage.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: the pointers are to live values; the child is ours and was not waited for.
    let waited = unsafe { libc::wait4(running.child.id() as i32, &mut status, 0, &mut usage) };
    assert_eq!(waited, running.child.id() as i32);
    let status = ExitStatus::from_raw(status);
    Ran {
        last: last.unwrap_or_else(|| panic!("no last word, {status}")),
        status,
        peak: usage.ru_maxrss as u64 * 1024,
    }
}
