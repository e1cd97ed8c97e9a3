//! The way to one daemon: a Unix socket or a URL, one connection a request.

use std::path::{Path, PathBuf};
use std::time::Duration;

use ureq::http::{Request, Response};
use ureq::unversioned::resolver::DefaultResolver;
use ureq::unversioned::transport::{ConnectionDetails, Connector, DefaultConnector};
use ureq::{Agent, Body};

use crate::error::ClientError;
use crate::munge::{Munge, request_payload};
use crate::unix::{NoResolver, UnixConnector};

const CONNECT: Duration = Duration::from_secs(5);
/// The whole of an ordinary call. Resolving may ask a far registry.
pub(crate) const CALL: Duration = Duration::from_secs(60);
/// An event stream is dead after so long without a byte; the daemon sends keep-alives more often.
const SILENCE: Duration = Duration::from_secs(60);

/// A request, for any daemon.
#[derive(Debug)]
pub(crate) struct Ask<'a> {
    pub(crate) method: &'a str,
    pub(crate) path: &'a str,
    /// JSON.
    pub(crate) body: Option<Vec<u8>>,
    /// Says who asks, where the way itself does not.
    pub(crate) signed: bool,
}

impl<'a> Ask<'a> {
    pub(crate) fn get(path: &'a str) -> Self {
        Self {
            method: "GET",
            path,
            body: None,
            signed: true,
        }
    }

    pub(crate) fn with(method: &'a str, path: &'a str, body: Option<Vec<u8>>) -> Self {
        Self {
            method,
            path,
            body,
            signed: true,
        }
    }

    /// Whether asking a second daemon does no harm where a first one may have done it: what is got, and all that is
    /// posted, which asks for a state (an image that is there, a pin that is held) and not for a change.
    pub(crate) fn may_repeat(&self) -> bool {
        matches!(self.method, "GET" | "POST")
    }
}

/// How long one try may take.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// The whole of it; without one only silence ends it.
    pub(crate) whole: Option<Duration>,
    /// Finding the daemon and connecting, where that is less than usual.
    pub(crate) connect: Option<Duration>,
}

/// What a daemon said, and which.
#[derive(Debug)]
pub(crate) struct Answer<'c> {
    pub(crate) response: Response<Body>,
    pub(crate) way: &'c Way,
}

/// Why a daemon said nothing.
#[derive(Debug)]
pub(crate) struct Silence {
    pub(crate) error: ClientError,
    /// It cannot have heard the request.
    pub(crate) unheard: bool,
}

impl From<ClientError> for Silence {
    fn from(error: ClientError) -> Self {
        Self {
            error,
            unheard: true,
        }
    }
}

#[derive(Debug)]
pub(crate) struct Way {
    agent: Agent,
    /// What stands before each path: `http://localhost` for a socket.
    base: String,
    /// How people call it, in errors.
    place: String,
    /// Set where a credential is needed: over TCP.
    munge: Option<MungeAt>,
}

#[derive(Debug)]
struct MungeAt(Option<PathBuf>);

impl Way {
    pub(crate) fn unix(socket: &Path) -> Self {
        let connector = Reaching(UnixConnector(socket.to_owned()));
        Self {
            agent: Agent::with_parts(agent_config(), connector, NoResolver),
            base: "http://localhost".into(),
            place: socket.display().to_string(),
            munge: None,
        }
    }

    pub(crate) fn tcp(url: &str, munge_socket: Option<&Path>) -> Self {
        #[cfg(feature = "tls")]
        if url.starts_with("https:") {
            // An error means that one is installed already.
            let _ = rustls::crypto::ring::default_provider().install_default();
        }
        let connector = Reaching(DefaultConnector::new());
        Self {
            agent: Agent::with_parts(agent_config(), connector, DefaultResolver::default()),
            base: url.trim_end_matches('/').to_owned(),
            place: url.to_owned(),
            munge: Some(MungeAt(munge_socket.map(Path::to_owned))),
        }
    }

    pub(crate) fn place(&self) -> &str {
        &self.place
    }

    /// A path as a node's image server is told it: a URL, or the path of the daemon's socket, `:` and the path.
    pub(crate) fn source(&self, path: &str) -> String {
        match self.munge {
            Some(_) => format!("{}{path}", self.base),
            None => format!("{}:{path}", self.place),
        }
    }

    pub(crate) fn protocol(&self, why: String) -> ClientError {
        ClientError::Protocol {
            place: self.place.clone(),
            why,
        }
    }

    pub(crate) fn ask(&self, ask: &Ask<'_>, limits: Limits) -> Result<Answer<'_>, Silence> {
        let mut request = Request::builder()
            .method(ask.method)
            .uri(format!("{}{}", self.base, ask.path));
        if ask.body.is_some() {
            request = request.header("content-type", "application/json");
        }
        let body = ask.body.clone().unwrap_or_default();
        if ask.signed
            && let Some(MungeAt(socket)) = &self.munge
        {
            // One for each daemon: a credential is taken once.
            let payload = request_payload(ask.method, ask.path, &body);
            let munge = Munge::load(socket.as_deref()).map_err(ClientError::from)?;
            let credential = munge.encode(payload.as_bytes());
            let credential = credential.map_err(ClientError::from)?;
            request = request.header("authorization", format!("Munge {credential}"));
        }
        let request = request.body(body);
        let request = request.map_err(|e| self.protocol(e.to_string()))?;
        let whole = limits.whole;
        let connect = limits.connect.unwrap_or(CONNECT).min(CONNECT);
        let configured = self
            .agent
            .configure_request(request)
            .timeout_global(whole)
            .timeout_resolve(limits.connect)
            .timeout_connect(Some(whole.map_or(connect, |whole| whole.min(connect))))
            .timeout_recv_response(Some(whole.unwrap_or(CALL)))
            .timeout_per_read(Some(whole.unwrap_or(SILENCE)))
            .build();
        match self.agent.run(configured) {
            Ok(response) => Ok(Answer {
                response,
                way: self,
            }),
            Err(error) => Err(self.silence(error)),
        }
    }

    fn silence(&self, error: ureq::Error) -> Silence {
        use ureq::{Error, Timeout};
        let (error, unheard) = match error {
            Error::Other(inner) => match inner.downcast::<Unreached>() {
                Ok(unreached) => (unreached.0, true),
                Err(other) => (Error::Other(other), false),
            },
            error => {
                let before = matches!(
                    error,
                    Error::HostNotFound | Error::Timeout(Timeout::Resolve)
                );
                (error, before)
            }
        };
        Silence {
            error: ClientError::from_ureq(&self.place, error),
            unheard,
        }
    }
}

/// Says of what fails while it connects that nobody was reached.
#[derive(Debug)]
struct Reaching<C>(C);

#[derive(Debug, thiserror::Error)]
#[error(transparent)]
struct Unreached(ureq::Error);

impl<C: Connector<()>> Connector<()> for Reaching<C> {
    type Out = C::Out;

    fn connect(
        &self,
        details: &ConnectionDetails,
        chained: Option<()>,
    ) -> Result<Option<C::Out>, ureq::Error> {
        let connected = self.0.connect(details, chained);
        connected.map_err(|error| ureq::Error::Other(Box::new(Unreached(error))))
    }
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
