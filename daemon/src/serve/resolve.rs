//! `/v1/resolve`: what a reference stands for.

use std::sync::Arc;

use axum::extract::State;
use axum::{Extension, Json};
use berth_client::api::{ErrorAnswer, ResolveRequest, Resolved};

use super::{Answer, App, Body, Caller, Subject, platform};

/// What a reference stands for. With a job, the first answer is kept for that job of the caller's.
#[utoipa::path(
    post,
    path = "/v1/resolve",
    tag = "images",
    request_body = ResolveRequest,
    responses(
        (status = 200, body = Resolved),
        (status = "4XX", body = ErrorAnswer),
        (status = "5XX", body = ErrorAnswer),
    )
)]
pub(super) async fn resolve(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Body(request): Body<ResolveRequest>,
) -> Answer<Resolved> {
    let platform = platform(request.platform.as_deref())?;
    let reference = match app.subject(&request.reference).await? {
        Subject::Named(reference) => reference,
        Subject::Stored(image) => {
            return Ok(Json(Resolved {
                reference: request.reference,
                platform: image.platform.to_string(),
                digest: image.manifest.to_string(),
                age_s: 0,
                stale: false,
            }));
        }
    };
    let resolution = match &request.job {
        Some(job) => {
            (app.resolver)
                .resolve_for_job((caller.uid, job), &reference, &platform)
                .await?
        }
        None => app.resolver.resolve(&reference, &platform).await?,
    };
    Ok(Json(Resolved {
        age_s: resolution.age_s(),
        reference: resolution.reference.to_string(),
        platform: resolution.platform.to_string(),
        digest: resolution.manifest.to_string(),
        stale: resolution.stale,
    }))
}
