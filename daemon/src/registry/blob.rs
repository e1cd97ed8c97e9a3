//! A blob's bytes from some offset on.

use std::time::Duration;

use berth_image::Digest;
use reqwest::header::{CONTENT_RANGE, HeaderMap, HeaderValue, RANGE};
use reqwest::{Method, Response, StatusCode};

use super::client::{Call, Registry, cause, shown};
use super::error::RegistryError;

/// Bytes on their way. Not checked against any digest.
#[derive(Debug)]
pub struct BlobStream {
    response: Response,
    url: String,
    stall: Duration,
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
