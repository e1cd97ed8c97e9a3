//! Pulls that have not ended, with which a restart goes on, and those that have, for those who ask.

use std::collections::BTreeSet;

use berth_client::api::Pull;
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

/// A pull that has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EndedPull {
    pub pull: Pull,
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

    /// Notes that a pull has ended, and how.
    pub async fn end_pull(&self, ended: &EndedPull) -> Result<(), CatalogueError> {
        let uids: Vec<String> = ended.uids.iter().map(u32::to_string).collect();
        let pull = serde_json::to_string(&ended.pull)
            .map_err(|e| CatalogueError::Content(e.to_string()))?;
        let mut transaction = self.pool.begin().await?;
        sqlx::query("DELETE FROM pulls WHERE id = $1")
            .bind(&ended.pull.id)
            .execute(&mut *transaction)
            .await?;
        sqlx::query(
            "INSERT INTO ended_pulls (id, ended_at, uids, pull) VALUES ($1, $2, $3, $4) ON CONFLICT DO NOTHING",
        )
        .bind(&ended.pull.id)
        .bind(Timestamp::now().as_second())
        .bind(uids.join(" "))
        .bind(pull)
        .execute(&mut *transaction)
        .await?;
        Ok(transaction.commit().await?)
    }

    /// The last `number` pulls that ended, oldest first.
    pub async fn ended_pulls(&self, number: usize) -> Result<Vec<EndedPull>, CatalogueError> {
        let rows =
            sqlx::query("SELECT uids, pull FROM ended_pulls ORDER BY ended_at DESC LIMIT $1")
                .bind(i64::try_from(number).unwrap_or(i64::MAX))
                .fetch_all(&self.pool)
                .await?;
        let mut ended = Vec::new();
        for row in rows.iter().rev() {
            let uids: &str = row.try_get(0)?;
            // A row of another version of the daemon may not be readable: then it is not known any more.
            if let Ok(pull) = serde_json::from_str(row.try_get(1)?) {
                ended.push(EndedPull {
                    pull,
                    uids: uids.split(' ').filter_map(|u| u.parse().ok()).collect(),
                });
            }
        }
        Ok(ended)
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
