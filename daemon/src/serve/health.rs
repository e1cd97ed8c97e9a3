//! Whether the daemon lives, can work, and what it counts.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use berth_client::api::Status;
use berth_image::Store;

use super::{Answer, App};

/// How long the store may take to answer: a parallel filesystem whose servers are away blocks for minutes.
const STORE: Duration = Duration::from_secs(3);

/// The daemon runs.
#[utoipa::path(get, path = "/healthz", tag = "health", responses((status = 200, body = String)))]
pub(super) async fn alive() -> &'static str {
    "alive\n"
}

/// The daemon can make images: catalogue, store and sealer answer. Else 503 and a line for each that does not.
#[utoipa::path(
    get,
    path = "/readyz",
    tag = "health",
    responses((status = 200, body = String), (status = 503, body = String))
)]
pub(super) async fn ready(State(app): State<Arc<App>>) -> Response {
    let mut wrong = String::new();
    let mut check = |what: &str, result: Result<(), String>| {
        if let Err(why) = result {
            wrong += &format!("{what}: {why}\n");
        }
    };
    check(
        "catalogue",
        app.catalogue.ping().await.map_err(|e| e.to_string()),
    );
    check("store", store(&app).await);
    let sealer = app.sealer.status().await;
    check("sealer", sealer.map(drop).map_err(|e| e.message));
    match wrong.is_empty() {
        true => "ready\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, wrong).into_response(),
    }
}

async fn store(app: &App) -> Result<(), String> {
    let (path, format) = (app.store.path().to_owned(), app.store.format().clone());
    let open = tokio::task::spawn_blocking(move || {
        Store::open(&path, Some(&format.uuid), Some(&format.owner)).map(drop)
    });
    match tokio::time::timeout(STORE, open).await {
        Ok(Ok(opened)) => opened.map_err(|e| e.to_string()),
        Ok(Err(e)) => Err(e.to_string()),
        Err(_) => Err(format!("no answer in {} seconds", STORE.as_secs())),
    }
}

/// Counters for Prometheus, as OpenMetrics text.
#[utoipa::path(get, path = "/metrics", tag = "health", responses((status = 200, body = String)))]
pub(super) async fn metrics(State(app): State<Arc<App>>) -> Response {
    // What cannot be counted now keeps its last value.
    if let Ok((images, bytes)) = app.catalogue.image_totals().await {
        app.metrics.images.set(images as i64);
        app.metrics.image_bytes.set(bytes as i64);
    }
    if let Ok(bytes) = app.fetcher.spool_bytes() {
        app.metrics.spool_bytes.set(bytes as i64);
    }
    let kind = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    ([(header::CONTENT_TYPE, kind)], app.metrics.text()).into_response()
}

/// This description.
#[utoipa::path(get, path = "/openapi.json", tag = "health", responses((status = 200, body = Object)))]
pub(super) async fn description() -> Response {
    Json(super::openapi()).into_response()
}

/// The daemon, as it sees itself.
#[utoipa::path(get, path = "/v1/status", tag = "health", responses((status = 200, body = Status)))]
pub(super) async fn status(State(app): State<Arc<App>>) -> Answer<Status> {
    let (images, image_bytes) = app.catalogue.image_totals().await?;
    let sealer = match app.sealer.status().await {
        Ok(s) => format!("up, key {}", s.key_id.chars().take(16).collect::<String>()),
        Err(e) => format!("down: {}", e.message),
    };
    Ok(Json(Status {
        version: env!("CARGO_PKG_VERSION").into(),
        started_at: app.started_at.to_string(),
        store: app.store.path().display().to_string(),
        store_uuid: app.store.format().uuid.clone(),
        images,
        image_bytes,
        pulls_in_flight: app.pulls.in_flight() as u64,
        spool_bytes: app.fetcher.spool_bytes().unwrap_or_default(),
        upstream_bytes: app.metrics.upstream_bytes.get(),
        conversions: app.metrics.conversions.get(),
        sealer,
    }))
}
