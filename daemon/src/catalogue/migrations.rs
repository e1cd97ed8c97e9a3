//! How the catalogue's tables came to be, step by step. What was released once never changes: sqlx holds catalogues to
//! the steps' checksums.
//!
//! Listed here, and not by `sqlx::migrate!`: the macro builds all of sqlx and SQLite a second time, for the compiler.

use sqlx::SqlSafeStr as _;
use sqlx::migrate::{Migration, MigrationType, Migrator};

/// By number, from 1.
const STEPS: [(&str, &str); 4] = [
    (
        "catalogue",
        include_str!("../../migrations/0001_catalogue.sql"),
    ),
    (
        "blob sources",
        include_str!("../../migrations/0002_blob_sources.sql"),
    ),
    (
        "job answers by user",
        include_str!("../../migrations/0003_job_answers_by_user.sql"),
    ),
    ("bounds", include_str!("../../migrations/0004_bounds.sql")),
];

/// All steps.
pub fn migrator() -> Migrator {
    let steps = (1..).zip(STEPS).map(|(number, (name, sql))| {
        let sql = sql.into_sql_str();
        Migration::new(number, name.into(), MigrationType::Simple, sql, false)
    });
    Migrator::with_migrations(steps.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn every_file_is_a_step() {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("migrations");
        let files = Migrator::new(folder).await.unwrap();
        let of = |all: &Migrator| -> Vec<_> {
            let all = all.iter();
            all.map(|step| {
                (
                    step.version,
                    step.description.clone(),
                    step.checksum.clone(),
                )
            })
            .collect()
        };
        assert_eq!(of(&files), of(&migrator()));
    }
}
