//! The catalogue: what the daemon remembers over a restart, in SQLite on a local disk.
//!
//! The store is the truth about images and the registries about tags; a lost or broken catalogue is made anew
//! ([`scan`]). Only this module knows SQL. Plain SQL that PostgreSQL takes as well.

mod images;
mod migrations;
mod pins;
mod present;
mod prune;
mod pulls;
mod scan;
mod sources;
mod tags;

use std::path::{Path, PathBuf};
use std::time::Duration;

use berth_client::api::{ErrorBody, ErrorKind};
use jiff::Timestamp;
use sqlx::SqlitePool;
use sqlx::sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous};

pub use images::ImageRow;
pub use present::Present;
pub use prune::Bounds;
pub use pulls::{EndedPull, OpenPull};
pub use scan::scan;
pub use tags::TagRow;

const FILE: &str = "catalogue.sqlite";
/// SQLite allows one writer; readers go on beside it.
const CONNECTIONS: u32 = 8;

/// Why the catalogue does not answer.
#[derive(Debug, thiserror::Error)]
pub enum CatalogueError {
    #[error("catalogue `{path}`: {source}")]
    Open { path: PathBuf, source: sqlx::Error },
    #[error("catalogue `{path}`: {source}")]
    Migrate {
        path: PathBuf,
        source: sqlx::migrate::MigrateError,
    },
    #[error("catalogue: {0}")]
    Query(#[from] sqlx::Error),
    #[error("catalogue holds nonsense: {0}")]
    Content(String),
}

impl From<CatalogueError> for ErrorBody {
    fn from(e: CatalogueError) -> Self {
        tracing::error!(error = %e, "the catalogue failed");
        Self {
            kind: ErrorKind::Internal,
            message: e.to_string(),
            hint: None,
        }
    }
}

/// An open catalogue. Clones share it.
#[derive(Debug, Clone)]
pub struct Catalogue {
    pool: SqlitePool,
}

impl Catalogue {
    /// Opens the catalogue in `state_dir`, or makes it. One that SQLite calls broken is set aside and a new one made.
    pub async fn open(state_dir: &Path) -> Result<Self, CatalogueError> {
        let path = state_dir.join(FILE);
        match Self::open_file(&path).await {
            Err(e) if is_broken(&e) => {
                let aside = path.with_extension(format!("broken-{}", Timestamp::now().as_second()));
                tracing::error!(error = %e, aside = %aside.display(), "the catalogue is broken and is made anew");
                set_aside(&path, &aside)?;
                Self::open_file(&path).await
            }
            other => other,
        }
    }

    async fn open_file(path: &Path) -> Result<Self, CatalogueError> {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .foreign_keys(true)
            .busy_timeout(Duration::from_secs(10));
        let pool = SqlitePoolOptions::new()
            .max_connections(CONNECTIONS)
            .acquire_timeout(Duration::from_secs(10))
            .connect_with(options)
            .await
            .map_err(|source| CatalogueError::Open {
                path: path.into(),
                source,
            })?;
        migrations::migrator()
            .run(&pool)
            .await
            .map_err(|source| CatalogueError::Migrate {
                path: path.into(),
                source,
            })?;
        Ok(Self { pool })
    }

    /// Whether it answers.
    pub async fn ping(&self) -> Result<(), CatalogueError> {
        sqlx::query("SELECT 1").execute(&self.pool).await?;
        Ok(())
    }

    /// A remembered fact of the daemon itself.
    pub async fn meta(&self, key: &str) -> Result<Option<String>, CatalogueError> {
        let query = sqlx::query_scalar("SELECT value FROM meta WHERE key = $1");
        Ok(query.bind(key).fetch_optional(&self.pool).await?)
    }

    pub async fn set_meta(&self, key: &str, value: &str) -> Result<(), CatalogueError> {
        sqlx::query(
            "INSERT INTO meta (key, value) VALUES ($1, $2) ON CONFLICT (key) DO UPDATE SET value = excluded.value",
        )
        .bind(key)
        .bind(value)
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Ends all connections, so that the WAL is folded into the file.
    pub async fn close(&self) {
        self.pool.close().await;
    }
}

fn is_broken(e: &CatalogueError) -> bool {
    let text = match e {
        CatalogueError::Open { source, .. } => source.to_string(),
        CatalogueError::Migrate { source, .. } => source.to_string(),
        _ => return false,
    };
    // SQLITE_CORRUPT and SQLITE_NOTADB.
    text.contains("malformed") || text.contains("not a database")
}

fn set_aside(path: &Path, aside: &Path) -> Result<(), CatalogueError> {
    let io = |e| CatalogueError::Open {
        path: path.into(),
        source: sqlx::Error::Io(e),
    };
    std::fs::rename(path, aside).map_err(io)?;
    for suffix in ["sqlite-wal", "sqlite-shm"] {
        match std::fs::remove_file(path.with_extension(suffix)) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(io(e)),
            _ => {}
        }
    }
    Ok(())
}

/// A column that holds one of our own types as text.
fn parsed<T>(text: &str) -> Result<T, CatalogueError>
where
    T: TryFrom<String>,
    T::Error: std::fmt::Display,
{
    T::try_from(text.to_owned()).map_err(|e| CatalogueError::Content(e.to_string()))
}

fn time(seconds: i64) -> Timestamp {
    Timestamp::from_second(seconds).unwrap_or(Timestamp::UNIX_EPOCH)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_catalogue_of_an_earlier_release_is_taken_over() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        // As its first release left it, with one image and one pull that had not ended.
        let old = dir.path().join("old");
        std::fs::create_dir(&old).unwrap();
        let text = include_str!("../../migrations/0001_catalogue.sql");
        std::fs::write(old.join("0001_catalogue.sql"), text).unwrap();
        let options = SqliteConnectOptions::new()
            .filename(&path)
            .create_if_missing(true);
        let pool = SqlitePoolOptions::new()
            .connect_with(options)
            .await
            .unwrap();
        let first = sqlx::migrate::Migrator::new(old.as_path()).await.unwrap();
        first.run(&pool).await.unwrap();
        for row in [
            "INSERT INTO meta (key, value) VALUES ('store-uuid', 'u')",
            "INSERT INTO pulls (id, reference, platform, started_at) VALUES ('p', 'r.example/a:1', 'linux/amd64', 7)",
        ] {
            sqlx::query(row).execute(&pool).await.unwrap();
        }
        pool.close().await;
        let catalogue = Catalogue::open(dir.path()).await.unwrap();
        let kept = catalogue.meta("store-uuid").await.unwrap();
        assert_eq!(kept.as_deref(), Some("u"));
        assert_eq!(catalogue.open_pulls().await.unwrap()[0].id, "p");
        assert_eq!(catalogue.ended_pulls(9).await.unwrap(), []);
    }

    #[tokio::test]
    async fn a_broken_catalogue_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        std::fs::write(&path, [b'x'; 8192]).unwrap();
        let catalogue = Catalogue::open(dir.path()).await.unwrap();
        catalogue.set_meta("a", "b").await.unwrap();
        assert_eq!(catalogue.meta("a").await.unwrap().as_deref(), Some("b"));
        let names = std::fs::read_dir(dir.path()).unwrap();
        let aside = |n: &std::ffi::OsStr| n.to_string_lossy().contains("broken-");
        assert!(names.flatten().any(|e| aside(&e.file_name())));
    }
}
