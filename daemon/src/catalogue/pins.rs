//! What users said at submit that their jobs will use.

use berth_image::{Digest, Platform};
use jiff::Timestamp;

use super::{Catalogue, CatalogueError};

impl Catalogue {
    /// Remembers a pin, or that it was renewed.
    pub async fn pin(
        &self,
        cluster: &str,
        uid: u32,
        reference: &str,
        platform: &Platform,
        manifest: &Digest,
    ) -> Result<(), CatalogueError> {
        sqlx::query(
            "INSERT INTO pins (cluster, uid, reference, platform, manifest, pinned_at) VALUES ($1, $2, $3, $4, $5, $6) \
             ON CONFLICT (cluster, uid, reference, platform, manifest) DO UPDATE SET pinned_at = excluded.pinned_at",
        )
        .bind(cluster)
        .bind(uid)
        .bind(reference)
        .bind(platform.to_string())
        .bind(manifest.to_string())
        .bind(Timestamp::now().as_second())
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}
