//! The sealer as the daemon sees it: requests to it, whether it answers, and, where the site wants that, its process.

use std::path::PathBuf;
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use berth_client::api::{ErrorBody, ErrorKind};
use berth_config::Config;
use tokio::process::{Child, Command};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use crate::metrics::Metrics;
use crate::seal::client;
use crate::seal::protocol::{Answer, Progress, Request, SealFailure, Status};

/// How long work waits for a sealer that does not answer.
const READY: Duration = Duration::from_secs(30);
/// How often it is asked meanwhile.
const AGAIN: Duration = Duration::from_millis(100);
/// How long a sealer that answers needs at most to say so.
const STATUS: Duration = Duration::from_secs(5);
/// How long a sealer that was told to end may take.
const END: Duration = Duration::from_secs(5);
const BACKOFF: (Duration, Duration) = (Duration::from_millis(200), Duration::from_secs(10));
/// A sealer that ran so long did not fail at its start.
const SETTLED: Duration = Duration::from_secs(60);
/// Exit codes that say: as things are set up here it will never run (usage, permission, configuration).
const HOPELESS: [i32; 3] = [2, 77, 78];

/// The sealer at its socket. Clones are the same one.
#[derive(Debug, Clone)]
pub struct Sealer {
    socket: Arc<PathBuf>,
    store_uuid: Arc<str>,
    metrics: Arc<Metrics>,
}

impl Sealer {
    pub fn new(config: &Config, store_uuid: &str, metrics: Arc<Metrics>) -> Self {
        Self {
            socket: Arc::new(config.seal.socket.clone()),
            store_uuid: store_uuid.into(),
            metrics,
        }
    }

    /// See [`client::request`].
    pub async fn request(
        &self,
        request: &Request,
        pipes: Vec<std::os::fd::OwnedFd>,
        progress: impl FnMut(Progress),
    ) -> Result<Answer, SealFailure> {
        client::request(&self.socket, request, pipes, progress).await
    }

    /// The sealer as it sees itself; an error when it is not there, or seals into another store.
    pub async fn status(&self) -> Result<Status, ErrorBody> {
        let asked = self.request(&Request::Status {}, Vec::new(), |_| {});
        let status = match tokio::time::timeout(STATUS, asked).await {
            Ok(Ok(Answer::Status(status))) if status.store_uuid == *self.store_uuid => Ok(status),
            Ok(Ok(Answer::Status(status))) => Err(unavailable(format!(
                "the sealer owns another store, of UUID {}",
                status.store_uuid.escape_default()
            ))),
            Ok(Ok(_)) => Err(unavailable("the sealer answered something else".into())),
            Ok(Err(e)) => Err(e.into()),
            Err(_) => Err(unavailable("the sealer does not answer".into())),
        };
        self.metrics.sealer_up.set(i64::from(status.is_ok()));
        status
    }

    /// Waits, for a bounded time, until the sealer answers. One that does not speak to this daemon's uid is not waited
    /// for.
    pub async fn ready(&self) -> Result<Status, ErrorBody> {
        let end = Instant::now() + READY;
        loop {
            match self.status().await {
                Err(e) if e.kind != ErrorKind::Denied && Instant::now() < end => {
                    tokio::time::sleep(AGAIN).await;
                }
                other => return other,
            }
        }
    }

    /// Runs the sealer as a child process of this one, and starts it again when it dies. Returns when `stop` says so,
    /// or with the child's exit code when that says that it can never run.
    pub async fn supervise(&self, config_path: PathBuf, stop: CancellationToken) -> Option<u8> {
        let mut wait = BACKOFF.0;
        loop {
            let began = Instant::now();
            let mut child = match start(&config_path) {
                Ok(child) => child,
                Err(e) => {
                    tracing::error!(error = %e, "cannot start the sealer");
                    return Some(70);
                }
            };
            tracing::info!(pid = child.id(), "the sealer was started");
            let ended = tokio::select! {
                ended = child.wait() => ended,
                () = stop.cancelled() => {
                    end(&mut child).await;
                    return None;
                }
            };
            match ended {
                Ok(status) if is_hopeless(status) => {
                    return status.code().and_then(|c| u8::try_from(c).ok());
                }
                Ok(status) => tracing::error!(%status, "the sealer ended and is started again"),
                Err(e) => tracing::error!(error = %e, "the sealer is lost and is started again"),
            }
            self.metrics.sealer_restarts.inc();
            if began.elapsed() > SETTLED {
                wait = BACKOFF.0;
            }
            tokio::select! {
                () = tokio::time::sleep(wait) => wait = (wait * 2).min(BACKOFF.1),
                () = stop.cancelled() => return None,
            }
        }
    }
}

fn is_hopeless(status: ExitStatus) -> bool {
    status.code().is_some_and(|c| HOPELESS.contains(&c))
}

fn start(config_path: &std::path::Path) -> std::io::Result<Child> {
    Command::new(std::env::current_exe()?)
        .arg("seal")
        .arg("--config")
        .arg(config_path)
        .args(["--parent", &std::process::id().to_string()])
        // Its readiness is not ours.
        .env_remove("NOTIFY_SOCKET")
        .stdin(std::process::Stdio::null())
        .kill_on_drop(true)
        .spawn()
}

async fn end(child: &mut Child) {
    if let Some(pid) = child.id().and_then(|p| i32::try_from(p).ok())
        && let Some(pid) = rustix::process::Pid::from_raw(pid)
    {
        // It may have ended by itself.
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
    }
    if tokio::time::timeout(END, child.wait()).await.is_err() {
        let _ = child.kill().await;
    }
}

fn unavailable(message: String) -> ErrorBody {
    ErrorBody {
        kind: ErrorKind::StoreUnavailable,
        message,
        hint: Some("is `berthd seal` running?".into()),
    }
}
