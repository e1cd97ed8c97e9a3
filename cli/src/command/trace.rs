//! `berth trace`: what a start of an image reads.

use std::path::Path;

use berth_client::Client;
use berth_image::trace::{MAX_TRACE, Trace};
use berth_image::{Digest, Record};
use serde_json::json;

use crate::command::rm::pick;
use crate::context::Context;
use crate::error::{Failure, OTHER, USAGE};
use crate::local::Wanted;
use crate::output;

pub fn trace(context: &Context, image: &str, set: Option<&Path>) -> Result<(), Failure> {
    let wanted = Wanted::parse(image, context)?;
    let client = context.client()?;
    let digest = pick(image, &wanted, &client.images()?)?;
    let detail = client.image(&digest)?;
    let record: Record = serde_json::from_value(detail.record)
        .map_err(|e| Failure::new(70, format!("the daemon sent no record: {e}")))?;
    match set {
        Some(file) => send(context, &client, &digest, &record, file),
        None => show(context, &client, &digest, &record),
    }
}

pub fn read(record: &Record, text: &[u8]) -> Result<Trace, String> {
    let file = &record.file;
    Trace::from_json(&file.verity_root, file.hash_offset, text).map_err(|e| e.to_string())
}

fn send(
    context: &Context,
    client: &Client,
    digest: &Digest,
    record: &Record,
    file: &Path,
) -> Result<(), Failure> {
    let shown = file.display();
    let wrong = |why: String| Failure::new(USAGE, format!("cannot use `{shown}`: {why}"));
    let size = std::fs::metadata(file)
        .map_err(|e| wrong(e.to_string()))?
        .len();
    if size > MAX_TRACE as u64 {
        return Err(wrong(format!("larger than {MAX_TRACE} bytes")));
    }
    let text = std::fs::read(file).map_err(|e| wrong(e.to_string()))?;
    let trace = read(record, &text).map_err(wrong)?;
    keep(client, digest, record, &trace)?;
    match context.json {
        true => output::json(&json!({ "digest": digest, "bytes": trace.bytes() })),
        false => output::line(&kept(&trace)),
    }
}

/// Gives a trace to the daemon.
pub fn keep(
    client: &Client,
    digest: &Digest,
    record: &Record,
    trace: &Trace,
) -> Result<(), Failure> {
    let answer = client.put_trace(digest, &record.platform, &trace.to_json())?;
    if !answer.kept {
        let message = format!("{} has a trace already", digest.short());
        return Err(Failure::new(OTHER, message)
            .hint("an admin may replace it; another user, once it is a day old and no admin's"));
    }
    Ok(())
}

pub fn kept(trace: &Trace) -> String {
    format!("a trace of {} is kept", output::size(trace.bytes()))
}

fn show(
    context: &Context,
    client: &Client,
    digest: &Digest,
    record: &Record,
) -> Result<(), Failure> {
    let text = client.trace(digest, &record.platform)?;
    let Some(text) = text else {
        let message = format!("there is no trace of {}", digest.short());
        return Err(Failure::new(OTHER, message)
            .hint("`berth trace IMAGE -- COMMAND` records one, as does the first job that fetches the image on demand"));
    };
    let trace = read(record, &text)
        .map_err(|e| Failure::new(70, format!("the daemon sent no trace: {e}")))?;
    if context.json {
        let trace: serde_json::Value = serde_json::from_slice(&text)
            .map_err(|e| Failure::new(70, format!("the daemon sent no trace: {e}")))?;
        return output::json(&trace);
    }
    let (read, all) = (trace.bytes(), record.file.hash_offset);
    output::facts(&[
        ("digest", digest.to_string()),
        ("reads", output::size(read)),
        ("of", output::size(all)),
        ("places", trace.runs().len().to_string()),
    ])
}
