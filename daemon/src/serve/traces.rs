//! `/v1/images/{digest}/trace`: which chunks of an image a start touches (docs/FORMATS.md, "Traces").
//!
//! Traces lie in the daemon's state folder, not in the store, where only the sealer writes: they are hints that users
//! made, and nothing is lost with them. The one that a user sends stays for a day, so that nodes that start the same
//! image do not take turns; then another user's may take its place, so that a useless one does not stay for ever. An
//! admin's replaces any, and only an admin's replaces it.

use std::io::{self, Read as _, Write as _};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use axum::extract::{Path, Query, State};
use axum::http::header;
use axum::response::{IntoResponse as _, Response};
use axum::{Extension, Json};
use berth_client::api::{ErrorAnswer, ErrorKind, TraceKept};
use berth_image::record::DataFile;
use berth_image::trace::{MAX_TRACE, Trace};
use berth_image::{Digest, Platform};
use serde::{Deserialize, Serialize};

use super::data::{Which, wanted};
use super::error::ApiError;
use super::grants::Granted;
use super::{Answer, App, Caller};

/// Most traces kept; of more images than that the daemon has none.
const MOST: usize = 20_000;
/// How long a user's trace stays, whatever others send.
const STAYS: Duration = Duration::from_secs(24 * 3600);

/// A trace as it lies in its file, whose time of change is when it was kept.
#[derive(Debug, Serialize, Deserialize)]
struct Kept {
    uid: u32,
    by_admin: bool,
    trace: serde_json::Value,
}

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
        Ok((_, trace)) => {
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
    let kept = tokio::task::spawn_blocking(move || match read(&path, &file) {
        Ok((before, _)) if !may_replace(&before, age(&path)?, &caller) => Ok(false),
        _ => keep(&path, &trace, &caller),
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

/// Whether a trace so old gives way to the caller's.
fn may_replace(before: &Kept, age: Duration, caller: &Caller) -> bool {
    // Its own user's does not: it would stay for another day.
    caller.is_admin || !before.by_admin && before.uid != caller.uid && age >= STAYS
}

fn age(path: &std::path::Path) -> io::Result<Duration> {
    // Zero when the clock was put back.
    Ok(std::fs::metadata(path)?
        .modified()?
        .elapsed()
        .unwrap_or_default())
}

/// The trace that is kept, if it is one of this file: of an earlier conversion it would be another's.
fn read(path: &std::path::Path, file: &DataFile) -> io::Result<(Kept, Trace)> {
    let mut text = Vec::new();
    let opened = std::fs::File::open(path)?;
    opened.take(2 * MAX_TRACE as u64).read_to_end(&mut text)?;
    let kept: Kept = serde_json::from_slice(&text)?;
    let trace = kept.trace.to_string();
    let trace = Trace::from_json(&file.verity_root, file.hash_offset, trace.as_bytes());
    Ok((kept, trace.map_err(io::Error::other)?))
}

/// Writes a trace whole or not at all. `false` when there are too many.
fn keep(path: &std::path::Path, trace: &Trace, caller: &Caller) -> io::Result<bool> {
    let folder = path.parent().unwrap_or(std::path::Path::new("."));
    if std::fs::read_dir(folder)?.count() >= MOST {
        return Ok(false);
    }
    let kept = Kept {
        uid: caller.uid,
        by_admin: caller.is_admin,
        trace: serde_json::from_str(&trace.to_json())?,
    };
    let kept = serde_json::to_vec(&kept)?;
    let mut random = [0u8; 8];
    rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
    let new = folder.join(format!("{:016x}.new", u64::from_le_bytes(random)));
    let written = std::fs::File::create_new(&new)
        .and_then(|mut file| file.write_all(&kept))
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
