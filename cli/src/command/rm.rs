//! `berth rm`.

use berth_client::api::Image;
use berth_image::Digest;

use crate::context::Context;
use crate::error::{Failure, OTHER, USAGE};
use crate::local::Wanted;
use crate::output;

pub fn rm(context: &Context, images: &[String]) -> Result<(), Failure> {
    let wanted: Vec<Wanted> = images
        .iter()
        .map(|text| Wanted::parse(text, context))
        .collect::<Result<_, _>>()?;
    let client = context.client()?;
    let there = client.images()?;
    // All names are looked up before anything is removed: a typing error removes nothing.
    let mut digests: Vec<Digest> = Vec::new();
    for (text, wanted) in images.iter().zip(&wanted) {
        let digest = pick(text, wanted, &there)?;
        if !digests.contains(&digest) {
            digests.push(digest);
        }
    }
    for digest in &digests {
        client.remove(digest)?;
        if !context.json {
            output::line(&format!("removed {digest}"))?;
        }
    }
    match context.json {
        true => output::json(&serde_json::json!({ "removed": digests })),
        false => Ok(()),
    }
}

/// The one image that is meant.
pub fn pick(text: &str, wanted: &Wanted, there: &[Image]) -> Result<Digest, Failure> {
    let fits = |image: &Image| match wanted {
        Wanted::Reference(reference) => {
            let name = reference.to_string();
            image.references.contains(&name)
                || reference
                    .digest()
                    .is_some_and(|d| d.to_string() == image.digest)
        }
        Wanted::Digest(digest, _) => digest.to_string() == image.digest,
        Wanted::Digits(digits) => (image.digest.strip_prefix("sha256:"))
            .is_some_and(|hex| hex.starts_with(digits.as_str())),
    };
    let mut found: Vec<Digest> = (there.iter())
        .filter(|image| fits(image))
        .filter_map(|image| image.digest.parse().ok())
        .collect();
    found.sort_unstable();
    found.dedup();
    match found.as_slice() {
        [digest] => Ok(*digest),
        [] => Err(Failure::new(OTHER, format!("`{text}` is not in the store"))
            .hint("`berth images` lists what is")),
        several => Err(Failure::new(
            USAGE,
            format!("`{text}` stands for {} images", several.len()),
        )
        .hint("name one by its digest, as `berth images` shows it")),
    }
}
