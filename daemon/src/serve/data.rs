//! `/v1/images/{digest}/data` and `…/record`: an image's file by Range (RFC 9110, section 14), and its signed record.
//!
//! The file's ETag is its verity root: it never changes. Nodes check every byte against the root in the record, whose
//! signature they check; what is sent here has no other protection than that, and needs none.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Extension;
use axum::body::Body;
use axum::extract::{Path, Query, State};
use axum::http::{HeaderMap, HeaderValue, StatusCode, header};
use axum::response::{IntoResponse as _, Response};
use berth_client::api::{ErrorAnswer, ErrorKind};
use berth_image::envelope::MAX_ENVELOPE;
use berth_image::{Digest, layout};
use futures_util::stream;
use serde::Deserialize;

use super::error::ApiError;
use super::grants::{Granted, Grants};
use super::readers::{self, Answers, Readable};
use super::shares::Cut;
use super::turns::{Turn, Turns};
use super::{App, Caller, platform};

/// Bytes read from the store at a time.
pub const PART: usize = 256 << 10;
/// A file that nobody asks for is closed after this time: on a parallel filesystem each open counts.
const OPEN_FOR: Duration = Duration::from_secs(60);
/// Files kept open.
const MOST_OPEN: usize = 256;

/// What serving images needs.
#[derive(Debug)]
pub struct Serving {
    pub(super) grants: Grants,
    pub(super) answers: Answers,
    pub(super) traces: PathBuf,
    turns: Turns,
    files: Mutex<HashMap<String, (Arc<File>, Instant)>>,
}

impl Serving {
    /// With what lies in the daemon's state folder.
    pub fn open(state_dir: &std::path::Path) -> io::Result<Self> {
        let traces = state_dir.join("traces");
        std::fs::create_dir_all(&traces)?;
        Ok(Self {
            grants: Grants::open(state_dir)?,
            answers: Answers::default(),
            traces,
            turns: Turns::default(),
            files: Mutex::default(),
        })
    }

    fn file(&self, path: &str) -> io::Result<Arc<File>> {
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((file, last)) = files.get_mut(path) {
            *last = Instant::now();
            return Ok(Arc::clone(file));
        }
        files.retain(|_, (_, last)| last.elapsed() < OPEN_FOR);
        drop(files);
        let file = File::options()
            .read(true)
            .custom_flags(rustix::fs::OFlags::NOFOLLOW.bits() as i32)
            .open(path)?;
        let file = Arc::new(file);
        let mut files = self.files.lock().unwrap_or_else(PoisonError::into_inner);
        if files.len() < MOST_OPEN {
            files.insert(path.to_owned(), (Arc::clone(&file), Instant::now()));
        }
        Ok(file)
    }
}

/// Which of a manifest's images.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Which {
    #[serde(default)]
    platform: Option<String>,
}

/// The image that is asked for, if the caller, or the grant that was shown, may read it.
pub(super) async fn wanted(
    app: &App,
    digest: &str,
    which: &Which,
    caller: &Caller,
    granted: Option<&Granted>,
) -> Result<Readable, ApiError> {
    let digest: Digest = digest
        .parse()
        .map_err(|e: berth_image::digest::DigestError| {
            ApiError::new(ErrorKind::BadRequest, e.to_string())
        })?;
    let platform = platform(which.platform.as_deref())?;
    if granted.is_some_and(|grant| grant.digest != digest || grant.platform != platform) {
        let message = "the grant is for another image";
        return Err(ApiError::new(ErrorKind::Denied, message));
    }
    readers::readable(app, caller, &digest, &platform).await
}

/// An image's file: SquashFS and hash tree. Answers one range; with several it sends all.
#[utoipa::path(
    get,
    path = "/v1/images/{digest}/data",
    tag = "images",
    params(
        ("digest" = String, Path, description = "Manifest digest, `sha256:…`"),
        ("platform" = Option<String>, Query, description = "`os/architecture[/variant]`"),
        ("range" = Option<String>, Header, description = "`bytes=FIRST-LAST`")
    ),
    responses(
        (status = 200, description = "all of it", content_type = "application/octet-stream"),
        (status = 206, description = "the range", content_type = "application/octet-stream"),
        (status = 416, description = "no such range"),
        (status = 429, description = "too many of this user's at a time: come again", body = ErrorAnswer),
        (status = "4XX", body = ErrorAnswer)
    )
)]
pub(super) async fn data(
    State(app): State<Arc<App>>,
    Path(digest): Path<String>,
    Query(which): Query<Which>,
    Extension(caller): Extension<Caller>,
    granted: Option<Extension<Granted>>,
    cut: Option<Extension<Cut>>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let granted = granted.as_ref().map(|granted| &granted.0);
    let image = wanted(&app, &digest, &which, &caller, granted).await?;
    let size = image.record.file.size;
    let etag = format!(
        "\"{}\"",
        Digest::from_bytes(image.record.file.verity_root).hex()
    );
    let header_of = |name| {
        headers
            .get(name)
            .and_then(|v: &HeaderValue| v.to_str().ok())
    };
    if header_of(header::IF_NONE_MATCH) == Some(&etag) {
        return Ok((StatusCode::NOT_MODIFIED, [(header::ETAG, etag)]).into_response());
    }
    let same = header_of(header::IF_RANGE).is_none_or(|wanted| wanted == etag);
    let asked = header_of(header::RANGE).filter(|_| same);
    let range = match asked.map_or(Asked::All, |text| parse_range(text, size)) {
        Asked::All => None,
        Asked::Part(range) => Some(range),
        Asked::Nothing => {
            let all = [(header::CONTENT_RANGE, format!("bytes */{size}"))];
            return Ok((StatusCode::RANGE_NOT_SATISFIABLE, all).into_response());
        }
    };
    let cut = cut.map(|cut| cut.0).unwrap_or_default();
    let Some(turn) = app.serving.turns.take(caller.uid, cut).await else {
        let message = "too many requests of this user for image bytes at a time";
        let mut answer = ApiError::new(ErrorKind::StoreUnavailable, message).into_response();
        *answer.status_mut() = StatusCode::TOO_MANY_REQUESTS;
        let again = HeaderValue::from_static("1");
        answer.headers_mut().insert(header::RETRY_AFTER, again);
        return Ok(answer);
    };
    let (app2, path) = (Arc::clone(&app), image.row.path.clone());
    let file = tokio::task::spawn_blocking(move || {
        let file = app2.serving.file(&path)?;
        match file.metadata()?.len() {
            len if len == size => Ok(file),
            _ => Err(io::Error::other("the file has not the size in its record")),
        }
    });
    let file = file
        .await
        .map_err(|e| ApiError::new(ErrorKind::Internal, e.to_string()))?
        .map_err(|e| ApiError::new(ErrorKind::StoreUnavailable, e.to_string()))?;
    let mut response = Response::builder()
        .header(header::ETAG, etag)
        .header(header::ACCEPT_RANGES, "bytes")
        .header(header::CONTENT_TYPE, "application/octet-stream");
    if image.by_everybody {
        response = response.header(header::CACHE_CONTROL, "public, immutable, max-age=31536000");
    }
    let range = match range {
        Some(range) => {
            let text = format!("bytes {}-{}/{size}", range.start, range.end - 1);
            response = response
                .status(StatusCode::PARTIAL_CONTENT)
                .header(header::CONTENT_RANGE, text);
            range
        }
        None => 0..size,
    };
    response
        .header(header::CONTENT_LENGTH, range.end - range.start)
        .body(Body::from_stream(parts(app, file, range, turn)))
        .map_err(|e| ApiError::new(ErrorKind::Internal, e.to_string()))
}

/// The bytes, read as they are sent. An error breaks the connection: what was cut short is never taken for whole.
fn parts(
    app: Arc<App>,
    file: Arc<File>,
    range: Range<u64>,
    turn: Turn,
) -> impl futures_util::Stream<Item = io::Result<Vec<u8>>> {
    stream::try_unfold(
        (app, file, range, turn),
        |(app, file, range, turn)| async move {
            if range.is_empty() {
                return Ok(None);
            }
            let len = (range.end - range.start).min(PART as u64);
            let (reader, at) = (Arc::clone(&file), range.start);
            let read = tokio::task::spawn_blocking(move || {
                let mut part = vec![0u8; len as usize];
                reader.read_exact_at(&mut part, at).map(|()| part)
            });
            let part = read.await.map_err(io::Error::other)??;
            app.metrics.served_bytes.inc_by(len);
            let rest = range.start + len..range.end;
            Ok(Some((part, (app, file, rest, turn))))
        },
    )
}

#[derive(Debug, PartialEq, Eq)]
enum Asked {
    All,
    Part(Range<u64>),
    Nothing,
}

/// One byte range; what is no range of bytes, or several, asks for all.
fn parse_range(text: &str, size: u64) -> Asked {
    let Some(spec) = text.strip_prefix("bytes=").filter(|s| !s.contains(',')) else {
        return Asked::All;
    };
    let Some((first, last)) = spec.trim().split_once('-') else {
        return Asked::All;
    };
    let number = |text: &str| match text.bytes().all(|b| b.is_ascii_digit()) {
        true => text.parse::<u64>().ok(),
        false => None,
    };
    let range = match (first, last) {
        ("", last) => match number(last) {
            Some(count) => size.saturating_sub(count)..size,
            None => return Asked::All,
        },
        (first, "") => match number(first) {
            Some(first) => first..size,
            None => return Asked::All,
        },
        (first, last) => match (number(first), number(last)) {
            (Some(first), Some(last)) if first <= last => first..last.saturating_add(1).min(size),
            _ => return Asked::All,
        },
    };
    match range.start < range.end {
        true => Asked::Part(range),
        false => Asked::Nothing,
    }
}

/// The signed record of an image, as it lies in the store.
#[utoipa::path(
    get,
    path = "/v1/images/{digest}/record",
    tag = "images",
    params(
        ("digest" = String, Path, description = "Manifest digest, `sha256:…`"),
        ("platform" = Option<String>, Query, description = "`os/architecture[/variant]`")
    ),
    responses((status = 200, body = Object), (status = "4XX", body = ErrorAnswer))
)]
pub(super) async fn record(
    State(app): State<Arc<App>>,
    Path(digest): Path<String>,
    Query(which): Query<Which>,
    Extension(caller): Extension<Caller>,
    granted: Option<Extension<Granted>>,
) -> Result<Response, ApiError> {
    let granted = granted.as_ref().map(|granted| &granted.0);
    let image = wanted(&app, &digest, &which, &caller, granted).await?;
    let path = layout::record(&image.row.manifest, &image.row.platform);
    let store = Arc::clone(&app.store);
    let read = tokio::task::spawn_blocking(move || store.read(&path, MAX_ENVELOPE)).await;
    let bytes = read
        .map_err(|e| ApiError::new(ErrorKind::Internal, e.to_string()))?
        .map_err(|e| ApiError::new(ErrorKind::StoreUnavailable, e.to_string()))?;
    Ok(([(header::CONTENT_TYPE, "application/json")], bytes).into_response())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_are_read_as_the_specification_has_them() {
        for (text, asked) in [
            ("bytes=0-0", Asked::Part(0..1)),
            ("bytes=10-19", Asked::Part(10..20)),
            ("bytes=90-1000", Asked::Part(90..100)),
            ("bytes=90-", Asked::Part(90..100)),
            ("bytes=-10", Asked::Part(90..100)),
            ("bytes=-1000", Asked::Part(0..100)),
            ("bytes=100-", Asked::Nothing),
            ("bytes=100-200", Asked::Nothing),
            ("bytes=-0", Asked::Nothing),
            (
                "bytes=18446744073709551615-18446744073709551615",
                Asked::Nothing,
            ),
            ("bytes=5-4", Asked::All),
            ("bytes=0-1,3-4", Asked::All),
            ("bytes=+1-2", Asked::All),
            ("bytes=-", Asked::All),
            ("bytes=x-2", Asked::All),
            ("lines=1-2", Asked::All),
            ("bytes=99999999999999999999-", Asked::All),
        ] {
            assert_eq!(parse_range(text, 100), asked, "{text}");
        }
    }
}
