//! The right to bytes that are here already. Blobs are kept by digest, whoever brought them; but who knows the digest
//! of a layer in a private repository must not get it by naming it in a manifest elsewhere.
//!
//! So a repository has to show a blob, to the credential that is used there, before the blob is used for an image of
//! that repository. A registry that sent the blob before, or that the site's configuration names, is asked whether the
//! repository holds it (HEAD). Any other may say yes to everything, so it has to send the whole blob once: who can
//! send the bytes had no need to get them from us.

use std::sync::Arc;

use berth_client::api::ErrorBody;

use crate::catalogue::Catalogue;
use crate::fetch::{Blob, Fetcher, Want};

/// A blob, and for whom it is wanted.
pub type Wanted = (Arc<Blob>, Want);

/// Has every repository show its blobs, but for those that it is just sending or has shown lately.
pub async fn check(
    catalogue: &Catalogue,
    fetcher: &Fetcher,
    blobs: &[Wanted],
    uid: u32,
) -> Result<(), ErrorBody> {
    for (blob, want) in blobs {
        let credential = fetcher.credential(want)?;
        if blob.comes_from(want) || catalogue.has_source(want, &credential).await? {
            continue;
        }
        if blob.comes_from_registry(want) {
            // Nothing to remember: that registry has not sent it whole yet.
            fetcher.ask(want).await?;
            continue;
        }
        match fetcher.is_trusted(want) || catalogue.has_registry(want).await? {
            true => fetcher.ask(want).await?,
            false => fetcher.prove(want, uid).await?,
        }
        catalogue.add_source(want, &credential).await?;
    }
    Ok(())
}

/// Remembers what the repositories are sending, as it arrives. Never ends.
pub async fn note(
    catalogue: &Catalogue,
    fetcher: &Fetcher,
    blobs: &[Wanted],
) -> std::convert::Infallible {
    for (blob, want) in blobs {
        if blob.comes_from(want)
            && blob.wait().await.is_ok()
            && let Ok(credential) = fetcher.credential(want)
            && let Err(e) = catalogue.add_source(want, &credential).await
        {
            tracing::error!(digest = %want.digest, error = %e, "cannot note where a blob came from");
        }
    }
    std::future::pending().await
}
