//! Images in the store, as their records describe them.

use berth_image::{Digest, Platform, Record};
use jiff::Timestamp;
use sqlx::Row as _;
use sqlx::sqlite::SqliteRow;

use super::{Catalogue, CatalogueError, parsed, time};

/// One image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRow {
    pub manifest: Digest,
    pub platform: Platform,
    pub size: u64,
    /// The data file.
    pub path: String,
    pub created_at: Timestamp,
    pub last_used_at: Option<Timestamp>,
    /// The record's content as JSON.
    pub record: String,
}

impl ImageRow {
    pub fn new(record: &Record, path: String) -> Self {
        Self {
            manifest: record.manifest,
            platform: record.platform.clone(),
            size: record.file.size,
            path,
            created_at: record.signed_at,
            last_used_at: None,
            // A record came from JSON or goes there: it always has this form.
            record: serde_json::to_string(record).unwrap_or_default(),
        }
    }

    fn read(row: &SqliteRow) -> Result<Self, CatalogueError> {
        Ok(Self {
            manifest: parsed(row.try_get("manifest")?)?,
            platform: parsed(row.try_get("platform")?)?,
            size: row.try_get::<i64, _>("size")? as u64,
            path: row.try_get("path")?,
            created_at: time(row.try_get("created_at")?),
            last_used_at: row.try_get::<Option<i64>, _>("last_used_at")?.map(time),
            record: row.try_get("record")?,
        })
    }
}

impl Catalogue {
    pub async fn put_image(&self, image: &ImageRow) -> Result<(), CatalogueError> {
        sqlx::query(
            "INSERT INTO images (manifest, platform, size, path, created_at, record) VALUES ($1, $2, $3, $4, $5, $6) \
             ON CONFLICT (manifest, platform) DO UPDATE SET size = excluded.size, path = excluded.path, \
             created_at = excluded.created_at, record = excluded.record",
        )
        .bind(image.manifest.to_string())
        .bind(image.platform.to_string())
        .bind(image.size as i64)
        .bind(&image.path)
        .bind(image.created_at.as_second())
        .bind(&image.record)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    pub async fn image(
        &self,
        manifest: &Digest,
        platform: &Platform,
    ) -> Result<Option<ImageRow>, CatalogueError> {
        let row = sqlx::query("SELECT * FROM images WHERE manifest = $1 AND platform = $2")
            .bind(manifest.to_string())
            .bind(platform.to_string())
            .fetch_optional(&self.pool)
            .await?;
        row.as_ref().map(ImageRow::read).transpose()
    }

    /// The images of one manifest digest: one, but for a manifest that was asked for under several platforms' names.
    pub async fn images_of(&self, manifest: &Digest) -> Result<Vec<ImageRow>, CatalogueError> {
        let rows = sqlx::query("SELECT * FROM images WHERE manifest = $1 ORDER BY platform")
            .bind(manifest.to_string())
            .fetch_all(&self.pool)
            .await?;
        rows.iter().map(ImageRow::read).collect()
    }

    pub async fn images(&self) -> Result<Vec<ImageRow>, CatalogueError> {
        let rows = sqlx::query("SELECT * FROM images ORDER BY created_at, manifest")
            .fetch_all(&self.pool)
            .await?;
        rows.iter().map(ImageRow::read).collect()
    }

    /// Number and bytes of all images.
    pub async fn image_totals(&self) -> Result<(u64, u64), CatalogueError> {
        let row = sqlx::query("SELECT COUNT(*), COALESCE(SUM(size), 0) FROM images")
            .fetch_one(&self.pool)
            .await?;
        Ok((
            row.try_get::<i64, _>(0)? as u64,
            row.try_get::<i64, _>(1)? as u64,
        ))
    }

    pub async fn touch_image(
        &self,
        manifest: &Digest,
        platform: &Platform,
    ) -> Result<(), CatalogueError> {
        sqlx::query("UPDATE images SET last_used_at = $3 WHERE manifest = $1 AND platform = $2")
            .bind(manifest.to_string())
            .bind(platform.to_string())
            .bind(Timestamp::now().as_second())
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// Removes this row, unless the image was made anew meanwhile.
    pub async fn forget_image(&self, image: &ImageRow) -> Result<(), CatalogueError> {
        sqlx::query("DELETE FROM images WHERE manifest = $1 AND platform = $2 AND record = $3")
            .bind(image.manifest.to_string())
            .bind(image.platform.to_string())
            .bind(&image.record)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    pub async fn remove_image(
        &self,
        manifest: &Digest,
        platform: &Platform,
    ) -> Result<(), CatalogueError> {
        sqlx::query("DELETE FROM images WHERE manifest = $1 AND platform = $2")
            .bind(manifest.to_string())
            .bind(platform.to_string())
            .execute(&self.pool)
            .await?;
        Ok(())
    }
}
