//! Asking the daemon for images and following each to its end.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use berth_client::api::{ErrorKind, Pull, PullRequest, PullState};
use berth_client::{Client, ClientError};

use crate::error::{Failure, OTHER};
use crate::interrupt::InDaemon;
use crate::progress::{Display, Track};

/// Pulls asked for at a time. The daemon has its own limits; this one bounds our connections.
const AT_A_TIME: usize = 8;
/// How long a daemon may be away while it has work of ours: long enough for a restart.
const PATIENCE: Duration = Duration::from_secs(60);
/// A long poll, where the event stream broke.
const POLL: Duration = Duration::from_secs(20);

/// What came of each request, in the requests' order.
pub fn all(
    client: &Client,
    requests: &[PullRequest],
    display: &Display,
) -> Vec<Result<Pull, Failure>> {
    let next = AtomicUsize::new(0);
    let results: Vec<Mutex<Option<Result<Pull, Failure>>>> =
        requests.iter().map(|_| Mutex::new(None)).collect();
    std::thread::scope(|scope| {
        for _ in 0..AT_A_TIME.min(requests.len()) {
            scope.spawn(|| {
                loop {
                    let i = next.fetch_add(1, Ordering::Relaxed);
                    let (Some(request), Some(slot)) = (requests.get(i), results.get(i)) else {
                        return;
                    };
                    let result = one(client, request, display);
                    if let Ok(mut slot) = slot.lock() {
                        *slot = Some(result);
                    }
                }
            });
        }
    });
    let lost = || Err(Failure::new(70, "a worker of this program ended early"));
    (results.into_iter())
        .map(|slot| slot.into_inner().ok().flatten().unwrap_or_else(lost))
        .collect()
}

/// Asks for one image and waits until it is ready.
pub fn one(client: &Client, request: &PullRequest, display: &Display) -> Result<Pull, Failure> {
    let pull = client.pull(request)?;
    let track = display.track(&pull.reference);
    ended(follow(client, pull, Some(request), &track)?)
}

/// Follows a pull to its end, ready or failed. With the request, a pull that a restarted daemon does not know any
/// more is asked for anew.
pub fn follow(
    client: &Client,
    mut pull: Pull,
    request: Option<&PullRequest>,
    track: &Track,
) -> Result<Pull, ClientError> {
    let _in_daemon = InDaemon::new();
    let mut away = Away::default();
    loop {
        track.update(&pull);
        if pull.state.is_final() {
            return Ok(pull);
        }
        if let Some(last) = watch(client, &pull.id, track) {
            return Ok(last);
        }
        match client.wait_pull(&pull.id, POLL) {
            Ok(now) => {
                pull = now;
                away = Away::default();
            }
            Err(ClientError::Api(body)) if body.kind == ErrorKind::NotFound => match request {
                Some(request) => pull = client.pull(request)?,
                None => return Err(ClientError::Api(body)),
            },
            Err(e) if e.is_unavailable() && away.wait() => {}
            Err(e) => return Err(e),
        }
    }
}

/// Shows events as long as they come; the last one, when the stream held the pull's end.
fn watch(client: &Client, id: &str, track: &Track) -> Option<Pull> {
    for pull in client.events(id).ok()? {
        let pull = pull.ok()?;
        track.update(&pull);
        if pull.state.is_final() {
            return Some(pull);
        }
    }
    None
}

/// A daemon that does not answer, and since when.
#[derive(Debug, Default)]
struct Away {
    since: Option<Instant>,
    tries: u32,
}

impl Away {
    /// Waits a little, or says that it has been too long.
    fn wait(&mut self) -> bool {
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() > PATIENCE {
            return false;
        }
        let pause = Duration::from_millis(200 << self.tries.min(4));
        self.tries += 1;
        std::thread::sleep(pause);
        true
    }
}

/// A pull that ended as failed is a failure.
fn ended(pull: Pull) -> Result<Pull, Failure> {
    match (pull.state, pull.error) {
        (PullState::Failed, Some(body)) => Err(ClientError::Api(body).into()),
        (PullState::Failed, None) => {
            Err(Failure::new(OTHER, "the pull failed for an unknown reason"))
        }
        (_, error) => Ok(Pull { error, ..pull }),
    }
}
