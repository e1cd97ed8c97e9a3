//! Pulls that have not ended: a restart goes on with them.

use std::collections::BTreeSet;

use berth_image::{ImageRef, Platform};
use jiff::Timestamp;
use sqlx::Row as _;

use super::{Catalogue, CatalogueError, parsed, time};

/// A pull as it was left.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct OpenPull {
    pub id: String,
    pub reference: ImageRef,
    pub platform: Platform,
    pub started_at: Timestamp,
    /// Who asked for it.
    pub uids: BTreeSet<u32>,
}

impl Catalogue {
    pub async fn begin_pull(&self, pull: &OpenPull) -> Result<(), CatalogueError> {
        let mut transaction = self.pool.begin().await?;
        sqlx::query(
            "INSERT INTO pulls (id, reference, platform, started_at) VALUES ($1, $2, $3, $4)",
        )
        .bind(&pull.id)
        .bind(pull.reference.to_string())
        .bind(pull.platform.to_string())
        .bind(pull.started_at.as_second())
        .execute(&mut *transaction)
        .await?;
        for uid in &pull.uids {
            sqlx::query("INSERT INTO pull_uids (pull, uid) VALUES ($1, $2)")
                .bind(&pull.id)
                .bind(uid)
                .execute(&mut *transaction)
                .await?;
        }
        Ok(transaction.commit().await?)
    }

    pub async fn end_pull(&self, id: &str) -> Result<(), CatalogueError> {
        sqlx::query("DELETE FROM pulls WHERE id = $1")
            .bind(id)
            .execute(&self.pool)
            .await?;
        Ok(())
    }

    /// What had not ended when the last daemon did.
    pub async fn open_pulls(&self) -> Result<Vec<OpenPull>, CatalogueError> {
        let rows = sqlx::query(
            "SELECT id, reference, platform, started_at FROM pulls ORDER BY started_at",
        )
        .fetch_all(&self.pool)
        .await?;
        let mut pulls = Vec::new();
        for row in rows {
            let id: String = row.try_get(0)?;
            let uids: Vec<u32> = sqlx::query_scalar("SELECT uid FROM pull_uids WHERE pull = $1")
                .bind(&id)
                .fetch_all(&self.pool)
                .await?;
            pulls.push(OpenPull {
                id,
                reference: parsed(row.try_get(1)?)?,
                platform: parsed(row.try_get(2)?)?,
                started_at: time(row.try_get(3)?),
                uids: uids.into_iter().collect(),
            });
        }
        Ok(pulls)
    }
}
