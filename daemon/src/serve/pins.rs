//! `/v1/pins`: what a job will use, said at submit.

use std::sync::Arc;

use axum::extract::State;
use axum::{Extension, Json};
use berth_client::api::{ErrorAnswer, ErrorKind, PinRequest, Pins, PullState};
use berth_image::Platform;
use futures_util::future::try_join_all;

use super::error::ApiError;
use super::{Answer, App, Body, Caller, Subject, platform};

/// Most references of one request.
const MAX_REFERENCES: usize = 64;

/// Pin what a job will use, and begin the pulls that it needs.
#[utoipa::path(
    post,
    path = "/v1/pins",
    tag = "images",
    request_body = PinRequest,
    responses(
        (status = 200, body = Pins),
        (status = "4XX", body = ErrorAnswer),
        (status = "5XX", body = ErrorAnswer),
    )
)]
pub(super) async fn pin(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Body(request): Body<PinRequest>,
) -> Answer<Pins> {
    if request.references.len() > MAX_REFERENCES || request.cluster.len() > 256 {
        return Err(ApiError::new(
            ErrorKind::BadRequest,
            format!("at most {MAX_REFERENCES} references can be pinned at a time"),
        ));
    }
    let platform = platform(request.platform.as_deref())?;
    let each = (request.references.iter())
        .map(|text| pin_one(&app, &caller, &request.cluster, text, &platform));
    let mut pins = Pins::default();
    for (text, (digest, pull)) in request.references.iter().zip(try_join_all(each).await?) {
        pins.pins.insert(text.clone(), digest);
        pins.pulls.extend(pull.map(|id| (text.clone(), id)));
    }
    Ok(Json(pins))
}

/// The digest, and the pull that goes on.
async fn pin_one(
    app: &App,
    caller: &Caller,
    cluster: &str,
    text: &str,
    platform: &Platform,
) -> Result<(String, Option<String>), ApiError> {
    let (name, manifest, platform, pull) = match app.subject(text).await? {
        Subject::Stored(image) => (
            text.to_owned(),
            image.manifest,
            image.platform.clone(),
            None,
        ),
        Subject::Named(reference) => {
            let at_hand = app.pulls.at_hand(&reference, platform, caller.uid).await?;
            let (manifest, running) = match at_hand {
                Some((manifest, _)) => (manifest, None),
                None => {
                    let resolution = app.resolver.resolve(&reference, platform).await?;
                    let entry = (app.pulls)
                        .start(&reference, platform, caller.uid, caller.is_admin)
                        .await?;
                    let pull = entry.pull();
                    let running = (pull.state != PullState::Ready).then_some(pull.id);
                    (resolution.manifest, running)
                }
            };
            (reference.to_string(), manifest, platform.clone(), running)
        }
    };
    (app.catalogue)
        .pin(cluster, caller.uid, &name, &platform, &manifest)
        .await?;
    Ok((manifest.to_string(), pull))
}
