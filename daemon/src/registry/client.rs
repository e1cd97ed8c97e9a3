//! One registry: a request with authorization and redirects, tried once. Retrying is the caller's, because a blob's
//! retry continues where the last try broke off.
//!
//! Redirects are followed here and not by the HTTP library: `Authorization` goes to the registry itself and to no
//! other origin, and https is never left for http.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use berth_config::{Network, RegistrySite};
use reqwest::header::{
    AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE,
};
use reqwest::{Client, Method, Response, StatusCode, Url};

use super::auth::Auth;
use super::challenge;
use super::credentials::Credential;
use super::error::RegistryError;
use super::guard::{Guard, forbidden};
use super::retry;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_REDIRECTS: usize = 5;

/// A registry that the daemon talks to.
#[derive(Debug)]
pub struct Registry {
    host: String,
    /// Where the API really is (Docker Hub's lies elsewhere than its name says).
    endpoint: String,
    http: Client,
    auth: Auth,
    guard: Guard,
    plain: AtomicBool,
    /// A loopback registry of which nobody said whether it speaks TLS.
    may_be_plain: bool,
    pub(super) stall: Duration,
}

/// One request below `/v2/REPOSITORY/`.
#[derive(Debug, Clone)]
pub(super) struct Call<'a> {
    pub method: Method,
    pub repository: &'a str,
    /// `manifests/NAME` or `blobs/DIGEST`.
    pub path: String,
    pub headers: HeaderMap,
}

impl Registry {
    /// Sets up what is needed to talk to `host`; sends nothing.
    pub(super) fn open(
        host: &str,
        site: Option<&RegistrySite>,
        networks: &[Network],
        stall: Duration,
    ) -> Result<Self, RegistryError> {
        let trusted = site.is_some();
        let default = RegistrySite::default();
        let site = site.unwrap_or(&default);
        let set_up = |why: String| RegistryError::SetUp {
            host: host.into(),
            why,
        };
        let credential = match &site.credentials {
            Some(path) => Credential::load(path, host).map_err(set_up)?,
            None => Credential::Anonymous,
        };
        let loopback = is_loopback(host);
        let endpoint = match host {
            "docker.io" => "registry-1.docker.io",
            other => other,
        };
        let guard = Guard::new(networks, trusted.then(|| name_of(endpoint)));
        let mut builder = Client::builder()
            .user_agent(concat!("berth/", env!("CARGO_PKG_VERSION")))
            .redirect(reqwest::redirect::Policy::none())
            .connect_timeout(CONNECT_TIMEOUT)
            .dns_resolver(guard.clone())
            .pool_idle_timeout(Duration::from_secs(60));
        if loopback {
            builder = builder.no_proxy();
        }
        if let Some(path) = &site.ca {
            let pem = std::fs::read(path)
                .map_err(|e| set_up(format!("cannot read ca `{}`: {e}", path.display())))?;
            let certificates = reqwest::Certificate::from_pem_bundle(&pem)
                .map_err(|_| set_up(format!("`{}` holds no PEM certificates", path.display())))?;
            builder = builder.tls_certs_merge(certificates);
        } else if site.plain_http {
            // No machine needs the system's certificates to speak plain HTTP.
            builder = builder.tls_certs_only([]);
        }
        let http = builder.build().map_err(|e| set_up(cause(&e)))?;
        Ok(Self {
            host: host.into(),
            endpoint: endpoint.into(),
            http,
            auth: Auth::new(host, credential, guard.clone(), stall),
            guard,
            plain: AtomicBool::new(site.plain_http),
            may_be_plain: loopback && !site.plain_http && site.ca.is_none(),
            stall,
        })
    }

    pub fn host(&self) -> &str {
        &self.host
    }

    /// Who the registry sees in us, without any secret.
    pub fn credential(&self) -> String {
        self.auth.credential.to_string()
    }

    /// Sends `call` once, answering a challenge and following redirects. An answer that is returned is a success.
    pub(super) async fn call(&self, call: &Call<'_>) -> Result<Response, RegistryError> {
        let mut authorization = self.auth.kept(call.repository).await;
        let mut challenged = false;
        loop {
            let url = self.url(call)?;
            let sent = self.follow(call, url.clone(), authorization.clone()).await;
            let response = match sent {
                Err(RegistryError::Unreachable { .. })
                    if self.may_be_plain && !self.plain.swap(true, Ordering::Relaxed) =>
                {
                    continue;
                }
                Err(e) => {
                    if self.may_be_plain {
                        self.plain.store(false, Ordering::Relaxed);
                    }
                    return Err(e);
                }
                Ok(response) => response,
            };
            let ours = same_origin(response.url(), &url);
            if ours && response.status() == StatusCode::UNAUTHORIZED && !challenged {
                challenged = true;
                let wanted = response.headers().get_all(WWW_AUTHENTICATE);
                let wanted = challenge::choose(wanted.iter().filter_map(|v| v.to_str().ok()));
                if let Some(wanted) = wanted {
                    let refused = authorization.as_ref();
                    authorization = (self.auth)
                        .answer(&self.http, &wanted, call.repository, refused, &url)
                        .await?;
                    if authorization.is_some() {
                        continue;
                    }
                }
            }
            return self.judge(call, response, ours);
        }
    }

    fn url(&self, call: &Call<'_>) -> Result<Url, RegistryError> {
        let scheme = match self.plain.load(Ordering::Relaxed) {
            true => "http",
            false => "https",
        };
        let text = format!(
            "{scheme}://{}/v2/{}/{}",
            self.endpoint, call.repository, call.path
        );
        Url::parse(&text).map_err(|e| RegistryError::Protocol {
            host: self.host.clone(),
            why: e.to_string(),
        })
    }

    async fn follow(
        &self,
        call: &Call<'_>,
        first: Url,
        authorization: Option<HeaderValue>,
    ) -> Result<Response, RegistryError> {
        let mut url = first.clone();
        for _ in 0..=MAX_REDIRECTS {
            self.guard.check(&url)?;
            let mut request = self
                .http
                .request(call.method.clone(), url.clone())
                .headers(call.headers.clone());
            if let Some(value) = &authorization
                && same_origin(&url, &first)
            {
                request = request.header(AUTHORIZATION, value.clone());
            }
            let response = match tokio::time::timeout(self.stall, request.send()).await {
                Err(_) => {
                    return Err(RegistryError::Stalled {
                        url: shown(&url),
                        after: self.stall,
                    });
                }
                Ok(Err(e)) if e.is_connect() => {
                    if let Some(refused) = forbidden(&e) {
                        return Err(refused.into());
                    }
                    return Err(RegistryError::Unreachable {
                        host: match url.host_str() {
                            Some(other) if !same_origin(&url, &first) => other.into(),
                            _ => self.host.clone(),
                        },
                        why: cause(&e),
                    });
                }
                Ok(Err(e)) => {
                    return Err(RegistryError::Broken {
                        url: shown(&url),
                        why: cause(&e),
                    });
                }
                Ok(Ok(response)) => response,
            };
            if !matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308) {
                return Ok(response);
            }
            let target = response.headers().get(LOCATION);
            let target = target.and_then(|l| url.join(l.to_str().ok()?).ok());
            let next = target.filter(|t| matches!(t.scheme(), "http" | "https"));
            let next = next.ok_or_else(|| self.protocol("it redirects to nowhere"))?;
            if url.scheme() == "https" && next.scheme() == "http" {
                return Err(self.protocol("it redirects from https to http"));
            }
            url = next;
        }
        Err(self.protocol("it redirects in circles"))
    }

    fn judge(
        &self,
        call: &Call<'_>,
        response: Response,
        ours: bool,
    ) -> Result<Response, RegistryError> {
        let status = response.status();
        if status.is_success() {
            return Ok(response);
        }
        Err(match status.as_u16() {
            // A storage host behind a redirect: its link has ended, a new one will do.
            401 | 403 if !ours => RegistryError::Broken {
                url: shown(response.url()),
                why: format!("it answered {}", status.as_u16()),
            },
            code @ (401 | 403) => RegistryError::Refused {
                host: self.host.clone(),
                repository: call.repository.into(),
                status: code,
                credential: self.auth.credential.to_string(),
            },
            404 => {
                let (host, repository) = (self.host.clone(), call.repository);
                match call.path.split_once('/') {
                    Some(("manifests", digest)) if digest.contains(':') => {
                        RegistryError::NotFound {
                            host,
                            what: format!("{repository}@{digest}"),
                        }
                    }
                    Some(("manifests", tag)) => RegistryError::NotFound {
                        host,
                        what: format!("{repository}:{tag}"),
                    },
                    Some(("blobs", blob)) => RegistryError::NoBlob {
                        host,
                        repository: repository.into(),
                        blob: blob.into(),
                    },
                    _ => RegistryError::NotFound {
                        host,
                        what: format!("{repository}/{}", call.path),
                    },
                }
            }
            code => RegistryError::Status {
                host: self.host.clone(),
                method: call.method.to_string(),
                url: shown(response.url()),
                status: code,
                retry_after: retry_after(&response),
            },
        })
    }

    pub(super) fn protocol(&self, why: impl Into<String>) -> RegistryError {
        RegistryError::Protocol {
            host: self.host.clone(),
            why: why.into(),
        }
    }
}

/// Reads a body of at most `limit` bytes, with at most `stall` between two pieces.
pub(super) async fn read_limited(
    mut response: Response,
    limit: u64,
    stall: Duration,
) -> Result<Vec<u8>, RegistryError> {
    let url = shown(response.url());
    if response.content_length().is_some_and(|l| l > limit) {
        return Err(RegistryError::TooLarge { url, limit });
    }
    let mut body = Vec::new();
    loop {
        let piece = tokio::time::timeout(stall, response.chunk()).await;
        let piece = piece.map_err(|_| RegistryError::Stalled {
            url: url.clone(),
            after: stall,
        })?;
        let piece = piece.map_err(|e| RegistryError::Broken {
            url: url.clone(),
            why: cause(&e),
        })?;
        let Some(piece) = piece else {
            return Ok(body);
        };
        if (body.len() + piece.len()) as u64 > limit {
            return Err(RegistryError::TooLarge { url, limit });
        }
        body.extend_from_slice(&piece);
    }
}

pub(super) fn retry_after(response: &Response) -> Option<Duration> {
    let value = response.headers().get(RETRY_AFTER)?;
    Some(retry::parse_retry_after(value.to_str().unwrap_or_default()))
}

/// A URL for people: without query (signed links are secrets) and user part.
pub(super) fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    // These fail only for URLs that cannot have a user part.
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.to_string()
}

/// The innermost reason of a failed request, without URL.
pub(super) fn cause(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(inner) = cause.source() {
        cause = inner;
    }
    let text = cause.to_string();
    text.lines().next().unwrap_or_default().to_owned()
}

fn same_origin(a: &Url, b: &Url) -> bool {
    a.origin() == b.origin()
}

/// A host without its port and brackets.
fn name_of(host: &str) -> &str {
    let name = match host.rsplit_once(':') {
        Some((name, port)) if port.bytes().all(|b| b.is_ascii_digit()) => name,
        _ => host,
    };
    name.trim_matches(['[', ']'])
}

fn is_loopback(host: &str) -> bool {
    let name = name_of(host);
    name == "localhost"
        || name
            .parse::<std::net::IpAddr>()
            .is_ok_and(|a| a.is_loopback())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_known_in_every_spelling() {
        for host in [
            "localhost",
            "localhost:5000",
            "127.0.0.1:5000",
            "127.9.9.9",
            "[::1]:5000",
        ] {
            assert!(is_loopback(host), "{host}");
        }
        for host in [
            "localhost.example",
            "10.0.0.1:5000",
            "[::2]",
            "127.0.0.1.example",
        ] {
            assert!(!is_loopback(host), "{host}");
        }
    }

    #[test]
    fn a_url_is_shown_without_its_secrets() {
        let url = Url::parse("https://u:p@s3.example/blob?X-Signature=abc#f").unwrap();
        assert_eq!(shown(&url), "https://s3.example/blob");
    }
}
