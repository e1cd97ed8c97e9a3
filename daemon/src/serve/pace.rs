//! How slowly a peer may take what the daemon has to send: what a response holds (turns, buffers) is not held for long
//! by who reads a byte now and then. Only time in which bytes wait for the peer counts.

use std::future::Future as _;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep};

/// Bytes a second that a peer has to take, over [`WINDOW`].
const SLOWEST: u64 = 64 << 10;
pub const WINDOW: Duration = Duration::from_secs(30);

/// Watches over one connection's writes.
#[derive(Debug)]
pub struct Pace {
    window: Duration,
    /// Since when bytes wait.
    since: Option<Instant>,
    waited: Duration,
    taken: u64,
    timer: Pin<Box<Sleep>>,
}

impl Pace {
    pub fn new(window: Duration) -> Self {
        Self {
            window,
            since: None,
            waited: Duration::ZERO,
            taken: 0,
            timer: Box::pin(tokio::time::sleep(window)),
        }
    }

    /// What a write came to, or an error when the peer is too slow: at the latest when the window is over, whether the
    /// peer moves or not.
    pub fn judge(
        &mut self,
        context: &mut Context<'_>,
        polled: Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        let taken = match polled {
            Poll::Ready(Ok(taken)) => Some(taken as u64),
            Poll::Ready(Err(_)) => return polled,
            Poll::Pending => None,
        };
        let now = Instant::now();
        let waited = self
            .since
            .take()
            .map_or(Duration::ZERO, |since| now - since);
        if !self.keeps(waited, taken.unwrap_or(0)) {
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        if taken.is_none() {
            self.since = Some(now);
            self.timer.as_mut().reset(now + (self.window - self.waited));
            if self.timer.as_mut().poll(context).is_ready() {
                context.waker().wake_by_ref();
            }
        }
        polled
    }

    /// Whether so many bytes after waiting so long are, with those before, fast enough.
    fn keeps(&mut self, waited: Duration, bytes: u64) -> bool {
        self.waited += waited;
        self.taken += bytes;
        if self.waited < self.window {
            return true;
        }
        let waited = std::mem::take(&mut self.waited);
        u128::from(std::mem::take(&mut self.taken)) * 1000
            >= u128::from(SLOWEST) * waited.as_millis()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_drip_is_too_slow_and_a_thin_link_is_not() {
        let second = Duration::from_secs(1);
        let kept = |bytes: u64| {
            let mut pace = Pace::new(WINDOW);
            (0..200).position(|_| !pace.keeps(second, bytes))
        };
        assert_eq!(kept(1), Some(29));
        assert_eq!(kept(SLOWEST - 1), Some(29));
        assert_eq!(kept(SLOWEST), None);
        // A byte every two minutes is found out with the first one, and what went before does not count for ever.
        let mut pace = Pace::new(WINDOW);
        assert!(pace.keeps(WINDOW, 1 << 40));
        assert!(!pace.keeps(4 * WINDOW, 1));
        // Who is not waited for may do without for as long as he likes.
        assert!((0..1000).all(|_| pace.keeps(Duration::ZERO, 1)));
    }
}
