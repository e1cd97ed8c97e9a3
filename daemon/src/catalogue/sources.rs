//! Which repositories have shown us a blob.

use super::{Catalogue, CatalogueError};
use crate::fetch::Want;

impl Catalogue {
    /// Remembers that the repository has shown the blob.
    pub async fn add_source(&self, want: &Want) -> Result<(), CatalogueError> {
        sqlx::query(
            "INSERT INTO blob_sources (digest, registry, repository) VALUES ($1, $2, $3) ON CONFLICT DO NOTHING",
        )
        .bind(want.digest.to_string())
        .bind(&want.registry)
        .bind(&want.repository)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    pub async fn has_source(&self, want: &Want) -> Result<bool, CatalogueError> {
        let row = sqlx::query(
            "SELECT 1 FROM blob_sources WHERE digest = $1 AND registry = $2 AND repository = $3",
        )
        .bind(want.digest.to_string())
        .bind(&want.registry)
        .bind(&want.repository)
        .fetch_optional(&self.pool)
        .await?;
        Ok(row.is_some())
    }
}
