//! Bytes by HTTP: one GET with a Range for each piece.

use std::io::Read;
use std::time::Duration;

use super::origin::{Origin, OriginError};

/// An image's file behind a URL.
#[derive(Debug)]
pub struct HttpOrigin {
    agent: ureq::Agent,
    url: String,
}

/// Longest wait that a busy server is granted.
const MOST_WAIT: Duration = Duration::from_secs(10);

impl HttpOrigin {
    /// `proxy` is the URL of one, for a caching proxy on the node or the rack. The URL must not carry secrets.
    pub fn new(url: impl Into<String>, proxy: Option<&str>) -> Result<Self, OriginError> {
        let url = url.into();
        let proxy = proxy.map(ureq::Proxy::new).transpose();
        let proxy = proxy.map_err(|error| OriginError::Failed {
            origin: url.clone(),
            what: format!("proxy: {error}"),
        })?;
        let config = ureq::Agent::config_builder()
            .http_status_as_error(false)
            // A redirect would be to a place that nobody named.
            .max_redirects(0)
            .timeout_connect(Some(Duration::from_secs(5)))
            .proxy(proxy)
            .build();
        Ok(Self {
            agent: config.new_agent(),
            url,
        })
    }

    fn failed(&self, what: impl ToString) -> OriginError {
        OriginError::Failed {
            origin: self.url.clone(),
            what: what.to_string(),
        }
    }
}

impl Origin for HttpOrigin {
    fn name(&self) -> &str {
        &self.url
    }

    fn fetch(&self, offset: u64, buf: &mut [u8], limit: Duration) -> Result<(), OriginError> {
        let last = offset + buf.len() as u64 - 1;
        let mut answer = self
            .agent
            .get(&self.url)
            .config()
            .timeout_global(Some(limit))
            .build()
            .header("range", format!("bytes={offset}-{last}"))
            .call()
            .map_err(|error| self.failed(error))?;
        let header = |name: &str| {
            answer
                .headers()
                .get(name)
                .and_then(|value| value.to_str().ok())
        };
        match answer.status().as_u16() {
            206 => {}
            429 | 503 => {
                let wait = header("retry-after").and_then(|seconds| seconds.parse().ok());
                let wait = wait.map_or(Duration::from_millis(500), Duration::from_secs);
                return Err(OriginError::Busy {
                    origin: self.url.clone(),
                    wait: wait.min(MOST_WAIT),
                });
            }
            status => return Err(self.failed(format!("status {status} for a range"))),
        }
        let expected = format!("bytes {offset}-{last}/");
        if !header("content-range").is_some_and(|range| range.starts_with(&expected)) {
            return Err(self.failed("another range than was asked for"));
        }
        let mut body = answer.body_mut().as_reader();
        body.read_exact(buf).map_err(|error| self.failed(error))
    }
}
