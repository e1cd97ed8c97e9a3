//! `/v1/images`: what is in the store. An image that the caller may not read is, for him, not there.

use std::sync::Arc;

use axum::extract::{Path, State};
use axum::http::StatusCode;
use axum::{Extension, Json};
use berth_client::api::{ErrorAnswer, ErrorKind, Image, ImageDetail};
use berth_image::{Digest, Platform};

use super::error::ApiError;
use super::{Answer, App, Caller, readers, traces};
use crate::catalogue::ImageRow;
use crate::collect;

/// All images in the store that the caller may read.
#[utoipa::path(get, path = "/v1/images", tag = "images", responses((status = 200, body = Vec<Image>)))]
pub(super) async fn list(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
) -> Answer<Vec<Image>> {
    let mut images = Vec::new();
    for row in app.catalogue.images().await? {
        if !readers::may_read(&app, &caller, &row).await? {
            continue;
        }
        images.push(describe(&app, &row).await?);
    }
    Ok(Json(images))
}

/// One image and its signed record, by manifest digest.
#[utoipa::path(
    get,
    path = "/v1/images/{digest}",
    tag = "images",
    params(("digest" = String, Path, description = "Manifest digest, `sha256:…`")),
    responses((status = 200, body = ImageDetail), (status = "4XX", body = ErrorAnswer))
)]
pub(super) async fn get(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(digest): Path<String>,
) -> Answer<ImageDetail> {
    let row = rows(&app, &caller, &digest).await?.swap_remove(0);
    Ok(Json(ImageDetail {
        image: describe(&app, &row).await?,
        record: serde_json::from_str(&row.record)
            .map_err(|e| ApiError::new(ErrorKind::Internal, e.to_string()))?,
    }))
}

/// Take an image out of the store. Running jobs keep what they have mounted. For admins.
#[utoipa::path(
    delete,
    path = "/v1/images/{digest}",
    tag = "images",
    params(("digest" = String, Path, description = "Manifest digest, `sha256:…`")),
    responses((status = 204), (status = "4XX", body = ErrorAnswer), (status = "5XX", body = ErrorAnswer))
)]
pub(super) async fn remove(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(digest): Path<String>,
) -> Result<StatusCode, ApiError> {
    if !caller.is_admin {
        let mut refusal = ApiError::new(
            ErrorKind::Denied,
            "only the site's admins may remove images",
        );
        refusal.0.hint = Some("[daemon] admin_uids names them, besides root".into());
        return Err(refusal);
    }
    for row in rows(&app, &caller, &digest).await? {
        collect::remove(&app.sealer, &app.catalogue, &row).await?;
        traces::forget(&app, &row.manifest, &row.platform);
        tracing::info!(uid = caller.uid, digest = %row.manifest, "removed");
    }
    Ok(StatusCode::NO_CONTENT)
}

/// The images of a digest that the caller may read, at least one.
async fn rows(app: &App, caller: &Caller, digest: &str) -> Result<Vec<ImageRow>, ApiError> {
    let digest: Digest = digest
        .parse()
        .map_err(|e: berth_image::digest::DigestError| {
            ApiError::new(ErrorKind::BadRequest, e.to_string())
        })?;
    // One that another daemon had made is learned, for this machine's platform.
    (app.present.known(&digest, &Platform::host())).await?;
    let mut rows = Vec::new();
    for row in app.catalogue.images_of(&digest).await? {
        if readers::may_read(app, caller, &row).await? {
            rows.push(row);
        }
    }
    if rows.is_empty() {
        let message = format!("image {digest} is not in the store");
        return Err(ApiError::new(ErrorKind::NotFound, message));
    }
    Ok(rows)
}

async fn describe(app: &App, row: &ImageRow) -> Result<Image, ApiError> {
    Ok(Image {
        digest: row.manifest.to_string(),
        platform: row.platform.to_string(),
        references: app.catalogue.references(&row.manifest).await?,
        size: row.size,
        created_at: row.created_at.to_string(),
        last_used_at: row.last_used_at.map(|t| t.to_string()),
        path: row.path.clone(),
    })
}
