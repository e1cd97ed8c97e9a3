//! A registry in this process, for tests, that can misbehave in every way that was seen in real ones.

use std::collections::{HashMap, VecDeque};
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::any;
use base64::Engine as _;
use berth_image::Digest;
use futures_util::{StreamExt as _, stream};
use tokio::sync::watch;

/// What goes wrong with one request.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// This status, with a `Retry-After`.
    Status(u16, Option<&'static str>),
    /// The connection ends after so many bytes.
    Truncate(usize),
    /// The right length, the wrong bytes.
    Corrupt,
    /// `302` to this URL, `PATH` in it replaced by the request's path.
    Redirect(String),
    /// Half of the body, and the rest when [`TestRegistry::release`] is called.
    Hold,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Seen {
    pub method: String,
    pub path: String,
    pub authorization: Option<String>,
    pub range: Option<String>,
}

#[derive(Debug, Default)]
struct Shared {
    /// By path: media type and bytes.
    content: Mutex<HashMap<String, (String, Bytes)>>,
    faults: Mutex<HashMap<String, VecDeque<Fault>>>,
    seen: Mutex<Vec<Seen>>,
    /// `user:password` without which nothing is shown; then tokens are `token-1`, `token-2`, …
    login: Mutex<Option<String>>,
    basic: Mutex<bool>,
    no_range: Mutex<bool>,
    tokens: Mutex<u32>,
    held: watch::Sender<bool>,
    address: Mutex<Option<SocketAddr>>,
}

pub(crate) struct TestRegistry {
    shared: Arc<Shared>,
    pub address: SocketAddr,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for TestRegistry {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// An image as [`TestRegistry::push`] made it.
#[derive(Debug, Clone)]
pub(crate) struct TestImage {
    pub digest: Digest,
    /// Base first.
    pub layers: Vec<Digest>,
}

impl TestRegistry {
    pub(crate) async fn start() -> Self {
        let shared = Arc::new(Shared::default());
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        *shared.address.lock().unwrap() = Some(address);
        let app = Router::new()
            .route("/token", any(token))
            .route("/{*path}", any(answer))
            .with_state(shared.clone());
        let task = tokio::spawn(async move { axum::serve(listener, app).await.unwrap() });
        Self {
            shared,
            address,
            task,
        }
    }

    pub(crate) fn host(&self) -> String {
        self.address.to_string()
    }

    pub(crate) fn put(&self, path: &str, media_type: &str, bytes: impl Into<Bytes>) {
        let mut content = self.shared.content.lock().unwrap();
        content.insert(path.into(), (media_type.into(), bytes.into()));
    }

    pub(crate) fn remove(&self, path: &str) {
        self.shared.content.lock().unwrap().remove(path);
    }

    pub(crate) fn put_blob(&self, repository: &str, bytes: impl Into<Bytes>) -> Digest {
        let bytes = bytes.into();
        let digest = Digest::of(&bytes);
        self.put(
            &format!("/v2/{repository}/blobs/{digest}"),
            "application/octet-stream",
            bytes,
        );
        digest
    }

    pub(crate) fn put_manifest(
        &self,
        repository: &str,
        tag: &str,
        media_type: &str,
        text: &str,
    ) -> Digest {
        let digest = Digest::of(text.as_bytes());
        for name in [tag, &digest.to_string()] {
            self.put(
                &format!("/v2/{repository}/manifests/{name}"),
                media_type,
                text.to_owned(),
            );
        }
        digest
    }

    /// Pushes an image of the given layers, which need not be archives.
    pub(crate) fn push(&self, repository: &str, tag: &str, layers: &[&[u8]]) -> TestImage {
        let config =
            r#"{"os":"linux","architecture":"ARCH","rootfs":{"type":"layers","diff_ids":[]}}"#
                .replace("ARCH", berth_image::Platform::host().architecture());
        let layer_type = "application/vnd.oci.image.layer.v1.tar+gzip";
        let descriptor = |media_type: &str, bytes: &[u8]| {
            format!(
                r#"{{"mediaType":"{media_type}","digest":"{}","size":{}}}"#,
                Digest::of(bytes),
                bytes.len()
            )
        };
        let listed: Vec<String> = layers.iter().map(|l| descriptor(layer_type, l)).collect();
        let manifest = format!(
            r#"{{"schemaVersion":2,"mediaType":"{}","config":{},"layers":[{}]}}"#,
            crate::resolve::manifest::OCI_MANIFEST,
            descriptor(
                "application/vnd.oci.image.config.v1+json",
                config.as_bytes()
            ),
            listed.join(",")
        );
        self.put_blob(repository, config.clone());
        TestImage {
            digest: self.put_manifest(
                repository,
                tag,
                crate::resolve::manifest::OCI_MANIFEST,
                &manifest,
            ),
            layers: layers
                .iter()
                .map(|l| self.put_blob(repository, l.to_vec()))
                .collect(),
        }
    }

    /// What goes wrong with the next requests for `path`, one each.
    pub(crate) fn fault(&self, path: impl Into<String>, faults: impl IntoIterator<Item = Fault>) {
        let mut all = self.shared.faults.lock().unwrap();
        all.entry(path.into()).or_default().extend(faults);
    }

    pub(crate) fn want_login(&self, login: &str, basic: bool) {
        *self.shared.login.lock().unwrap() = Some(login.into());
        *self.shared.basic.lock().unwrap() = basic;
    }

    pub(crate) fn forget_ranges(&self) {
        *self.shared.no_range.lock().unwrap() = true;
    }

    pub(crate) fn release(&self) {
        self.shared.held.send_replace(true);
    }

    pub(crate) fn seen(&self) -> Vec<Seen> {
        self.shared.seen.lock().unwrap().clone()
    }

    /// How often `method` was asked of paths that end with `end`.
    pub(crate) fn count(&self, method: &str, end: &str) -> usize {
        let seen = self.seen();
        seen.iter()
            .filter(|s| s.method == method && s.path.ends_with(end))
            .count()
    }
}

async fn token(
    State(shared): State<Arc<Shared>>,
    headers: HeaderMap,
    request: Request,
) -> Response {
    record(&shared, &request);
    let login = shared.login.lock().unwrap().clone().unwrap_or_default();
    let wanted = format!(
        "Basic {}",
        base64::engine::general_purpose::STANDARD.encode(&login)
    );
    if !login.is_empty() && text(&headers, "authorization") != Some(wanted) {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let mut tokens = shared.tokens.lock().unwrap();
    *tokens += 1;
    format!(r#"{{"token":"token-{tokens}","expires_in":300}}"#).into_response()
}

async fn answer(
    State(shared): State<Arc<Shared>>,
    Path(_): Path<String>,
    request: Request,
) -> Response {
    record(&shared, &request);
    let path = request.uri().path().to_owned();
    let headers = request.headers();
    if let Some(refusal) = refuse(&shared, headers) {
        return refusal;
    }
    let fault = shared
        .faults
        .lock()
        .unwrap()
        .get_mut(&path)
        .and_then(VecDeque::pop_front);
    match &fault {
        Some(Fault::Status(code, after)) => {
            let mut response = StatusCode::from_u16(*code).unwrap().into_response();
            if let Some(after) = after {
                response
                    .headers_mut()
                    .insert("retry-after", after.parse().unwrap());
            }
            return response;
        }
        Some(Fault::Redirect(to)) => {
            let to = to.replace("PATH", &path);
            return (StatusCode::FOUND, [(header::LOCATION, to)]).into_response();
        }
        _ => {}
    }
    let Some((media_type, bytes)) = shared.content.lock().unwrap().get(&path).cloned() else {
        return StatusCode::NOT_FOUND.into_response();
    };
    let whole = bytes.len();
    let start = text(headers, "range")
        .filter(|_| !*shared.no_range.lock().unwrap())
        .and_then(|r| {
            r.strip_prefix("bytes=")?
                .strip_suffix('-')?
                .parse::<usize>()
                .ok()
        });
    let digest = Digest::of(&bytes).to_string();
    let mut bytes = bytes.slice(start.unwrap_or(0)..);
    if matches!(fault, Some(Fault::Corrupt)) {
        bytes = Bytes::from(bytes.iter().map(|b| b ^ 1).collect::<Vec<u8>>());
    }
    let mut builder = Response::builder()
        .header("content-type", media_type)
        .header("content-length", bytes.len());
    if path.contains("/manifests/") && !matches!(fault, Some(Fault::Corrupt)) {
        builder = builder.header("docker-content-digest", digest);
    }
    if let Some(start) = start {
        builder = builder.status(StatusCode::PARTIAL_CONTENT).header(
            "content-range",
            format!("bytes {start}-{}/{whole}", whole - 1),
        );
    }
    let body = match fault {
        _ if request.method() == Method::HEAD => Body::empty(),
        Some(Fault::Truncate(at)) => {
            // The server sends what it has when the body is not ready.
            let cut = async {
                tokio::task::yield_now().await;
                Err(std::io::Error::other("cut"))
            };
            in_two(bytes.slice(..at), cut)
        }
        Some(Fault::Hold) => {
            let (half, mut held) = (bytes.len() / 2, shared.held.subscribe());
            let rest = bytes.slice(half..);
            let rest = async move {
                held.wait_for(|free| *free).await.unwrap();
                Ok(rest)
            };
            in_two(bytes.slice(..half), rest)
        }
        _ => Body::from(bytes),
    };
    builder.body(body).unwrap()
}

fn in_two(
    first: Bytes,
    then: impl Future<Output = std::io::Result<Bytes>> + Send + 'static,
) -> Body {
    let first = stream::once(std::future::ready(Ok(first)));
    Body::from_stream(first.chain(stream::once(then)))
}

fn refuse(shared: &Shared, headers: &HeaderMap) -> Option<Response> {
    let login = shared.login.lock().unwrap().clone()?;
    let address = shared.address.lock().unwrap().unwrap();
    let shown = text(headers, "authorization").unwrap_or_default();
    let basic = *shared.basic.lock().unwrap();
    let good = if basic {
        shown
            == format!(
                "Basic {}",
                base64::engine::general_purpose::STANDARD.encode(login)
            )
    } else {
        shown.starts_with("Bearer token-")
    };
    if good {
        return None;
    }
    let challenge = match basic {
        true => "Basic realm=\"test\"".to_owned(),
        false => format!("Bearer realm=\"http://{address}/token\",service=\"test\""),
    };
    Some(
        (
            StatusCode::UNAUTHORIZED,
            [(header::WWW_AUTHENTICATE, challenge)],
        )
            .into_response(),
    )
}

fn record(shared: &Shared, request: &Request) {
    let seen = Seen {
        method: request.method().to_string(),
        path: request.uri().path().into(),
        authorization: text(request.headers(), "authorization"),
        range: text(request.headers(), "range"),
    };
    shared.seen.lock().unwrap().push(seen);
}

fn text(headers: &HeaderMap, name: &str) -> Option<String> {
    Some(headers.get(name)?.to_str().ok()?.to_owned())
}
