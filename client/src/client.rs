//! The calls, one method each.

use std::fmt;
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_config::Config;
use serde::Serialize;
use serde::de::DeserializeOwned;
use ureq::http::{Request, Response};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::DefaultConnector;
use ureq::{Agent, Body, BodyReader};

use crate::api::{
    ErrorAnswer, ErrorKind, Grant, GrantRequest, Image, ImageDetail, PinRequest, Pins, Pull,
    PullRequest, ResolveRequest, Resolved, Status, TraceKept,
};
use crate::error::ClientError;
use crate::munge::{Munge, request_payload};
use crate::sse;
use crate::unix::{NoResolver, UnixConnector};

/// Longest answer read, in bytes: a list of 100,000 images is about 40 MB.
const MAX_BODY: u64 = 64 << 20;
/// Longest text of an answer that is not the daemon's, shown to the user.
const MAX_SHOWN: usize = 120;
const CONNECT: Duration = Duration::from_secs(5);
/// The whole of an ordinary call. Resolving may ask a far registry.
const CALL: Duration = Duration::from_secs(60);
/// What a long poll may take beyond its own waiting time.
const POLL_MARGIN: Duration = Duration::from_secs(10);
/// The longest long poll that the daemon grants.
const MAX_POLL: Duration = Duration::from_secs(60);
/// An event stream is dead after so long without a byte; the daemon sends keep-alives more often.
const SILENCE: Duration = Duration::from_secs(60);

/// A way to the daemon. Each call opens a connection of its own and closes it.
pub struct Client {
    agent: Agent,
    /// What stands before each path: `http://localhost` for a socket.
    base: String,
    /// How people call it, in errors.
    place: String,
    /// Set where a credential is needed: over TCP.
    munge: Option<MungeAt>,
    limit: Duration,
}

struct MungeAt(Option<PathBuf>);

/// What answered at `/healthz`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    pub status: u16,
    /// The `Date` header, to compare clocks.
    pub date: Option<String>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({})", self.place)
    }
}

impl Client {
    /// The way that the configuration names: the Unix socket where it exists, else `api.url`.
    ///
    /// # Errors
    /// [`ClientError::NoAddress`] when there is neither.
    pub fn from_config(config: &Config) -> Result<Self, ClientError> {
        let api = &config.api;
        match &api.url {
            Some(url) if !api.socket.exists() => Ok(Self::tcp(url, api.munge_socket.as_deref())),
            None if !api.socket.exists() => Err(ClientError::NoAddress {
                socket: api.socket.display().to_string(),
            }),
            _ => Ok(Self::unix(&api.socket)),
        }
    }

    /// Over a Unix socket: the daemon sees who asks.
    pub fn unix(socket: &Path) -> Self {
        let connector = UnixConnector(socket.to_owned());
        Self {
            agent: Agent::with_parts(agent_config(), connector, NoResolver),
            base: "http://localhost".into(),
            place: socket.display().to_string(),
            munge: None,
            limit: CALL,
        }
    }

    /// Over TCP, with a munge credential in each request. `url` is `http://HOST:PORT` or `https://HOST[:PORT]`.
    pub fn tcp(url: &str, munge_socket: Option<&Path>) -> Self {
        #[cfg(feature = "tls")]
        if url.starts_with("https:") {
            // An error means that one is installed already.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let parts = (DefaultConnector::new(), DefaultResolver::default());
        Self {
            agent: Agent::with_parts(agent_config(), parts.0, parts.1),
            base: url.trim_end_matches('/').to_owned(),
            place: url.to_owned(),
            munge: Some(MungeAt(munge_socket.map(Path::to_owned))),
            limit: CALL,
        }
    }

    /// The same client with another limit for the whole of an ordinary call (60 s otherwise).
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// How people call the place where the daemon is looked for.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Asks for an image to be in the store. Returns at once; the pull goes on in the daemon.
    pub fn pull(&self, request: &PullRequest) -> Result<Pull, ClientError> {
        self.post("/v1/pulls", request)
    }

    /// Pulls in flight, and those that ended lately.
    pub fn pulls(&self) -> Result<Vec<Pull>, ClientError> {
        self.get("/v1/pulls")
    }

    /// How a pull stands; with `wait`, as soon as it has ended, or after that time (at most 60 s).
    pub fn wait_pull(&self, id: &str, wait: Duration) -> Result<Pull, ClientError> {
        let wait = wait.min(MAX_POLL);
        let path = format!("/v1/pulls/{}?wait={}", self.word(id)?, wait.as_secs());
        let response = self.send("GET", &path, None, Some(wait + POLL_MARGIN))?;
        self.json(response)
    }

    /// Follows a pull: how it stands, each time that it changes, up to its end. The stream may break before that:
    /// then ask again, or use [`Client::wait_pull`].
    pub fn events(&self, id: &str) -> Result<PullEvents, ClientError> {
        let path = format!("/v1/pulls/{}/events", self.word(id)?);
        let response = self.checked(self.send("GET", &path, None, None)?)?;
        Ok(PullEvents {
            stream: BufReader::new(
                response
                    .into_body()
                    .into_with_config()
                    .limit(u64::MAX)
                    .reader(),
            ),
            place: self.place.clone(),
            ended: false,
        })
    }

    pub fn resolve(&self, request: &ResolveRequest) -> Result<Resolved, ClientError> {
        self.post("/v1/resolve", request)
    }

    /// Pins what a job will use, and starts the pulls that it needs.
    pub fn pin(&self, request: &PinRequest) -> Result<Pins, ClientError> {
        self.post("/v1/pins", request)
    }

    pub fn images(&self) -> Result<Vec<Image>, ClientError> {
        self.get("/v1/images")
    }

    /// One image, by its manifest digest.
    pub fn image(&self, digest: &berth_image::Digest) -> Result<ImageDetail, ClientError> {
        self.get(&format!("/v1/images/{digest}"))
    }

    /// The signed record of an image, as it lies in the store: to be verified.
    pub fn record(
        &self,
        digest: &berth_image::Digest,
        platform: &berth_image::Platform,
    ) -> Result<Vec<u8>, ClientError> {
        let path = image_path(digest, platform, "record");
        let response = self.send("GET", &path, None, Some(self.limit))?;
        self.read(self.checked(response)?)
    }

    /// A grant to read an image's file, for whoever this process is; to be handed to a node's image server together
    /// with [`Client::data_source`].
    pub fn grant(&self, request: &GrantRequest) -> Result<Grant, ClientError> {
        self.post("/v1/grants", request)
    }

    /// Where a node's image server finds an image's file: a URL, or the path of the daemon's socket, `:` and a path.
    pub fn data_source(
        &self,
        digest: &berth_image::Digest,
        platform: &berth_image::Platform,
    ) -> String {
        let path = image_path(digest, platform, "data");
        match self.munge {
            Some(_) => format!("{}{path}", self.base),
            None => format!("{}:{path}", self.place),
        }
    }

    /// What a start of an image touches, where somebody recorded it: a trace to be checked.
    pub fn trace(
        &self,
        digest: &berth_image::Digest,
        platform: &berth_image::Platform,
    ) -> Result<Option<Vec<u8>>, ClientError> {
        let path = image_path(digest, platform, "trace");
        let response = self.send("GET", &path, None, Some(self.limit))?;
        match self.checked(response) {
            Err(ClientError::Api(e)) if e.kind == ErrorKind::NotFound => Ok(None),
            checked => self.read(checked?).map(Some),
        }
    }

    /// Sends a trace. One that is there already stays, but for an admin.
    pub fn put_trace(
        &self,
        digest: &berth_image::Digest,
        platform: &berth_image::Platform,
        trace: &str,
    ) -> Result<TraceKept, ClientError> {
        let path = image_path(digest, platform, "trace");
        let body = trace.as_bytes().to_vec();
        let response = self.send("PUT", &path, Some(body), Some(self.limit))?;
        self.json(response)
    }

    /// Takes an image out of the store. For admins.
    pub fn remove(&self, digest: &berth_image::Digest) -> Result<(), ClientError> {
        let path = format!("/v1/images/{digest}");
        let response = self.send("DELETE", &path, None, Some(self.limit))?;
        self.checked(response).map(drop)
    }

    pub fn status(&self) -> Result<Status, ClientError> {
        self.get("/v1/status")
    }

    /// Whether something answers at all, and what its clock says. Needs no credential.
    pub fn probe(&self) -> Result<Probe, ClientError> {
        let request = Request::get(format!("{}/healthz", self.base)).body(Vec::new());
        let response = self.run(request, Some(self.limit))?;
        let date = response.headers().get("date");
        Ok(Probe {
            status: response.status().as_u16(),
            date: date.and_then(|d| d.to_str().ok()).map(str::to_owned),
        })
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let response = self.send("GET", path, None, Some(self.limit))?;
        self.json(response)
    }

    fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| self.protocol(e.to_string()))?;
        let response = self.send("POST", path, Some(body), Some(self.limit))?;
        self.json(response)
    }

    /// Sends one request; without a limit only silence ends it.
    fn send(
        &self,
        method: &str,
        path: &str,
        body: Option<Vec<u8>>,
        limit: Option<Duration>,
    ) -> Result<Response<Body>, ClientError> {
        let mut request = Request::builder()
            .method(method)
            .uri(format!("{}{path}", self.base));
        if body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let body = body.unwrap_or_default();
        if let Some(MungeAt(socket)) = &self.munge {
            let payload = request_payload(method, path, &body);
            let credential = Munge::load(socket.as_deref())?.encode(payload.as_bytes())?;
            request = request.header("authorization", format!("Munge {credential}"));
        }
        self.run(request.body(body), limit)
    }

    fn run(
        &self,
        request: Result<Request<Vec<u8>>, ureq::http::Error>,
        limit: Option<Duration>,
    ) -> Result<Response<Body>, ClientError> {
        let request = request.map_err(|e| self.protocol(e.to_string()))?;
        let configured = self
            .agent
            .configure_request(request)
            .timeout_global(limit)
            .timeout_connect(Some(limit.map_or(CONNECT, |l| l.min(CONNECT))))
            .timeout_recv_response(Some(limit.unwrap_or(CALL)))
            .timeout_per_read(Some(limit.unwrap_or(SILENCE)))
            .build();
        self.agent
            .run(configured)
            .map_err(|e| ClientError::from_ureq(&self.place, e))
    }

    /// The answer, when it is a success; else the daemon's error.
    fn checked(&self, response: Response<Body>) -> Result<Response<Body>, ClientError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        let bytes = self.read(response)?;
        match serde_json::from_slice::<ErrorAnswer>(&bytes) {
            Ok(answer) => Err(ClientError::Api(answer.error)),
            Err(_) => {
                let text = String::from_utf8_lossy(&bytes);
                let line = text.lines().next().unwrap_or_default();
                let shown: String = (line.chars().take(MAX_SHOWN))
                    .flat_map(char::escape_default)
                    .collect();
                Err(self.protocol(format!("HTTP {status} {shown}").trim_end().to_owned()))
            }
        }
    }

    fn json<T: DeserializeOwned>(&self, response: Response<Body>) -> Result<T, ClientError> {
        let bytes = self.read(self.checked(response)?)?;
        serde_json::from_slice(&bytes).map_err(|e| self.protocol(e.to_string()))
    }

    fn read(&self, response: Response<Body>) -> Result<Vec<u8>, ClientError> {
        let body = response.into_body().into_with_config().limit(MAX_BODY);
        body.read_to_vec()
            .map_err(|e| ClientError::from_ureq(&self.place, e))
    }

    /// An id as a part of a path: what a hostile daemon sent does not choose another path.
    fn word<'a>(&self, id: &'a str) -> Result<&'a str, ClientError> {
        let fine = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
        if id.is_empty() || id.len() > 128 || !id.bytes().all(fine) {
            return Err(self.protocol("a pull's id that is not a word".into()));
        }
        Ok(id)
    }

    fn protocol(&self, why: String) -> ClientError {
        ClientError::Protocol {
            place: self.place.clone(),
            why,
        }
    }
}

fn image_path(
    digest: &berth_image::Digest,
    platform: &berth_image::Platform,
    what: &str,
) -> String {
    format!("/v1/images/{digest}/{what}?platform={platform}")
}

/// What each request starts from: no proxy and no redirect ever, an error status is an answer.
fn agent_config() -> ureq::config::Config {
    let builder = Agent::config_builder()
        .proxy(None)
        .max_redirects(0)
        .http_status_as_error(false)
        .max_idle_connections(0)
        .user_agent(concat!("berth/", env!("CARGO_PKG_VERSION")));
    #[cfg(feature = "tls")]
    let builder = builder.tls_config(
        ureq::tls::TlsConfig::builder()
            .root_certs(ureq::tls::RootCerts::PlatformVerifier)
            .build(),
    );
    builder.build()
}

/// See [`Client::events`].
pub struct PullEvents {
    stream: BufReader<BodyReader<'static>>,
    place: String,
    ended: bool,
}

impl fmt::Debug for PullEvents {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PullEvents({})", self.place)
    }
}

impl Iterator for PullEvents {
    type Item = Result<Pull, ClientError>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.ended {
            return None;
        }
        let result = match sse::next_data(&mut self.stream) {
            Ok(None) => return None,
            Ok(Some(data)) => {
                serde_json::from_str::<Pull>(&data).map_err(|e| ClientError::Protocol {
                    place: self.place.clone(),
                    why: e.to_string(),
                })
            }
            Err(e) => Err(stream_error(&self.place, e)),
        };
        self.ended = match &result {
            Ok(pull) => pull.state.is_final(),
            Err(_) => true,
        };
        Some(result)
    }
}

/// ureq gives its own errors as the inside of an I/O error.
fn stream_error(place: &str, error: io::Error) -> ClientError {
    ClientError::from_ureq(place, ureq::Error::from(error))
}
