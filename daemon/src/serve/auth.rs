//! Who asks. On the Unix socket the kernel says so (SO_PEERCRED); on TCP munge does, by a credential that covers
//! method, path and body and that munged takes only once. Nobody asks on behalf of somebody else, but for who shows a
//! grant ([`super::grants`]): it reads one image in a user's place.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;

use axum::Json;
use axum::body::{Body, Bytes};
use axum::extract::connect_info::Connected;
use axum::extract::{ConnectInfo, Request, State};
use axum::http::StatusCode;
use axum::http::header::WWW_AUTHENTICATE;
use axum::middleware::Next;
use axum::response::{IntoResponse as _, Response};
use axum::serve::IncomingStream;
use berth_client::api::{ErrorAnswer, ErrorBody, ErrorKind};
use berth_client::{Munge, request_payload};
use serde::{Deserialize, Serialize};
use tokio::net::{TcpListener, UnixListener};

use super::App;
use super::limit::MAX_BODY;
use super::shares::Cut;

/// Who asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Caller {
    pub uid: u32,
    /// Root, or one of the site's admins.
    pub is_admin: bool,
}

/// The other end of a Unix connection, `None` when the kernel does not say, and what ends the connection.
#[derive(Debug, Clone)]
pub struct Peer(Option<u32>, Cut);

impl Connected<IncomingStream<'_, super::limit::Limited<UnixListener>>> for Peer {
    fn connect_info(stream: IncomingStream<'_, super::limit::Limited<UnixListener>>) -> Self {
        Self(stream.io().peer_uid(), stream.io().cut())
    }
}

/// From where somebody asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Place {
    /// The daemon's own machine.
    Here,
    Machine(IpAddr),
}

/// The other end of a TCP connection, and what ends it.
#[derive(Debug, Clone)]
pub struct Remote(Place, Cut);

impl Connected<IncomingStream<'_, super::limit::Limited<TcpListener>>> for Remote {
    fn connect_info(stream: IncomingStream<'_, super::limit::Limited<TcpListener>>) -> Self {
        let address: &SocketAddr = stream.remote_addr();
        Self(Place::of(address.ip()), stream.io().cut())
    }
}

/// Lets a request pass that shows a grant; one that shows none comes back.
async fn by_grant(
    app: &Arc<App>,
    (place, cut): (Place, Cut),
    mut request: Request,
    next: Next,
) -> Result<Response, (Request, Next)> {
    request.extensions_mut().insert(cut);
    let header = request.headers().get("authorization");
    let Some(grant) = header
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.strip_prefix("Berth-Grant "))
    else {
        return Err((request, next));
    };
    let now = jiff::Timestamp::now();
    match app.serving.grants.check(grant.trim(), place, now) {
        Ok(granted) => {
            // Whoever it was given to: what it opens is one image, not an admin's rights.
            let caller = Caller {
                uid: granted.uid,
                is_admin: false,
            };
            request.extensions_mut().insert(caller);
            request.extensions_mut().insert(granted);
            Ok(next.run(request).await)
        }
        Err(why) => Ok(refused(&format!("the grant is not good: {why}"), None).answer()),
    }
}

/// For what may be read with a grant, on the Unix socket.
pub async fn by_grant_or_peer(
    State(app): State<Arc<App>>,
    peer: ConnectInfo<Peer>,
    request: Request,
    next: Next,
) -> Response {
    match by_grant(&app, (Place::Here, peer.0.1.clone()), request, next).await {
        Ok(response) => response,
        Err((request, next)) => by_peer(State(app), peer, request, next).await,
    }
}

/// For what may be read with a grant, on TCP.
pub async fn by_grant_or_munge(
    State((app, munge)): State<(Arc<App>, Arc<Munge>)>,
    remote: ConnectInfo<Remote>,
    request: Request,
    next: Next,
) -> Response {
    match by_grant(&app, (remote.0.0, remote.0.1.clone()), request, next).await {
        Ok(response) => response,
        Err((request, next)) => by_munge(State((app, munge)), remote, request, next).await,
    }
}

/// For the Unix socket.
pub async fn by_peer(
    State(app): State<Arc<App>>,
    ConnectInfo(Peer(uid, _)): ConnectInfo<Peer>,
    mut request: Request,
    next: Next,
) -> Response {
    match uid {
        Some(uid) => {
            request.extensions_mut().insert(app.caller(uid));
            request.extensions_mut().insert(Place::Here);
            next.run(request).await
        }
        None => refused("the kernel does not say who asks", None).answer(),
    }
}

/// For TCP. A machine without libmunge refuses everybody there.
pub async fn by_munge(
    State((app, munge)): State<(Arc<App>, Arc<Munge>)>,
    ConnectInfo(Remote(place, _)): ConnectInfo<Remote>,
    request: Request,
    next: Next,
) -> Response {
    match check(&munge, request).await {
        Ok((uid, mut request)) => {
            request.extensions_mut().insert(app.caller(uid));
            request.extensions_mut().insert(place);
            next.run(request).await
        }
        Err(e) => e.answer(),
    }
}

/// Why it is not known who asks.
struct Unknown(ErrorBody);

impl Unknown {
    /// 401 (RFC 9110, section 15.5.2), whatever the kind says: other answers are for those who are known.
    fn answer(self) -> Response {
        let challenge = [(WWW_AUTHENTICATE, "Munge")];
        (
            StatusCode::UNAUTHORIZED,
            challenge,
            Json(ErrorAnswer { error: self.0 }),
        )
            .into_response()
    }
}

async fn check(munge: &Arc<Munge>, request: Request) -> Result<(u32, Request), Unknown> {
    let (parts, body) = request.into_parts();
    let credential = (parts.headers.get("authorization"))
        .and_then(|v| v.to_str().ok())
        .and_then(|v| v.strip_prefix("Munge "))
        .map(|v| v.trim().to_owned())
        .ok_or_else(|| refused("there is no munge credential in the request", None))?;
    let body: Bytes = axum::body::to_bytes(body, MAX_BODY)
        .await
        .map_err(|_| refused("the body cannot be read, or is too large", None))?;
    let path = parts.uri.path_and_query().map_or("/", |p| p.as_str());
    let expected = request_payload(parts.method.as_str(), path, &body);
    let munge = munge.clone();
    // munged is asked over a socket, by a library that waits.
    let decoded = tokio::task::spawn_blocking(move || munge.decode(&credential));
    let decoded = decoded
        .await
        .map_err(|e| refused(&e.to_string(), None))?
        .map_err(|e| {
            tracing::warn!(error = %e, "a credential was refused");
            refused(
                &format!("the credential is not good: {e}"),
                Some("are the clocks of both machines right, and their munge keys the same?"),
            )
        })?;
    if decoded.payload != expected.as_bytes() {
        return Err(refused("the credential is of another request", None));
    }
    Ok((decoded.uid, Request::from_parts(parts, Body::from(body))))
}

fn refused(message: &str, hint: Option<&str>) -> Unknown {
    Unknown(ErrorBody {
        kind: ErrorKind::Denied,
        message: message.into(),
        hint: hint.map(str::to_owned),
    })
}
