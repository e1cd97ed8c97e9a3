//! Commands with a bound on their time, and waiting for events.

use std::fmt;
use std::io::Read;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// Polls `check` until it answers something, and gives that back; panics with `what` after `seconds`.
///
/// # Panics
/// When the event does not come: a test that waits has failed then.
pub fn wait_until<T>(what: &str, seconds: u64, mut check: impl FnMut() -> Option<T>) -> T {
    let end = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(answer) = check() {
            return answer;
        }
        assert!(Instant::now() < end, "not within {seconds} s: {what}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// A command to be run, by default for at most 120 s.
#[derive(Debug)]
pub struct Run {
    command: Command,
    shown: String,
    seconds: u64,
}

/// How a command ended.
#[derive(Clone)]
pub struct Ended {
    /// The exit code, or 128 + the signal that ended it.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    shown: String,
}

impl Run {
    pub fn new(program: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null());
        Self {
            command,
            shown: format!("{program} {}", arguments.join(" ")),
            seconds: 120,
        }
    }

    pub fn env(mut self, name: &str, value: impl AsRef<std::ffi::OsStr>) -> Self {
        self.command.env(name, value);
        self
    }

    /// Nothing of this process's environment.
    pub fn clean(mut self) -> Self {
        self.command.env_clear();
        self
    }

    pub fn folder(mut self, folder: impl Into<PathBuf>) -> Self {
        self.command.current_dir(folder.into());
        self
    }

    pub fn seconds(mut self, seconds: u64) -> Self {
        self.seconds = seconds;
        self
    }

    /// Runs it to its end.
    ///
    /// # Panics
    /// When it cannot be started, or runs longer than its bound.
    pub fn end(self) -> Ended {
        self.start().end()
    }

    /// Starts it, to be waited for later.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(mut self) -> Running {
        let mut child = self
            .command
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|why| panic!("cannot run `{}`: {why}", self.shown));
        let stdout = drain(child.stdout.take());
        let stderr = drain(child.stderr.take());
        Running {
            child,
            stdout,
            stderr,
            shown: self.shown,
            seconds: self.seconds,
        }
    }
}

/// A command that runs.
#[derive(Debug)]
pub struct Running {
    child: Child,
    stdout: JoinHandle<Vec<u8>>,
    stderr: JoinHandle<Vec<u8>>,
    shown: String,
    seconds: u64,
}

impl Running {
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Sends a signal by name (`TERM`, `INT`).
    pub fn signal(&self, name: &str) {
        let pid = self.pid().to_string();
        Run::new("kill", &["-s", name, &pid]).end();
    }

    /// Waits for the end.
    ///
    /// # Panics
    /// When it does not end within the bound: it is killed then.
    pub fn end(mut self) -> Ended {
        let end = Instant::now() + Duration::from_secs(self.seconds);
        let status = loop {
            match self.child.try_wait() {
                Ok(Some(status)) => break Some(status),
                Ok(None) if Instant::now() < end => thread::sleep(Duration::from_millis(5)),
                _ => break None,
            }
        };
        let late = status.is_none();
        if late {
            // The group's other members may hold the pipes: kill what we started and give up on its output.
            let _ = self.child.kill();
            let _ = self.child.wait();
            panic!("`{}` ran longer than {} s", self.shown, self.seconds);
        }
        use std::os::unix::process::ExitStatusExt;
        let code = status.map_or(-1, |s| {
            s.code().unwrap_or_else(|| 128 + s.signal().unwrap_or(0))
        });
        let text = |reader: JoinHandle<Vec<u8>>| {
            String::from_utf8_lossy(&reader.join().unwrap_or_default()).into_owned()
        };
        Ended {
            code,
            stdout: text(self.stdout),
            stderr: text(self.stderr),
            shown: self.shown,
        }
    }
}

fn drain(pipe: Option<impl Read + Send + 'static>) -> JoinHandle<Vec<u8>> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut bytes);
        }
        bytes
    })
}

impl Ended {
    /// Standard output of a command that must have succeeded, trimmed.
    ///
    /// # Panics
    /// When it failed.
    #[track_caller]
    pub fn ok(&self) -> &str {
        assert!(self.code == 0, "{self}");
        self.stdout.trim()
    }

    /// Both outputs of a command that must have failed.
    ///
    /// # Panics
    /// When it succeeded.
    #[track_caller]
    pub fn failed(&self) -> String {
        assert!(self.code != 0, "succeeded, but must not: {self}");
        format!("{}{}", self.stdout, self.stderr)
    }

    pub fn says(&self, text: &str) -> bool {
        self.stdout.contains(text) || self.stderr.contains(text)
    }
}

impl fmt::Display for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "`{}` ended with {}\n--- stdout\n{}--- stderr\n{}",
            self.shown, self.code, self.stdout, self.stderr
        )
    }
}

impl fmt::Debug for Ended {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Whether the machine has a program that a test wants. Where it has not, that is said in `scripts/test`'s last lines,
/// and with `CI=true` the test fails.
///
/// # Panics
/// In CI, when the program is missing.
pub fn machine_has(program: &str, for_what: &str) -> bool {
    let found = Run::new("which", &[program]).end().code == 0;
    if !found {
        let ci = std::env::var("CI").is_ok_and(|value| value == "true");
        assert!(!ci, "{program} is missing: {for_what}");
        let line = format!("{program}: {for_what}\n");
        eprint!("left out: {line}");
        if let Some(file) = std::env::var_os("BERTH_LEFT_OUT") {
            use std::io::Write;
            let file = std::fs::OpenOptions::new().append(true).open(file);
            let _ = file.and_then(|mut file| file.write_all(line.as_bytes()));
        }
    }
    found
}
