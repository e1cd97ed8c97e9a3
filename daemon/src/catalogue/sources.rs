//! Which repositories have shown us a blob, to which credential, and when.

use jiff::Timestamp;

use super::{Catalogue, CatalogueError};
use crate::fetch::Want;

/// Seconds that a showing counts: rights are taken away as well as given.
const COUNTS_FOR: i64 = 24 * 3600;

impl Catalogue {
    /// Remembers that the repository has shown the blob just now.
    pub async fn add_source(&self, want: &Want, credential: &str) -> Result<(), CatalogueError> {
        sqlx::query(
            "INSERT INTO blob_sources (digest, registry, repository, credential, shown_at) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (digest, registry, repository, credential) DO UPDATE SET shown_at = excluded.shown_at",
        )
        .bind(want.digest.to_string())
        .bind(&want.registry)
        .bind(&want.repository)
        .bind(credential)
        .bind(Timestamp::now().as_second())
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Whether the repository has lately shown the blob to the credential.
    pub async fn has_source(&self, want: &Want, credential: &str) -> Result<bool, CatalogueError> {
        let row = sqlx::query(
            "SELECT 1 FROM blob_sources \
             WHERE digest = $1 AND registry = $2 AND repository = $3 AND credential = $4 AND shown_at > $5",
        )
        .bind(want.digest.to_string())
        .bind(&want.registry)
        .bind(&want.repository)
        .bind(credential)
        .bind(Timestamp::now().as_second() - COUNTS_FOR)
        .fetch_optional(&self.pool)
        .await?;
        Ok(row.is_some())
    }

    /// Whether the registry has ever had the blob, as far as is remembered.
    pub async fn has_registry(&self, want: &Want) -> Result<bool, CatalogueError> {
        let row =
            sqlx::query("SELECT 1 FROM blob_sources WHERE digest = $1 AND registry = $2 LIMIT 1")
                .bind(want.digest.to_string())
                .bind(&want.registry)
                .fetch_optional(&self.pool)
                .await?;
        Ok(row.is_some())
    }
}
