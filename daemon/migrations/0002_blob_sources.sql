-- Repositories that have shown us a blob: a blob that is here already is used for another repository's image only
-- when that repository shows it, too.
CREATE TABLE blob_sources (
    digest     TEXT NOT NULL,
    registry   TEXT NOT NULL,
    repository TEXT NOT NULL,
    PRIMARY KEY (digest, registry, repository)
);
