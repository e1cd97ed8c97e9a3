//! Bytes by HTTP: one GET with a Range for each run of chunks. TLS by rustls, believed by the system's certificates.

use std::io::Read;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use berth_client::{NoResolver, UnixConnector};
use berth_image::trace::MAX_TRACE;
use ureq::config::Config;
use ureq::tls::{RootCerts, TlsConfig};
use ureq::{Agent, RequestBuilder};

use super::proxy;
use super::source::{Source, SourceError};

/// An image's file behind a URL.
pub struct HttpSource {
    agent: Agent,
    url: String,
    name: String,
    /// What lets us read there; never shown.
    grant: Mutex<Option<String>>,
    /// Nothing is given there without a grant.
    needs_grant: bool,
}

impl std::fmt::Debug for HttpSource {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "HttpSource({})", self.name)
    }
}

/// Longest wait that a busy server is granted.
const MOST_WAIT: Duration = Duration::from_secs(10);
/// How long connecting may take: a machine that is off is not to hold up readers who could ask another one.
const CONNECT: Duration = Duration::from_secs(2);
/// Connections kept for the next fetch.
const IDLE: usize = 8;

impl HttpSource {
    /// `at` is `http://…`, `https://…`, or the path of a Unix socket with the image's path after a `:`. `proxy` is
    /// the URL of an HTTP proxy, asked for `http:` in absolute form, so that one that caches (Dragonfly's dfdaemon)
    /// can, and by CONNECT for `https:`. URLs must not carry secrets: `grant` is what stands in the header.
    pub fn new(at: &str, grant: Option<&str>, proxy: Option<&str>) -> Result<Self, SourceError> {
        let (agent, url) = agent(at, proxy).map_err(|what| SourceError::Failed {
            source_name: at.to_owned(),
            what,
        })?;
        Ok(Self {
            agent,
            url,
            name: at.to_owned(),
            grant: Mutex::new(grant.map(header)),
            needs_grant: false,
        })
    }

    /// The same of a daemon, which is asked for nothing until it has given a grant.
    pub fn of_daemon(
        at: &str,
        grant: Option<&str>,
        proxy: Option<&str>,
    ) -> Result<Self, SourceError> {
        let source = Self::new(at, grant, proxy)?;
        Ok(Self {
            needs_grant: true,
            ..source
        })
    }

    /// Where the daemon has the image's trace, beside its data.
    fn trace_url(&self) -> Option<String> {
        let (path, query) = self.url.split_once('?').unwrap_or((&self.url, ""));
        Some(format!("{}trace?{query}", path.strip_suffix("data")?))
    }

    fn authorized<B>(&self, request: RequestBuilder<B>) -> RequestBuilder<B> {
        match &*crate::lock(&self.grant) {
            Some(grant) => request.header("authorization", grant),
            None => request,
        }
    }

    fn failed(&self, what: impl ToString) -> SourceError {
        SourceError::Failed {
            source_name: self.name.clone(),
            what: what.to_string(),
        }
    }
}

fn header(grant: &str) -> String {
    format!("Berth-Grant {grant}")
}

fn agent(at: &str, proxy: Option<&str>) -> Result<(Agent, String), String> {
    let config = Agent::config_builder()
        .http_status_as_error(false)
        // A redirect would be to a place that nobody named.
        .max_redirects(0)
        .timeout_connect(Some(CONNECT))
        .proxy(None)
        .input_buffer_size(64 << 10)
        .output_buffer_size(8 << 10)
        .max_idle_connections(IDLE)
        .max_idle_connections_per_host(IDLE)
        .user_agent(concat!("berth/", env!("CARGO_PKG_VERSION")));
    if at.starts_with('/') {
        let (socket, path) = at.split_once(':').ok_or("no path after the socket's")?;
        let connector = UnixConnector(Path::new(socket).to_owned());
        let agent = Agent::with_parts(config.build(), connector, NoResolver);
        return Ok((agent, format!("http://localhost{path}")));
    }
    let tls = at.starts_with("https://");
    if !tls && !at.starts_with("http://") {
        return Err("neither http:, https: nor a socket's path".to_owned());
    }
    let config: Config = match proxy {
        Some(proxy) if tls => {
            let proxy = ureq::Proxy::new(proxy).map_err(|error| format!("proxy: {error}"))?;
            config.proxy(Some(proxy)).tls_config(believed()).build()
        }
        Some(proxy) => return Ok((proxy::agent(config.build(), proxy)?, at.to_owned())),
        None => config.tls_config(believed()).build(),
    };
    Ok((config.new_agent(), at.to_owned()))
}

fn believed() -> TlsConfig {
    // An error means that one is installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    TlsConfig::builder()
        .root_certs(RootCerts::PlatformVerifier)
        .build()
}

impl Source for HttpSource {
    fn name(&self) -> &str {
        &self.name
    }

    fn is_open(&self) -> bool {
        !self.needs_grant || crate::lock(&self.grant).is_some()
    }

    fn renew(&self, at: &str, grant: &str) {
        if at == self.name {
            *crate::lock(&self.grant) = Some(header(grant));
        }
    }

    fn open(&self, range: Range<u64>, limit: Duration) -> Result<Box<dyn Read + '_>, SourceError> {
        let (first, last) = (range.start, range.end - 1);
        let request = self.agent.get(&self.url);
        let request = request.config().timeout_global(Some(limit)).build();
        let request = request.header("range", format!("bytes={first}-{last}"));
        let answer = self
            .authorized(request)
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
                return Err(SourceError::Busy {
                    source_name: self.name.clone(),
                    wait: wait.min(MOST_WAIT),
                });
            }
            status => return Err(self.failed(format!("status {status} for a range"))),
        }
        let expected = format!("bytes {first}-{last}/");
        if !header("content-range").is_some_and(|range| range.starts_with(&expected)) {
            return Err(self.failed("another range than was asked for"));
        }
        let body = answer.into_body().into_with_config().limit(u64::MAX);
        Ok(Box::new(body.reader()))
    }

    fn trace(&self, limit: Duration) -> Option<Vec<u8>> {
        let request = self.agent.get(&self.trace_url()?);
        let request = request.config().timeout_global(Some(limit)).build();
        let answer = self.authorized(request).call();
        let answer = answer
            .inspect_err(|error| tracing::info!(%error, "no trace"))
            .ok()?;
        if answer.status() != 200 {
            return None;
        }
        let body = answer.into_body().into_with_config();
        body.limit(MAX_TRACE as u64).read_to_vec().ok()
    }

    fn send_trace(&self, json: &str, limit: Duration) -> bool {
        let Some(url) = self.trace_url() else {
            return false;
        };
        let request = self.agent.put(&url);
        let request = request.config().timeout_global(Some(limit)).build();
        let request = request.header("content-type", "application/json");
        match self.authorized(request).send(json) {
            Ok(answer) => answer.status().is_success(),
            Err(error) => {
                tracing::info!(%error, "a trace was not taken");
                false
            }
        }
    }
}
