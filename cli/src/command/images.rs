//! `berth images`.

use berth_client::api::Image;

use crate::context::Context;
use crate::error::{Failure, UNAVAILABLE};
use crate::local::Local;
use crate::output;

pub fn images(context: &Context) -> Result<(), Failure> {
    let images = match context.client().and_then(|c| Ok(c.images()?)) {
        Ok(images) => images,
        Err(e) if e.code == UNAVAILABLE => {
            let images = from_store(context).map_err(|store| Failure {
                message: format!("{}, and {}", e.message, store.message),
                ..e.clone()
            })?;
            context.say(&format!(
                "berth: {}; listing the store's records",
                e.message
            ));
            images
        }
        Err(e) => return Err(e),
    };
    if context.json {
        return output::json(&images);
    }
    let rows: Vec<Vec<String>> = (images.iter())
        .map(|image| {
            vec![
                output::short_digest(&image.digest),
                image.platform.clone(),
                output::size(image.size),
                output::time(&image.created_at),
                match image.references.as_slice() {
                    [] => "-".into(),
                    references => references.join(" "),
                },
            ]
        })
        .collect();
    output::table(
        &["DIGEST", "PLATFORM", "SIZE", "CREATED", "REFERENCES"],
        &rows,
    )
}

/// What the store holds and its signed entries say, without the daemon's knowledge of use. What is not believed, or what
/// this user may not read, is left out.
fn from_store(context: &Context) -> Result<Vec<Image>, Failure> {
    let local = Local::open(&context.config)?;
    let references = local.references();
    let dirs = local.store.image_dirs();
    let dirs =
        dirs.map_err(|e| Failure::new(UNAVAILABLE, format!("cannot list the store: {e}")))?;
    let found = dirs
        .iter()
        .filter_map(|(digest, platform)| local.record(digest, platform).ok().flatten());
    Ok(found
        .map(|found| Image {
            digest: found.record.manifest.to_string(),
            platform: found.record.platform.to_string(),
            references: references
                .get(&found.record.manifest)
                .cloned()
                .unwrap_or_default(),
            size: found.record.file.size,
            created_at: found.record.signed_at.to_string(),
            last_used_at: None,
            path: found.path.display().to_string(),
        })
        .collect())
}
