//! `berth inspect`: what is signed about an image. From the store itself, so that it says what a node would see.

use std::time::Duration;

use berth_image::{Platform, Record};
use berth_mount::keeper::{Answer, How, MountStatus, Request};
use serde_json::json;

use crate::command::node;
use crate::context::Context;
use crate::error::{Failure, OTHER};
use crate::local::{Found, Local, Wanted};
use crate::output::{self, size, time};

/// How long the node service may take to say how it has an image mounted.
const PATIENCE: Duration = Duration::from_secs(2);

pub fn inspect(context: &Context, image: &str, platform: Option<Platform>) -> Result<(), Failure> {
    let wanted = Wanted::parse(image, context)?;
    let local = Local::open(&context.config)?;
    let Some(found) = local.find(&wanted, platform.as_ref())? else {
        let failure = Failure::new(OTHER, format!("`{image}` is not in the store"));
        return Err(match wanted {
            Wanted::Reference(reference) => failure.hint(format!("berth pull {reference}")),
            _ => failure.hint("`berth images` lists what is"),
        });
    };
    if context.json {
        return output::json(&json!({
            "path": found.path,
            "signed_by": found.key.hex(),
            "reference": found.entry.as_ref().map(|e| e.reference.to_string()),
            "resolved_at": found.entry.as_ref().map(|e| e.resolved_at),
            "record": found.record,
            "mounted": here(context, &found),
        }));
    }
    show(&found, here(context, &found))
}

/// How this node has it mounted, where its node service says so: to root, and to users of their own folders.
fn here(context: &Context, found: &Found) -> Option<MountStatus> {
    let Ok(Answer::Status(status)) = node::ask(context, &Request::Status, PATIENCE) else {
        return None;
    };
    let (digest, platform) = (&found.record.manifest, &found.record.platform);
    let (digest, platform) = (digest.to_string(), platform.to_string());
    let mounts = status.mounts.into_iter();
    let of_it = mounts.filter(|mount| mount.digest == digest && mount.platform == platform);
    // Of several the one that the next job gets.
    of_it.min_by_key(|mount| mount.how == How::Lazy)
}

fn mounted(here: &MountStatus) -> String {
    let how = match here.how {
        How::Kernel => "by the kernel from the image's file",
        How::Cache => "by the kernel from the node's copy",
        How::Lazy => "on demand",
    };
    let fetched = here
        .fetched
        .map(|bytes| format!(", {} fetched", size(bytes)));
    let users = here.users;
    format!("{how}{}, used by {users}", fetched.unwrap_or_default())
}

fn show(found: &Found, here: Option<MountStatus>) -> Result<(), Failure> {
    let record = &found.record;
    let mut facts = vec![
        ("image", record.manifest.to_string()),
        ("platform", record.platform.to_string()),
    ];
    if let Some(entry) = &found.entry {
        let when = time(&entry.resolved_at.to_string());
        facts.push(("reference", format!("{} as of {when}", entry.reference)));
    }
    facts.extend([
        ("file", found.path.display().to_string()),
        ("size", size(record.file.size)),
        ("layers", record.layers.len().to_string()),
        ("made", made(record)),
        (
            "signed",
            format!(
                "{} by key {}",
                time(&record.signed_at.to_string()),
                found.key
            ),
        ),
        (
            "verity root",
            berth_image::Digest::from_bytes(record.file.verity_root).hex(),
        ),
        ("admitted", admitted(record)),
        ("entrypoint", words(&record.run.entrypoint)),
        ("command", words(&record.run.cmd)),
        (
            "directory",
            record.run.working_dir.clone().unwrap_or_else(|| "-".into()),
        ),
    ]);
    if let Some(here) = &here {
        facts.push(("mounted here", mounted(here)));
    }
    output::facts(&facts)?;
    list("environment", &record.run.env)?;
    let labels: Vec<String> = record
        .run
        .labels
        .iter()
        .map(|(name, value)| format!("{name}={value}"))
        .collect();
    list("labels", &labels)?;
    list("left out", &record.conversion.notes)
}

fn made(record: &Record) -> String {
    let made = &record.conversion;
    format!(
        "{} entries, {} level {}, {} blocks, ownership {}, by berth {}",
        made.entries,
        made.compression,
        made.level,
        size(made.block_size.into()),
        made.ownership,
        made.version
    )
}

fn admitted(record: &Record) -> String {
    let admission = &record.admission;
    match admission.reasons.as_slice() {
        [] => format!("by rule `{}`", admission.rule),
        reasons => format!("by rule `{}`: {}", admission.rule, reasons.join("; ")),
    }
}

fn words(words: &[String]) -> String {
    match words {
        [] => "-".into(),
        words => json!(words).to_string(),
    }
}

/// A titled list; nothing for an empty one. What an image says is shown with control characters made visible.
fn list(title: &str, lines: &[String]) -> Result<(), Failure> {
    if !lines.is_empty() {
        output::line(&format!("{title}:"))?;
    }
    for line in lines {
        let shown: String = (line.chars())
            .flat_map(|c| match c.is_control() {
                true => c.escape_default().collect::<Vec<_>>(),
                false => vec![c],
            })
            .collect();
        output::line(&format!("  {shown}"))?;
    }
    Ok(())
}
