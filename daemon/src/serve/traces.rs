//! `/v1/images/{digest}/trace`: which chunks of an image a start touches (docs/FORMATS.md, "Traces").
//!
//! Traces lie in the daemon's state folder, not in the store, where only the sealer writes: they are hints that users
//! made, and nothing is lost with them. The first one that a user sends stays; an admin's replaces it.

use std::io::{self, Read as _, Write as _};
use std::path::PathBuf;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use axum::{Extension, Json};
use berth_client::api::{ErrorAnswer, ErrorKind, TraceKept};
use berth_image::record::DataFile;
use berth_image::trace::{MAX_TRACE, Trace};
use berth_image::{Digest, Platform};

use super::data::{Which, wanted};
use super::error::ApiError;
use super::grants::Granted;
use super::{Answer, App, Caller};

/// Most traces kept; of more images than that the daemon has none.
const MOST: usize = 20_000;

fn path(app: &App, manifest: &Digest, platform: &Platform) -> PathBuf {
    let name = format!("{}-{}.json", manifest.hex(), platform.dashed());
    app.serving.traces.join(name)
}

/// What a start of this image touches, for nodes to fetch ahead.
#[utoipa::path(
    get,
    path = "/v1/images/{digest}/trace",
    tag = "images",
    params(
        ("digest" = String, Path, description = "Manifest digest, `sha256:…`"),
        ("platform" = Option<String>, Query, description = "`os/architecture[/variant]`")
    ),
    responses((status = 200, body = Object), (status = "4XX", body = ErrorAnswer))
)]
pub(super) async fn get(
    State(app): State<Arc<App>>,
    Path(digest): Path<String>,
    Query(which): Query<Which>,
    Extension(caller): Extension<Caller>,
    granted: Option<Extension<Granted>>,
) -> Result<Response, ApiError> {
    let granted = granted.as_ref().map(|granted| &granted.0);
    let image = wanted(&app, &digest, &which, &caller, granted).await?;
    let path = path(&app, &image.row.manifest, &image.row.platform);
    let file = image.record.file;
    let read = tokio::task::spawn_blocking(move || read(&path, &file));
    let read = read
        .await
        .map_err(|e| ApiError::new(ErrorKind::Internal, e.to_string()))?;
    match read {
        Ok(trace) => {
            let json = [(header::CONTENT_TYPE, "application/json")];
            Ok((json, trace.to_json()).into_response())
        }
        Err(_) => {
            let message = format!("there is no trace of {}", image.row.manifest);
            Err(ApiError::new(ErrorKind::NotFound, message))
        }
    }
}

/// A trace that a node recorded.
#[utoipa::path(
    put,
    path = "/v1/images/{digest}/trace",
    tag = "images",
    params(
        ("digest" = String, Path, description = "Manifest digest, `sha256:…`"),
        ("platform" = Option<String>, Query, description = "`os/architecture[/variant]`")
    ),
    request_body = Object,
    responses((status = 200, body = TraceKept), (status = "4XX", body = ErrorAnswer))
)]
pub(super) async fn put(
    State(app): State<Arc<App>>,
    Path(digest): Path<String>,
    Query(which): Query<Which>,
    Extension(caller): Extension<Caller>,
    granted: Option<Extension<Granted>>,
    text: Bytes,
) -> Answer<TraceKept> {
    let granted = granted.as_ref().map(|granted| &granted.0);
    let image = wanted(&app, &digest, &which, &caller, granted).await?;
    let file = image.record.file;
    let trace = Trace::from_json(&file.verity_root, file.hash_offset, &text)
        .map_err(|e| ApiError::new(ErrorKind::BadRequest, e.to_string()))?;
    let path = path(&app, &image.row.manifest, &image.row.platform);
    let kept = tokio::task::spawn_blocking(move || {
        let replace = caller.is_admin || read(&path, &file).is_err();
        keep(&path, &trace, replace)
    });
    let kept = kept
        .await
        .map_err(|e| ApiError::new(ErrorKind::Internal, e.to_string()))?
        .map_err(|e| ApiError::new(ErrorKind::Internal, e.to_string()))?;
    if kept {
        let (uid, digest) = (caller.uid, &image.row.manifest);
        tracing::info!(uid, %digest, "a trace is kept");
    }
    Ok(Json(TraceKept { kept }))
}

/// The trace that is kept, if it is one of this file: of an earlier conversion it would be another's.
fn read(path: &std::path::Path, file: &DataFile) -> io::Result<Trace> {
    let mut text = Vec::new();
    let opened = std::fs::File::open(path)?;
    opened.take(MAX_TRACE as u64 + 1).read_to_end(&mut text)?;
    Trace::from_json(&file.verity_root, file.hash_offset, &text).map_err(io::Error::other)
}

/// Writes a trace whole or not at all. `false` when there is one already, or too many.
fn keep(path: &std::path::Path, trace: &Trace, replace: bool) -> io::Result<bool> {
    let folder = path.parent().unwrap_or(std::path::Path::new("."));
    if !replace || std::fs::read_dir(folder)?.count() >= MOST {
        return Ok(false);
    }
    let mut random = [0u8; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let new = folder.join(format!("{:016x}.new", u64::from_le_bytes(random)));
    let written = std::fs::File::create_new(&new)
        .and_then(|mut file| file.write_all(trace.to_json().as_bytes()))
        .and_then(|()| std::fs::rename(&new, path));
    if written.is_err() {
        let _ = std::fs::remove_file(&new);
    }
    written.map(|()| true)
}

/// Forgets what is known of an image that was removed.
pub(super) fn forget(app: &App, manifest: &Digest, platform: &Platform) {
    // There may be none.
    let _ = std::fs::remove_file(path(app, manifest, platform));
}
