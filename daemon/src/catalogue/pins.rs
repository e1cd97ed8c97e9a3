//! What users said at submit that their jobs will use.

use berth_image::{Digest, Platform};
use jiff::Timestamp;

use super::{Catalogue, CatalogueError};

/// Seconds after which a pin's time is written again.
const RENEWED_AFTER: i64 = 60;

impl Catalogue {
    /// Remembers a pin, or that it was renewed; not each time, where a job starts many steps.
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
             ON CONFLICT (cluster, uid, reference, platform, manifest) DO UPDATE SET pinned_at = excluded.pinned_at \
             WHERE pins.pinned_at <= excluded.pinned_at - $7",
        )
        .bind(cluster)
        .bind(uid)
        .bind(reference)
        .bind(platform.to_string())
        .bind(manifest.to_string())
        .bind(Timestamp::now().as_second())
        .bind(RENEWED_AFTER)
        .execute(&self.pool)
        .await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_pin_is_renewed_once_it_has_aged() {
        let dir = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(dir.path()).await.unwrap();
        let digest = Digest::of(b"");
        let host = Platform::host();
        let pin = || catalogue.pin("c", 7, "a", &host, &digest);
        let age = |seconds: i64| {
            sqlx::query("UPDATE pins SET pinned_at = pinned_at - $1")
                .bind(seconds)
                .execute(&catalogue.pool)
        };
        let at = || {
            sqlx::query_scalar::<_, i64>("SELECT pinned_at FROM pins").fetch_all(&catalogue.pool)
        };
        pin().await.unwrap();
        let first = at().await.unwrap()[0];
        age(RENEWED_AFTER / 2).await.unwrap();
        pin().await.unwrap();
        assert_eq!(at().await.unwrap(), [first - RENEWED_AFTER / 2]);
        age(RENEWED_AFTER).await.unwrap();
        pin().await.unwrap();
        let times = at().await.unwrap();
        assert!(times.len() == 1 && times[0] >= first, "{times:?} {first}");
    }
}
