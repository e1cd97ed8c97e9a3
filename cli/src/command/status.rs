//! `berth status`.

use crate::context::Context;
use crate::error::Failure;
use crate::output::{self, size, time};

pub fn status(context: &Context) -> Result<(), Failure> {
    let client = context.client()?;
    let status = client.status()?;
    if context.json {
        return output::json(&status);
    }
    output::facts(&[
        (
            "daemon",
            format!("berthd {} at {}", status.version, client.place()),
        ),
        ("started", time(&status.started_at)),
        ("sealer", status.sealer),
        ("store", format!("{} ({})", status.store, status.store_uuid)),
        (
            "images",
            format!("{}, {}", status.images, size(status.image_bytes)),
        ),
        ("in flight", format!("{} pulls", status.pulls_in_flight)),
        ("spool", size(status.spool_bytes)),
        (
            "fetched",
            format!("{} since the start", size(status.upstream_bytes)),
        ),
        (
            "made",
            format!("{} images since the start", status.conversions),
        ),
    ])
}
