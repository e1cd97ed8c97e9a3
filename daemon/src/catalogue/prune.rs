//! What the catalogue forgets: users can make it remember things without end, so everything that they can add has an
//! age or a number at which it goes. What goes costs a question to a registry at most, but for pins and job answers,
//! which outlive every job that a site would still call one.

use jiff::Timestamp;

use super::{Catalogue, CatalogueError};

const DAY: i64 = 24 * 3600;
/// Pins not renewed, and jobs' first answers.
const JOBS_AFTER: i64 = 90 * DAY;
/// Showings of blobs; the last day's count ([`super::sources`]), older ones tell which registry ever had a blob.
const SOURCES_AFTER: i64 = 30 * DAY;
/// References that stand for nothing in the store.
const TAGS_AFTER: i64 = 30 * DAY;
/// How much stays whatever its age.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Bytes of manifests that are of no image in the store; the newest stay.
    pub manifests: i64,
    /// Pins, and job answers, of one user; the newest stay.
    pub of_user: i64,
    /// References that stand for nothing in the store.
    pub tags: i64,
    /// Ended pulls that can still be asked for.
    pub ended_pulls: i64,
}

impl Default for Bounds {
    fn default() -> Self {
        Self {
            manifests: 64 << 20,
            of_user: 20_000,
            tags: 100_000,
            ended_pulls: 1000,
        }
    }
}

impl Catalogue {
    /// Removes what is too old or too much. Returns how many rows went.
    pub async fn prune(&self, now: Timestamp, bounds: &Bounds) -> Result<u64, CatalogueError> {
        let now = now.as_second();
        let mut removed = 0;
        for (sql, bound) in [
            ("DELETE FROM pins WHERE pinned_at < $1", now - JOBS_AFTER),
            (
                "DELETE FROM job_answers WHERE answered_at < $1",
                now - JOBS_AFTER,
            ),
            (
                "DELETE FROM blob_sources WHERE shown_at < $1",
                now - SOURCES_AFTER,
            ),
            (
                "DELETE FROM tags WHERE checked_at < $1 AND published IS NULL \
                 AND manifest NOT IN (SELECT manifest FROM images)",
                now - TAGS_AFTER,
            ),
            (
                "DELETE FROM pins WHERE (cluster, uid, reference, platform, manifest) IN (\
                 SELECT cluster, uid, reference, platform, manifest FROM (SELECT *, \
                 ROW_NUMBER() OVER (PARTITION BY uid ORDER BY pinned_at DESC) AS place FROM pins) AS p WHERE place > $1)",
                bounds.of_user,
            ),
            (
                "DELETE FROM job_answers WHERE (uid, cluster, job, reference, platform) IN (\
                 SELECT uid, cluster, job, reference, platform FROM (SELECT *, \
                 ROW_NUMBER() OVER (PARTITION BY uid ORDER BY answered_at DESC) AS place FROM job_answers) AS p WHERE place > $1)",
                bounds.of_user,
            ),
            (
                "DELETE FROM tags WHERE (reference, platform) IN (\
                 SELECT reference, platform FROM tags WHERE manifest NOT IN (SELECT manifest FROM images) \
                 ORDER BY checked_at DESC LIMIT 1000000000 OFFSET $1)",
                bounds.tags,
            ),
            (
                "DELETE FROM manifests WHERE digest IN (SELECT digest FROM (\
                 SELECT digest, SUM(LENGTH(body)) OVER (ORDER BY fetched_at DESC, digest) AS total FROM manifests \
                 WHERE digest NOT IN (SELECT manifest FROM images)) AS m WHERE total > $1)",
                bounds.manifests,
            ),
            (
                "DELETE FROM ended_pulls WHERE id IN (\
                 SELECT id FROM ended_pulls ORDER BY ended_at DESC LIMIT 1000000000 OFFSET $1)",
                bounds.ended_pulls,
            ),
        ] {
            let done = sqlx::query(sql).bind(bound).execute(&self.pool).await?;
            removed += done.rows_affected();
        }
        Ok(removed)
    }
}

#[cfg(test)]
mod tests {
    use berth_client::api::Job;
    use berth_image::{Digest, ImageRef, Platform};

    use super::*;
    use crate::catalogue::TagRow;
    use crate::fetch::Want;
    use crate::registry::RawManifest;

    #[tokio::test]
    async fn what_users_add_goes_with_age_and_what_is_young_stays() {
        let dir = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(dir.path()).await.unwrap();
        let bounds = Bounds::default();
        let (platform, digest) = (Platform::host(), Digest::of(b"x"));
        let name = ImageRef::parse("r.example/a/b:1", None).unwrap();
        let job = Job {
            cluster: "c".into(),
            id: 7,
        };
        let want = Want {
            registry: "r".into(),
            repository: "a".into(),
            digest,
            size: 1,
        };
        let row = TagRow {
            top: digest,
            manifest: digest,
            checked_at: Timestamp::now(),
            published: false,
        };
        let fill = async || {
            catalogue
                .pin("c", 7, "a", &platform, &digest)
                .await
                .unwrap();
            let kept = catalogue.keep_job_answer((7, &job), &name, &platform, &digest);
            kept.await.unwrap();
            catalogue.add_source(&want, "nobody").await.unwrap();
            catalogue.put_tag(&name, &platform, &row).await.unwrap();
        };
        fill().await;
        assert_eq!(catalogue.prune(Timestamp::now(), &bounds).await.unwrap(), 0);
        assert!(catalogue.has_source(&want, "nobody").await.unwrap());
        assert!(!catalogue.has_source(&want, "somebody").await.unwrap());
        let later =
            |days: i64| Timestamp::from_second(Timestamp::now().as_second() + days * DAY).unwrap();
        assert_eq!(catalogue.prune(later(31), &bounds).await.unwrap(), 2);
        assert_eq!(catalogue.prune(later(91), &bounds).await.unwrap(), 2);
        assert_eq!(
            catalogue
                .job_answer((7, &job), &name, &platform)
                .await
                .unwrap(),
            None
        );
    }

    #[tokio::test]
    async fn what_is_young_is_kept_up_to_a_number() {
        let dir = tempfile::tempdir().unwrap();
        let catalogue = Catalogue::open(dir.path()).await.unwrap();
        for n in 0..5_u8 {
            let bytes = vec![n; 100];
            let digest = Digest::of(&bytes);
            catalogue
                .put_manifest(&RawManifest { digest, bytes })
                .await
                .unwrap();
            catalogue
                .pin("c", 7, &n.to_string(), &Platform::host(), &digest)
                .await
                .unwrap();
        }
        let bounds = Bounds {
            manifests: 250,
            of_user: 4,
            ..Bounds::default()
        };
        assert_eq!(
            catalogue.prune(Timestamp::now(), &bounds).await.unwrap(),
            3 + 1
        );
    }
}
