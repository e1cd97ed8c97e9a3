//! Stage six and the daemon's face: the HTTP API, version 1 (types in `berth_client::api`).
//!
//! `/healthz`, `/readyz`, `/metrics` and `/openapi.json` are open; everything below `/v1` knows who asks ([`auth`]).

mod auth;
mod data;
mod error;
mod grants;
mod health;
#[cfg(test)]
mod image_tests;
mod images;
mod limit;
mod pace;
mod pins;
mod pulls;
mod readers;
mod resolve;
#[cfg(test)]
mod several_tests;
mod shares;
mod socket;
#[cfg(test)]
mod tests;
mod traces;
mod turns;

use std::path::Path;
use std::sync::Arc;

use axum::extract::{DefaultBodyLimit, FromRequest, MatchedPath, Request, State};
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::{Json, Router};
use berth_client::Munge;
use berth_client::api::{ErrorBody, ErrorKind};
use berth_config::Config;
use berth_image::shown::parse_error;
use berth_image::{ImageRef, Platform, Store, layout};
use jiff::Timestamp;
use serde::de::DeserializeOwned;
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::catalogue::{Catalogue, ImageRow, Present};
use crate::fetch::Fetcher;
use crate::metrics::{Metrics, RequestLabels};
use crate::pulls::Pulls;
use crate::resolve::Resolver;
use crate::sealer::Sealer;

pub use auth::Caller;
pub use data::Serving;
use error::ApiError;
pub use socket::{SocketError, listen_unix};

/// What the handlers work with.
#[derive(Debug)]
pub struct App {
    pub config: Arc<Config>,
    pub store: Arc<Store>,
    pub catalogue: Catalogue,
    pub present: Present,
    pub resolver: Resolver,
    pub fetcher: Fetcher,
    pub pulls: Pulls,
    pub sealer: Sealer,
    pub metrics: Arc<Metrics>,
    pub serving: Serving,
    pub started_at: Timestamp,
    /// The lock on the state folder.
    pub(crate) _lock: std::fs::File,
}

/// What a reference in a request means.
enum Subject {
    Named(ImageRef),
    /// A path that `berth path` printed: only the digest is taken from it, and looked up anew.
    Stored(Box<ImageRow>),
}

impl App {
    fn caller(&self, uid: u32) -> Caller {
        Caller {
            uid,
            is_admin: uid == 0 || self.config.daemon.admin_uids.contains(&uid),
        }
    }

    async fn subject(&self, text: &str) -> Result<Subject, ApiError> {
        if let Some((manifest, platform)) =
            layout::parse_data_path(self.store.path(), Path::new(text))
        {
            let image = self.present.image(&manifest, &platform).await?;
            let image = image.ok_or_else(|| {
                ApiError::new(
                    ErrorKind::NotFound,
                    format!("image {manifest} is not in the store"),
                )
            })?;
            return Ok(Subject::Stored(Box::new(image)));
        }
        let reference = ImageRef::parse(text, self.config.default_registry.as_deref());
        reference
            .map(Subject::Named)
            .map_err(|e| ApiError::new(ErrorKind::BadReference, e.to_string()))
    }
}

fn platform(text: Option<&str>) -> Result<Platform, ApiError> {
    match text {
        None => Ok(Platform::host()),
        Some(text) => text
            .parse()
            .map_err(|e: berth_image::platform::PlatformError| {
                ApiError::new(ErrorKind::BadRequest, e.to_string())
            }),
    }
}

/// A JSON body, whose errors have our form.
struct Body<T>(T);

impl<T: DeserializeOwned, S: Send + Sync> FromRequest<S> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        let bytes = axum::body::Bytes::from_request(request, state)
            .await
            .map_err(|e| ApiError::new(ErrorKind::BadRequest, e.body_text()))?;
        serde_json::from_slice(&bytes).map(Self).map_err(|e| {
            ApiError::new(
                ErrorKind::BadRequest,
                format!("the body is not right: {}", parse_error(&e)),
            )
        })
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "Berth's daemon",
        description = "Container images for clusters: pulled once, sealed, mounted by nodes. On the Unix socket the \
            kernel says who asks; on TCP `Authorization: Munge CREDENTIAL` does, whose payload is the lowercase hex \
            SHA-256 of `METHOD\\nPATH?QUERY\\nhex(sha256(body))\\n`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0")
    ),
    components(schemas(berth_client::api::ErrorAnswer, ErrorBody, ErrorKind))
)]
struct Description;

fn v1() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(pulls::start, pulls::list))
        .routes(routes!(pulls::get))
        .routes(routes!(pulls::events))
        .routes(routes!(resolve::resolve))
        .routes(routes!(pins::pin))
        .routes(routes!(images::list))
        .routes(routes!(images::get, images::remove))
        .routes(routes!(grants::grant))
        .routes(routes!(health::status))
}

/// What may be read with a grant, too.
fn granted() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(data::data))
        .routes(routes!(data::record))
        .routes(routes!(traces::get, traces::put))
}

fn open() -> OpenApiRouter<Arc<App>> {
    OpenApiRouter::new()
        .routes(routes!(health::alive))
        .routes(routes!(health::ready))
        .routes(routes!(health::metrics))
        .routes(routes!(health::description))
}

/// The API's OpenAPI description.
pub fn openapi() -> utoipa::openapi::OpenApi {
    OpenApiRouter::with_openapi(Description::openapi())
        .merge(v1())
        .merge(granted())
        .merge(open())
        .into_openapi()
}

/// The API on the Unix socket.
pub fn unix_router(app: Arc<App>) -> Router {
    let v1 = v1().split_for_parts().0;
    let granted = granted().split_for_parts().0;
    let state = app.clone();
    let granted = granted.layer(middleware::from_fn_with_state(
        state,
        auth::by_grant_or_peer,
    ));
    let state = app.clone();
    let v1 = v1.layer(middleware::from_fn_with_state(state, auth::by_peer));
    finish(app, v1.merge(granted))
}

/// The API on TCP.
pub fn tcp_router(app: Arc<App>, munge: Arc<Munge>) -> Router {
    let v1 = v1().split_for_parts().0;
    let granted = granted().split_for_parts().0;
    let state = (app.clone(), munge);
    let by_grant = middleware::from_fn_with_state(state.clone(), auth::by_grant_or_munge);
    let by_munge = middleware::from_fn_with_state(state, auth::by_munge);
    finish(app, v1.layer(by_munge).merge(granted.layer(by_grant)))
}

fn finish(app: Arc<App>, v1: Router<Arc<App>>) -> Router {
    v1.merge(open().split_for_parts().0)
        .layer(middleware::from_fn_with_state(app.clone(), count))
        .layer(DefaultBodyLimit::max(limit::MAX_BODY))
        .fallback(|| async { ApiError::new(ErrorKind::NotFound, "there is nothing here") })
        .with_state(app)
}

async fn count(State(app): State<Arc<App>>, request: Request, next: Next) -> Response {
    let route = request.extensions().get::<MatchedPath>();
    let route = route.map_or_else(|| "none".to_owned(), |r| r.as_str().to_owned());
    // A stranger's own methods would be labels without end.
    let method = match request.method().as_str() {
        m @ ("GET" | "POST" | "DELETE" | "HEAD") => m.to_owned(),
        _ => "other".to_owned(),
    };
    let response = next.run(request).await;
    let labels = RequestLabels {
        method,
        route,
        status: response.status().as_u16(),
    };
    app.metrics.requests.get_or_create(&labels).inc();
    response
}

/// Serves until `stop`; then ends what is idle at once, and long polls and events with their next news.
pub async fn serve_unix(
    listener: tokio::net::UnixListener,
    app: Arc<App>,
    stop: tokio_util::sync::CancellationToken,
) -> std::io::Result<()> {
    let service = unix_router(app).into_make_service_with_connect_info::<auth::Peer>();
    axum::serve(limit::Limited::new(listener), service)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
}

/// As [`serve_unix`], on TCP.
pub async fn serve_tcp(
    listener: tokio::net::TcpListener,
    app: Arc<App>,
    munge: Arc<Munge>,
    stop: tokio_util::sync::CancellationToken,
) -> std::io::Result<()> {
    let service = tcp_router(app, munge).into_make_service_with_connect_info::<auth::Remote>();
    axum::serve(limit::Limited::new(listener), service)
        .with_graceful_shutdown(stop.cancelled_owned())
        .await
}

type Answer<T> = Result<Json<T>, ApiError>;
