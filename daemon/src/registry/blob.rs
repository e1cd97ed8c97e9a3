//! A blob's bytes from some offset on.

use std::time::{Duration, Instant};

use berth_image::Digest;
use reqwest::header::{CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Method, Response, StatusCode};

use super::client::{Call, Registry, cause, shown};
use super::error::RegistryError;

/// The slowest that a transfer may be on average, in bytes a second: one that drips would hold its place for ever.
const SLOWEST: u64 = 64 << 10;
/// Seconds of waiting over which the average is taken.
const WINDOW: Duration = Duration::from_secs(300);

/// Watches over the average rate. Time that we do not wait for the registry does not count.
#[derive(Debug, Default)]
struct Pace {
    waited: Duration,
    bytes: u64,
}

impl Pace {
    /// Whether `bytes` after waiting so long are, with those before, fast enough.
    fn keeps(&mut self, waited: Duration, bytes: u64) -> bool {
        self.waited += waited;
        self.bytes += bytes;
        if self.waited < WINDOW {
            return true;
        }
        let last = std::mem::take(self);
        last.bytes >= SLOWEST * last.waited.as_secs()
    }
}

/// Bytes on their way. Not checked against any digest.
#[derive(Debug)]
pub struct BlobStream {
    response: Response,
    url: String,
    stall: Duration,
    pace: Pace,
    /// Bytes at the start that were not asked for, from a registry that does not know `Range`.
    surplus: u64,
    /// Bytes still to come.
    left: u64,
}

impl Registry {
    /// Asks once for the blob's bytes from `offset` on. `size` is what the manifest says of the whole.
    ///
    /// # Errors
    /// [`RegistryError::Size`] when the registry announces another size.
    pub async fn blob(
        &self,
        repository: &str,
        digest: &Digest,
        size: u64,
        offset: u64,
    ) -> Result<BlobStream, RegistryError> {
        let mut headers = HeaderMap::new();
        if offset > 0 {
            let range = HeaderValue::from_str(&format!("bytes={offset}-"));
            headers.extend(range.map(|r| (RANGE, r)));
        }
        let call = Call {
            method: Method::GET,
            repository,
            path: format!("blobs/{digest}"),
            headers,
        };
        let response = self.call(&call).await?;
        let url = shown(response.url());
        let start = if response.status() == StatusCode::PARTIAL_CONTENT {
            let range = response.headers().get(CONTENT_RANGE);
            match range.and_then(|r| range_start(r.to_str().ok()?)) {
                Some(start) if start == offset => start,
                _ => return Err(self.protocol(format!("{url} sent another range than asked"))),
            }
        } else {
            0
        };
        if let Some(length) = response.content_length()
            && start + length != size
        {
            return Err(RegistryError::Size {
                url,
                expected: size,
                found: start + length,
            });
        }
        Ok(BlobStream {
            response,
            url,
            stall: self.stall,
            pace: Pace::default(),
            surplus: offset - start,
            left: size - start,
        })
    }

    /// Whether this repository shows the blob to us. Tried once.
    pub async fn has_blob(&self, repository: &str, digest: &Digest) -> Result<(), RegistryError> {
        let call = Call {
            method: Method::HEAD,
            repository,
            path: format!("blobs/{digest}"),
            headers: HeaderMap::new(),
        };
        self.call(&call).await.map(drop)
    }
}

impl BlobStream {
    /// Where the bytes come from, for people.
    pub fn url(&self) -> &str {
        &self.url
    }

    /// The next piece; `None` after exactly the announced number of bytes.
    pub async fn next(&mut self) -> Result<Option<axum::body::Bytes>, RegistryError> {
        loop {
            let asked = Instant::now();
            let piece = tokio::time::timeout(self.stall, self.response.chunk()).await;
            let piece = piece.map_err(|_| RegistryError::Stalled {
                url: self.url.clone(),
                after: self.stall,
            })?;
            let broken = |why| RegistryError::Broken {
                url: self.url.clone(),
                why,
            };
            let Some(mut piece) = piece.map_err(|e| broken(cause(&e)))? else {
                return match self.left {
                    0 => Ok(None),
                    left => Err(broken(format!("{left} bytes are missing"))),
                };
            };
            let length = piece.len() as u64;
            if length > self.left {
                return Err(RegistryError::Protocol {
                    host: self.url.clone(),
                    why: "it sends more bytes than the manifest says".into(),
                });
            }
            self.left -= length;
            if !self.pace.keeps(asked.elapsed(), length) && self.left > 0 {
                return Err(RegistryError::Slow {
                    url: self.url.clone(),
                    after: WINDOW,
                });
            }
            let skip = self.surplus.min(length);
            self.surplus -= skip;
            let _ = piece.split_to(skip as usize);
            if !piece.is_empty() {
                return Ok(Some(piece));
            }
        }
    }
}

/// `bytes 5-9/10` → 5.
fn range_start(header: &str) -> Option<u64> {
    let range = header.trim().strip_prefix("bytes ")?;
    range.split('-').next()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_drip_is_too_slow_and_a_thin_link_is_not() {
        let second = Duration::from_secs(1);
        let kept = |bytes: u64| {
            let mut pace = Pace::default();
            (0..900).position(|_| !pace.keeps(second, bytes))
        };
        assert_eq!(kept(1), Some(299));
        assert_eq!(kept(SLOWEST - 1), Some(299));
        assert_eq!(kept(SLOWEST), None);
        // What came at the start does not count for ever.
        let mut pace = Pace::default();
        assert!(pace.keeps(WINDOW, 1 << 40));
        assert!(!pace.keeps(WINDOW, 1));
    }
}
