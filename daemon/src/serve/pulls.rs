//! `/v1/pulls`: start, list, wait for, follow.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::extract::{Path, Query, State};
use axum::http::StatusCode;
use axum::response::sse::{Event, KeepAlive, Sse};
use axum::response::{IntoResponse as _, Response};
use axum::{Extension, Json};
use berth_client::api::{ErrorAnswer, ErrorKind, Pull, PullRequest, PullState};
use futures_util::stream::{self, Stream};
use serde::Deserialize;
use utoipa::IntoParams;

use super::error::ApiError;
use super::{Answer, App, Body, Caller, Subject, platform};
use crate::pulls::Entry;

/// Longest wait for a pull's end, in seconds.
const MAX_WAIT: u64 = 60;

/// Ask for an image to be in the store. An image that is there is ready at once; a pull of it that runs is joined.
#[utoipa::path(
    post,
    path = "/v1/pulls",
    tag = "pulls",
    request_body = PullRequest,
    responses(
        (status = 200, body = Pull, description = "The image is in the store"),
        (status = 202, body = Pull, description = "The pull goes on"),
        (status = "4XX", body = ErrorAnswer),
        (status = "5XX", body = ErrorAnswer),
    )
)]
pub(super) async fn start(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Body(request): Body<PullRequest>,
) -> Result<Response, ApiError> {
    let platform = platform(request.platform.as_deref())?;
    let entry = match app.subject(&request.reference).await? {
        Subject::Named(reference) => {
            if request.fresh {
                app.pulls.forget_failure(&reference, &platform);
            }
            (app.pulls)
                .start(&reference, &platform, caller.uid, caller.is_admin)
                .await?
        }
        Subject::Stored(image) => {
            (app.pulls)
                .found(&request.reference, &image, caller.uid)
                .await?
        }
    };
    let pull = entry.pull();
    let status = match pull.state {
        PullState::Ready => StatusCode::OK,
        _ => StatusCode::ACCEPTED,
    };
    Ok((status, Json(pull)).into_response())
}

/// Pulls in flight and those that ended lately: the caller's own, or everybody's for admins.
#[utoipa::path(get, path = "/v1/pulls", tag = "pulls", responses((status = 200, body = Vec<Pull>)))]
pub(super) async fn list(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
) -> Json<Vec<Pull>> {
    let all = app.pulls.all();
    let seen = all.iter().filter(|e| may_see(&caller, e));
    Json(seen.map(|e| e.pull()).collect())
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
pub(super) struct Wait {
    /// Seconds to wait for the pull's end, at most 60.
    #[serde(default)]
    wait: u64,
}

/// How a pull stands; with `wait`, as soon as it has ended or that time is over.
#[utoipa::path(
    get,
    path = "/v1/pulls/{id}",
    tag = "pulls",
    params(("id" = String, Path, description = "The pull's id"), Wait),
    responses((status = 200, body = Pull), (status = 404, body = ErrorAnswer))
)]
pub(super) async fn get(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
    wait: Result<Query<Wait>, axum::extract::rejection::QueryRejection>,
) -> Answer<Pull> {
    let Query(Wait { wait }) =
        wait.map_err(|e| ApiError::new(ErrorKind::BadRequest, e.body_text()))?;
    let entry = find(&app, &caller, &id)?;
    let mut news = entry.news();
    let ended = news.wait_for(|p| p.state.is_final());
    // Whether it ended or the time did, the answer is how it stands.
    let _ = tokio::time::timeout(Duration::from_secs(wait.min(MAX_WAIT)), ended).await;
    Ok(Json(entry.pull()))
}

/// Follow a pull: an event `progress` each time that it changes, and at its end `done` or `failed`. The data of each
/// is the pull.
#[utoipa::path(
    get,
    path = "/v1/pulls/{id}/events",
    tag = "pulls",
    params(("id" = String, Path, description = "The pull's id")),
    responses(
        (status = 200, content_type = "text/event-stream", body = Pull),
        (status = 404, body = ErrorAnswer),
    )
)]
pub(super) async fn events(
    State(app): State<Arc<App>>,
    Extension(caller): Extension<Caller>,
    Path(id): Path<String>,
) -> Result<Sse<impl Stream<Item = Result<Event, Infallible>>>, ApiError> {
    let mut news = find(&app, &caller, &id)?.news();
    news.mark_changed();
    let events = stream::unfold(Some(news), |news| async move {
        let mut news = news?;
        news.changed().await.ok()?;
        let pull = news.borrow_and_update().clone();
        let name = match pull.state {
            PullState::Ready => "done",
            PullState::Failed => "failed",
            _ => "progress",
        };
        let event = Event::default().event(name).json_data(&pull).ok()?;
        Some((Ok(event), (!pull.state.is_final()).then_some(news)))
    });
    Ok(Sse::new(events).keep_alive(KeepAlive::default()))
}

fn may_see(caller: &Caller, entry: &Entry) -> bool {
    caller.is_admin || entry.is_of(caller.uid)
}

fn find(app: &App, caller: &Caller, id: &str) -> Result<Arc<Entry>, ApiError> {
    let entry = app.pulls.get(id).filter(|e| may_see(caller, e));
    entry.ok_or_else(|| ApiError::new(ErrorKind::NotFound, "there is no such pull of yours"))
}
