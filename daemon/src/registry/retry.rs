//! When to try again: pure decisions.

use std::time::Duration;

/// The shortest and longest wait that a registry may ask for by `Retry-After`: real ones have sent `35.852µs`
/// and an hour.
const RETRY_AFTER: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(60));
const FIRST: Duration = Duration::from_millis(200);
const LONGEST: Duration = Duration::from_secs(10);

/// How long to wait before try number `attempt` (1 = the second). `jitter` is from 0 to 1 and spreads those who
/// failed together over the second half of the wait.
pub fn delay(attempt: u32, retry_after: Option<Duration>, jitter: f64) -> Duration {
    if let Some(asked) = retry_after {
        return asked.clamp(RETRY_AFTER.0, RETRY_AFTER.1);
    }
    let whole = FIRST
        .saturating_mul(1 << attempt.saturating_sub(1).min(10))
        .min(LONGEST);
    whole.mul_f64(0.5 + jitter.clamp(0.0, 1.0) / 2.0)
}

/// A `Retry-After` header: whole seconds (RFC 9110, section 10.2.3). A date or rubbish counts as one second, so
/// that the request is at least not repeated at once.
pub fn parse_retry_after(value: &str) -> Duration {
    Duration::from_secs(value.trim().parse().unwrap_or(1))
}

/// A number from 0 to 1 that differs between processes and calls.
pub fn jitter() -> f64 {
    let mut bytes = [0u8; 4];
    // Without randomness everybody waits the same time, which is no error.
    let _ = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::NONBLOCK);
    f64::from(u32::from_le_bytes(bytes)) / f64::from(u32::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_grow_and_are_bounded() {
        assert_eq!(delay(1, None, 1.0), FIRST);
        assert_eq!(delay(1, None, 0.0), FIRST / 2);
        assert!(delay(3, None, 0.0) >= FIRST);
        assert_eq!(delay(40, None, 1.0), LONGEST);
    }

    #[test]
    fn a_registrys_wish_is_clamped() {
        let asked = |v| delay(1, Some(parse_retry_after(v)), 0.5);
        assert_eq!(asked("3"), Duration::from_secs(3));
        assert_eq!(asked("86400"), RETRY_AFTER.1);
        assert_eq!(asked("0"), RETRY_AFTER.0);
        assert_eq!(asked("35.852µs"), Duration::from_secs(1));
        assert_eq!(
            asked("Wed, 21 Oct 2026 07:28:00 GMT"),
            Duration::from_secs(1)
        );
    }
}
