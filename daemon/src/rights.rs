//! The right to bytes that are here already. Blobs are kept by digest, whoever brought them; but who knows the digest
//! of a layer in a private repository must not get it by naming it in a manifest elsewhere. So a repository has to
//! show a blob once before it is used for an image of that repository.

use std::sync::Arc;

use berth_client::api::ErrorBody;

use crate::catalogue::Catalogue;
use crate::fetch::{Blob, Fetcher, Want};

/// A blob, and for whom it is wanted.
pub type Wanted = (Arc<Blob>, Want);

/// Has every repository show its blobs, but for those that it is just sending or has shown before.
pub async fn check(
    catalogue: &Catalogue,
    fetcher: &Fetcher,
    blobs: &[Wanted],
) -> Result<(), ErrorBody> {
    for (blob, want) in blobs {
        if blob.comes_from(want) || catalogue.has_source(want).await? {
            continue;
        }
        fetcher.ask(want).await?;
        catalogue.add_source(want).await?;
    }
    Ok(())
}

/// Remembers what the repositories are sending, as it arrives. Never ends.
pub async fn note(catalogue: &Catalogue, blobs: &[Wanted]) -> std::convert::Infallible {
    for (blob, want) in blobs {
        if blob.comes_from(want)
            && blob.wait().await.is_ok()
            && let Err(e) = catalogue.add_source(want).await
        {
            tracing::error!(digest = %want.digest, error = %e, "cannot note where a blob came from");
        }
    }
    std::future::pending().await
}
