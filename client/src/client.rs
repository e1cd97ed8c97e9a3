//! The calls, one method each.

use std::fmt;
use std::io::{self, BufReader};
use std::path::Path;
use std::time::Duration;

use berth_config::Config;
use berth_image::shown::{clip, parse_error};
use serde::Serialize;
use serde::de::DeserializeOwned;
use ureq::BodyReader;

use crate::api::{
    ErrorAnswer, ErrorKind, Grant, GrantRequest, Image, ImageDetail, PinRequest, Pins, Pull,
    PullRequest, ResolveRequest, Resolved, Status, TraceKept,
};
use crate::error::ClientError;
use crate::sse;
use crate::way::{Answer, Ask, CALL, Way};
use crate::ways::Ways;

/// Longest answer read, in bytes: a list of 100,000 images is about 40 MB.
const MAX_BODY: u64 = 64 << 20;
/// What a long poll may take beyond its own waiting time.
const POLL_MARGIN: Duration = Duration::from_secs(10);
/// The longest long poll that the daemon grants.
const MAX_POLL: Duration = Duration::from_secs(60);

/// A way to the site's daemons, of which one answers each call. Each call opens a connection of its own and closes it.
pub struct Client {
    ways: Ways,
    limit: Duration,
}

/// What answered at `/healthz`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Probe {
    pub status: u16,
    /// The `Date` header, to compare clocks.
    pub date: Option<String>,
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Client({})", self.place())
    }
}

impl Client {
    /// The ways that the configuration names: the Unix socket where it exists, else what `api.url` names, asked in
    /// order. A list there is asked after the socket too; a single URL is that of the socket's own daemon.
    ///
    /// # Errors
    /// [`ClientError::NoAddress`] when there is neither.
    pub fn from_config(config: &Config) -> Result<Self, ClientError> {
        let ways = Ways::new(ways(config)).ok_or_else(|| no_address(config))?;
        Ok(Self { ways, limit: CALL })
    }

    /// The same, a client for each daemon.
    ///
    /// # Errors
    /// [`ClientError::NoAddress`] when there is none.
    pub fn each_from_config(config: &Config) -> Result<Vec<Self>, ClientError> {
        let each: Vec<_> = ways(config).into_iter().map(Self::of).collect();
        match each.is_empty() {
            true => Err(no_address(config)),
            false => Ok(each),
        }
    }

    /// A client for each daemon that the configuration names, whether its socket exists or not, in the order in which
    /// they are asked.
    pub fn every_from_config(config: &Config) -> Vec<Self> {
        let api = &config.api;
        let urls = api.url.iter();
        let urls = urls.map(|url| Self::tcp(url, api.munge_socket.as_deref()));
        std::iter::once(Self::unix(&api.socket))
            .chain(urls)
            .collect()
    }

    /// Over a Unix socket: the daemon sees who asks.
    pub fn unix(socket: &Path) -> Self {
        Self::of(Way::unix(socket))
    }

    /// Over TCP, with a munge credential in each request. `url` is `http://HOST:PORT` or `https://HOST[:PORT]`.
    pub fn tcp(url: &str, munge_socket: Option<&Path>) -> Self {
        Self::of(Way::tcp(url, munge_socket))
    }

    fn of(way: Way) -> Self {
        Self {
            ways: Ways::one(way),
            limit: CALL,
        }
    }

    /// The same client with another limit for the whole of an ordinary call (60 s otherwise).
    #[must_use]
    pub fn within(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// How people call the place where the daemon is looked for: the one that answered last, of several.
    pub fn place(&self) -> &str {
        self.ways.first().place()
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
        json(self.ways.ask(&Ask::get(&path), Some(wait + POLL_MARGIN))?)
    }

    /// Follows a pull: how it stands, each time that it changes, up to its end. The stream may break before that:
    /// then ask again, or use [`Client::wait_pull`].
    pub fn events(&self, id: &str) -> Result<PullEvents, ClientError> {
        let path = format!("/v1/pulls/{}/events", self.word(id)?);
        let Answer { response, way } = checked(self.ways.ask(&Ask::get(&path), None)?)?;
        let body = response.into_body().into_with_config();
        Ok(PullEvents {
            stream: BufReader::new(body.limit(u64::MAX).reader()),
            place: way.place().to_owned(),
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
        read(checked(self.ask(&Ask::get(&path))?)?)
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
        self.ways.first().source(&path)
    }

    /// What a start of an image touches, where somebody recorded it: a trace to be checked.
    pub fn trace(
        &self,
        digest: &berth_image::Digest,
        platform: &berth_image::Platform,
    ) -> Result<Option<Vec<u8>>, ClientError> {
        let path = image_path(digest, platform, "trace");
        match checked(self.ask(&Ask::get(&path))?) {
            Err(ClientError::Api(e)) if e.kind == ErrorKind::NotFound => Ok(None),
            checked => read(checked?).map(Some),
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
        json(self.ask(&Ask::with("PUT", &path, Some(body)))?)
    }

    /// Takes an image out of the store. For admins.
    pub fn remove(&self, digest: &berth_image::Digest) -> Result<(), ClientError> {
        let path = format!("/v1/images/{digest}");
        checked(self.ask(&Ask::with("DELETE", &path, None))?).map(drop)
    }

    pub fn status(&self) -> Result<Status, ClientError> {
        self.get("/v1/status")
    }

    /// Whether something answers at all, and what its clock says. Needs no credential.
    pub fn probe(&self) -> Result<Probe, ClientError> {
        let open = Ask {
            signed: false,
            ..Ask::get("/healthz")
        };
        let Answer { response, .. } = self.ask(&open)?;
        let date = response.headers().get("date");
        Ok(Probe {
            status: response.status().as_u16(),
            date: date.and_then(|d| d.to_str().ok()).map(str::to_owned),
        })
    }

    fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        json(self.ask(&Ask::get(path))?)
    }

    fn post<B: Serialize, T: DeserializeOwned>(
        &self,
        path: &str,
        body: &B,
    ) -> Result<T, ClientError> {
        let body = serde_json::to_vec(body).map_err(|e| self.protocol(e.to_string()))?;
        json(self.ask(&Ask::with("POST", path, Some(body)))?)
    }

    fn ask(&self, ask: &Ask<'_>) -> Result<Answer<'_>, ClientError> {
        self.ways.ask(ask, Some(self.limit))
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
        self.ways.first().protocol(why)
    }
}

fn ways(config: &Config) -> Vec<Way> {
    let api = &config.api;
    let socket = api.socket.exists().then(|| Way::unix(&api.socket));
    let alone = socket.is_some() && api.url.len() < 2;
    let urls = api.url.iter().filter(|_| !alone);
    let urls = urls.map(|url| Way::tcp(url, api.munge_socket.as_deref()));
    socket.into_iter().chain(urls).collect()
}

fn no_address(config: &Config) -> ClientError {
    ClientError::NoAddress {
        socket: config.api.socket.display().to_string(),
    }
}

/// The answer, when it is a success; else the daemon's error.
fn checked(answer: Answer<'_>) -> Result<Answer<'_>, ClientError> {
    let status = answer.response.status();
    if status.is_success() {
        return Ok(answer);
    }
    let way = answer.way;
    let bytes = read(answer)?;
    match serde_json::from_slice::<ErrorAnswer>(&bytes) {
        Ok(answer) => Err(ClientError::Api(answer.error)),
        Err(_) => {
            let text = String::from_utf8_lossy(&bytes);
            let line = text.lines().next().unwrap_or_default();
            Err(way.protocol(
                format!("HTTP {status} {}", clip(line))
                    .trim_end()
                    .to_owned(),
            ))
        }
    }
}

fn json<T: DeserializeOwned>(answer: Answer<'_>) -> Result<T, ClientError> {
    let way = answer.way;
    let bytes = read(checked(answer)?)?;
    serde_json::from_slice(&bytes).map_err(|e| way.protocol(parse_error(&e)))
}

fn read(Answer { response, way }: Answer<'_>) -> Result<Vec<u8>, ClientError> {
    let body = response.into_body().into_with_config().limit(MAX_BODY);
    body.read_to_vec()
        .map_err(|e| ClientError::from_ureq(way.place(), e))
}

fn image_path(
    digest: &berth_image::Digest,
    platform: &berth_image::Platform,
    what: &str,
) -> String {
    format!("/v1/images/{digest}/{what}?platform={platform}")
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
                    why: parse_error(&e),
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
