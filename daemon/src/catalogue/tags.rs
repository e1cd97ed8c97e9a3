//! Manifests, and what references stood for.

use std::collections::HashSet;

use berth_client::api::Job;
use berth_image::{Digest, ImageRef, Platform};
use jiff::Timestamp;
use sqlx::Row as _;

use super::{Catalogue, CatalogueError, parsed, time};
use crate::registry::RawManifest;

/// A remembered answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TagRow {
    /// What the registry answered: the index, or the manifest where there is no index.
    pub top: Digest,
    pub manifest: Digest,
    pub checked_at: Timestamp,
    /// The store holds a signed entry that says the same.
    pub published: bool,
}

impl Catalogue {
    /// Keeps a document. What its registry called it is not kept: others serve the same digest.
    pub async fn put_manifest(&self, raw: &RawManifest) -> Result<(), CatalogueError> {
        sqlx::query(
            "INSERT INTO manifests (digest, body, fetched_at) VALUES ($1, $2, $3) \
             ON CONFLICT (digest) DO NOTHING",
        )
        .bind(raw.digest.to_string())
        .bind(&raw.bytes)
        .bind(Timestamp::now().as_second())
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    pub async fn manifest(&self, digest: &Digest) -> Result<Option<RawManifest>, CatalogueError> {
        let row = sqlx::query("SELECT body FROM manifests WHERE digest = $1")
            .bind(digest.to_string())
            .fetch_optional(&self.pool)
            .await?;
        Ok(match row {
            Some(row) => Some(RawManifest {
                digest: *digest,
                bytes: row.try_get(0)?,
            })
            // A row that a broken disk changed is one that is not there.
            .filter(|raw: &RawManifest| Digest::of(&raw.bytes) == *digest),
            None => None,
        })
    }

    pub async fn tag(
        &self,
        reference: &ImageRef,
        platform: &Platform,
    ) -> Result<Option<TagRow>, CatalogueError> {
        let row = sqlx::query(
            "SELECT top, manifest, checked_at, published = top || ' ' || manifest FROM tags WHERE reference = $1 AND platform = $2",
        )
        .bind(reference.to_string())
        .bind(platform.to_string())
        .fetch_optional(&self.pool)
        .await?;
        row.map(|row| {
            Ok(TagRow {
                top: parsed(row.try_get(0)?)?,
                manifest: parsed(row.try_get(1)?)?,
                checked_at: time(row.try_get(2)?),
                published: row.try_get::<Option<bool>, _>(3)?.unwrap_or(false),
            })
        })
        .transpose()
    }

    /// The store's signed entry of `reference` now says this.
    pub async fn mark_published(
        &self,
        reference: &ImageRef,
        platform: &Platform,
        top: &Digest,
        manifest: &Digest,
    ) -> Result<(), CatalogueError> {
        sqlx::query("UPDATE tags SET published = $3 WHERE reference = $1 AND platform = $2")
            .bind(reference.to_string())
            .bind(platform.to_string())
            .bind(format!("{top} {manifest}"))
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    pub async fn put_tag(
        &self,
        reference: &ImageRef,
        platform: &Platform,
        row: &TagRow,
    ) -> Result<(), CatalogueError> {
        sqlx::query(
            "INSERT INTO tags (reference, platform, top, manifest, checked_at) VALUES ($1, $2, $3, $4, $5) \
             ON CONFLICT (reference, platform) DO UPDATE \
             SET top = excluded.top, manifest = excluded.manifest, checked_at = excluded.checked_at",
        )
        .bind(reference.to_string())
        .bind(platform.to_string())
        .bind(row.top.to_string())
        .bind(row.manifest.to_string())
        .bind(row.checked_at.as_second())
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// The references whose signed entry the catalogue knows.
    pub async fn published_references(&self) -> Result<HashSet<ImageRef>, CatalogueError> {
        let query = sqlx::query_scalar(
            "SELECT DISTINCT reference FROM tags WHERE published = top || ' ' || manifest",
        );
        let names: Vec<String> = query.fetch_all(&self.pool).await?;
        names.iter().map(|name| parsed(name)).collect()
    }

    /// The references that stand for an image at present, sorted.
    pub async fn references(&self, manifest: &Digest) -> Result<Vec<String>, CatalogueError> {
        let query = sqlx::query_scalar(
            "SELECT DISTINCT reference FROM tags WHERE manifest = $1 ORDER BY reference",
        );
        Ok(query
            .bind(manifest.to_string())
            .fetch_all(&self.pool)
            .await?)
    }

    /// What `job` of the user `uid` was told first.
    pub async fn job_answer(
        &self,
        (uid, job): (u32, &Job),
        reference: &ImageRef,
        platform: &Platform,
    ) -> Result<Option<(Digest, Timestamp)>, CatalogueError> {
        let row = sqlx::query(
            "SELECT manifest, answered_at FROM job_answers \
             WHERE uid = $1 AND cluster = $2 AND job = $3 AND reference = $4 AND platform = $5",
        )
        .bind(uid)
        .bind(&job.cluster)
        .bind(job.id)
        .bind(reference.to_string())
        .bind(platform.to_string())
        .fetch_optional(&self.pool)
        .await?;
        row.map(|row| Ok((parsed(row.try_get(0)?)?, time(row.try_get(1)?))))
            .transpose()
    }

    /// Remembers `manifest` for `job`, unless it was told something before; returns what counts.
    pub async fn keep_job_answer(
        &self,
        (uid, job): (u32, &Job),
        reference: &ImageRef,
        platform: &Platform,
        manifest: &Digest,
    ) -> Result<Digest, CatalogueError> {
        sqlx::query(
            "INSERT INTO job_answers (uid, cluster, job, reference, platform, manifest, answered_at) \
             VALUES ($1, $2, $3, $4, $5, $6, $7) ON CONFLICT DO NOTHING",
        )
        .bind(uid)
        .bind(&job.cluster)
        .bind(job.id)
        .bind(reference.to_string())
        .bind(platform.to_string())
        .bind(manifest.to_string())
        .bind(Timestamp::now().as_second())
        .execute(&self.pool)
        .await?;
        let kept = self.job_answer((uid, job), reference, platform).await?;
        Ok(kept.map_or(*manifest, |(digest, _)| digest))
    }
}
