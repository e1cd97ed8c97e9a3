//! `berth-convert`: one job as JSON on standard input, events as lines of JSON on standard output.
//!
//! Started by the sealer, one process an image. Exit code 0 after `done`, 1 after `error`, 2 for a job that is none.

use std::io::{Read as _, Write as _};
use std::process::ExitCode;

use berth_convert::job::{Event, Failure, FailureKind, Job, Limits};
use berth_convert::{Layer, convert, sandbox};

/// Most bytes of a job: 512 layers are 150 KiB.
const MAX_JOB: u64 = 4 << 20;

fn main() -> ExitCode {
    let mut text = Vec::new();
    let read = std::io::stdin().take(MAX_JOB).read_to_end(&mut text);
    let job: Job = match read
        .map_err(|e| e.to_string())
        .and_then(|_| serde_json::from_slice(&text).map_err(|e| e.to_string()))
    {
        Ok(job) => job,
        Err(e) => {
            eprintln!("berth: standard input holds no conversion job: {e}");
            eprintln!("hint: this program is started by `berthd seal`; people use `berth pull`");
            return ExitCode::from(2);
        }
    };
    match run(job) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            say(&Event::Error(failure));
            ExitCode::FAILURE
        }
    }
}

fn run(job: Job) -> Result<(), Failure> {
    let internal = |message: String| Failure {
        kind: FailureKind::Internal,
        layer: None,
        entry: None,
        message,
    };
    let mut numbers = vec![job.output_fd, job.spill_fd];
    numbers.extend(job.layers.iter().map(|l| l.fd));
    let caged = |e: sandbox::SandboxError| internal(format!("cannot sandbox the converter: {e}"));
    let mut files = sandbox::take_descriptors(&numbers)
        .map_err(caged)?
        .into_iter();
    for warning in
        sandbox::enter(most_memory(&job), largest_file(&job.options.limits)).map_err(caged)?
    {
        say(&Event::Warning(warning));
    }

    let (Some(output), Some(spill)) = (files.next(), files.next()) else {
        return Err(internal("descriptors are missing".into()));
    };
    let layers = (files.zip(&job.layers))
        .map(|(input, layer)| Layer {
            input,
            diff_id: layer.diff_id,
        })
        .collect();
    let done = convert(layers, output, spill, &job.options, &mut |progress| {
        say(&Event::Progress(progress));
    })?;
    say(&Event::Done(done));
    Ok(())
}

/// A last bound, well above what a conversion within its limits needs.
fn most_memory(job: &Job) -> u64 {
    let options = &job.options;
    let entries = options.limits.max_entries.saturating_mul(600);
    let threads = (options.threads as u64).saturating_mul(32 << 20);
    (options.memory.saturating_mul(2))
        .saturating_add(entries)
        .saturating_add(threads)
        .saturating_add(512 << 20)
}

/// A last bound, well above what the image or the spill file of layers within their limits can be: contents that do not
/// shrink, their hash tree, and for each entry names, a symlink's target and metadata.
fn largest_file(limits: &Limits) -> u64 {
    (limits.max_bytes.saturating_add(limits.max_bytes / 64))
        .saturating_add(limits.max_entries.saturating_mul(8 << 10))
        .saturating_add(1 << 30)
}

/// Who reads this has gone away when it cannot be written; then nobody wants the image either.
fn say(event: &Event) {
    let mut line = match serde_json::to_vec(event) {
        Ok(line) => line,
        Err(_) => return,
    };
    line.push(b'\n');
    let mut out = std::io::stdout().lock();
    if out.write_all(&line).and_then(|()| out.flush()).is_err() {
        std::process::exit(1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_may_hold_all_that_the_limits_allow() {
        let file = |max_bytes, max_entries| {
            largest_file(&Limits {
                max_bytes,
                max_entries,
                max_ratio: 1,
            })
        };
        // The hash tree is a 128th and a bit.
        assert!(file(1 << 40, 0) > (1 << 40) + (1 << 40) / 127);
        assert!(file(0, 1000) > 1000 * (4095 + 2 * 255));
        assert_eq!(file(u64::MAX, u64::MAX), u64::MAX);
    }
}
