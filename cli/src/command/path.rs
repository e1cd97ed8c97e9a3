//! `berth path`: the SquashFS file of an image.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use berth_client::api::PullRequest;
use berth_image::{Digest, Platform, Record};
use berth_mount::keeper::{Answer, Request};
use serde_json::json;

use crate::command::{follow, node};
use crate::context::{self, Context};
use crate::error::{Failure, OTHER, UNAVAILABLE};
use crate::local::{Found, Local, Wanted};
use crate::progress::Display;
use crate::{interrupt, output};

const STALE_NAMES: Duration = Duration::from_secs(65);
const LOOK_AGAIN: Duration = Duration::from_secs(5);

/// How long the node service may take to find and mount an image.
const MOUNTING: Duration = Duration::from_secs(90);

pub fn path(
    context: &Context,
    image: &str,
    given: Option<Platform>,
    mounted: bool,
) -> Result<(), Failure> {
    let found = find(context, image, given)?;
    let path = match mounted {
        true => folder(context, &found.record, MOUNTING)?
            .display()
            .to_string(),
        false => found.path.display().to_string(),
    };
    match context.json {
        true => output::json(&json!({
            "path": path,
            "digest": found.record.manifest,
            "platform": found.record.platform,
        })),
        false => output::line(&path),
    }
}

/// The folder at which the node service shows the image to this user.
pub fn folder(context: &Context, record: &Record, patience: Duration) -> Result<PathBuf, Failure> {
    let request = Request::Path {
        digest: record.manifest.to_string(),
        platform: record.platform.to_string(),
    };
    match node::ask(context, &request, patience)? {
        Answer::At { path } => Ok(path),
        _ => Err(Failure::new(UNAVAILABLE, "the node service gave no folder")),
    }
}

/// The image in the store, pulled first where needed.
pub fn find(context: &Context, image: &str, given: Option<Platform>) -> Result<Found, Failure> {
    let wanted = Wanted::parse(image, context)?;
    match &wanted {
        Wanted::Reference(_) => through_daemon(context, image, &wanted, given),
        // A digest alone names no registry: it is in the store or it is not.
        Wanted::Digest(..) | Wanted::Digits(_) => {
            let local = Local::open(&context.config)?;
            let found = local.find(&wanted, given.as_ref())?;
            let found = found.ok_or_else(|| absent(image))?;
            local.check_file(&found)?;
            Ok(found)
        }
    }
}

/// Asks the daemon, which knows whether the tag moved; without it the store's signed entries decide.
fn through_daemon(
    context: &Context,
    image: &str,
    wanted: &Wanted,
    given: Option<Platform>,
) -> Result<Found, Failure> {
    let display = Display::new(context);
    let cleaned = display.clone();
    interrupt::watch(move || cleaned.clear())?;
    let request = PullRequest {
        reference: image.to_owned(),
        platform: given.as_ref().map(ToString::to_string),
        fresh: false,
    };
    let pulled = context
        .client()
        .and_then(|client| follow::one(&client, &request, &display));
    display.clear();
    let digest = match pulled {
        Ok(pull) => pull.digest,
        Err(e) if e.code == UNAVAILABLE => return without_daemon(context, wanted, given, e),
        Err(e) => return Err(e),
    };
    let local = Local::open(&context.config)?;
    let digest = digest.and_then(|d| d.parse().ok());
    let digest = digest.ok_or_else(|| Failure::new(70, "the daemon named no digest"))?;
    let found = once_visible(context, &local, &digest, &context::platform(given))?;
    local.check_file(&found)?;
    Ok(found)
}

/// A remote filesystem may keep saying for a while that a new file is not there (NFS: `acdirmax`, 60 s).
fn once_visible(
    context: &Context,
    local: &Local,
    digest: &Digest,
    platform: &Platform,
) -> Result<Found, Failure> {
    let since = Instant::now();
    loop {
        if let Some(found) = local.record(digest, platform)? {
            return Ok(found);
        }
        if since.elapsed() > STALE_NAMES {
            return Err(Failure::new(
                UNAVAILABLE,
                format!("the daemon has published {digest}, but the store here does not show it"),
            )
            .hint("is `store.path` the same filesystem here and there? `berth doctor` tells"));
        }
        context.say("waiting until the filesystem shows the image");
        std::thread::sleep(LOOK_AGAIN);
    }
}

/// The image that the store's entry names, however old the entry is; the daemon's failure where there is none.
fn without_daemon(
    context: &Context,
    wanted: &Wanted,
    given: Option<Platform>,
    failure: Failure,
) -> Result<Found, Failure> {
    let local = Local::open(&context.config)?;
    let Some(found) = local.find(wanted, given.as_ref())? else {
        return Err(failure);
    };
    local.check_file(&found)?;
    let when = match &found.entry {
        Some(entry) => output::time(&entry.resolved_at.to_string()),
        None => "its making".into(),
    };
    context.say(&format!(
        "berth: {}; taking the store's image as of {when}",
        failure.message
    ));
    Ok(found)
}

fn absent(image: &str) -> Failure {
    Failure::new(OTHER, format!("`{image}` is not in the store"))
        .hint("`berth images` lists what is; a reference would be pulled")
}
