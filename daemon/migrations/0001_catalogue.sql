-- What the daemon remembers. All of it but pins and job answers can be made anew from the store and the registries.
-- Times are seconds since 1970, sizes bytes, digests `sha256:<hex>`.

CREATE TABLE meta (
    key   TEXT PRIMARY KEY NOT NULL,
    value TEXT NOT NULL
);

-- Manifests and indexes as the registries sent them; a digest's bytes never change.
CREATE TABLE manifests (
    digest     TEXT PRIMARY KEY NOT NULL,
    media_type TEXT,
    body       BLOB NOT NULL,
    fetched_at INTEGER NOT NULL
);

-- What a reference stood for when a registry was last asked.
CREATE TABLE tags (
    reference  TEXT NOT NULL,
    platform   TEXT NOT NULL,
    top        TEXT NOT NULL,
    manifest   TEXT NOT NULL,
    checked_at INTEGER NOT NULL,
    -- What the store's signed entry says, where this daemon has had one written: `top manifest`.
    published  TEXT,
    PRIMARY KEY (reference, platform)
);
CREATE INDEX tags_by_manifest ON tags (manifest);

-- The first answer that a job got, which it keeps.
CREATE TABLE job_answers (
    cluster     TEXT NOT NULL,
    job         INTEGER NOT NULL,
    reference   TEXT NOT NULL,
    platform    TEXT NOT NULL,
    manifest    TEXT NOT NULL,
    answered_at INTEGER NOT NULL,
    PRIMARY KEY (cluster, job, reference, platform)
);

-- What users said at submit that their jobs will use.
CREATE TABLE pins (
    cluster   TEXT NOT NULL,
    uid       INTEGER NOT NULL,
    reference TEXT NOT NULL,
    platform  TEXT NOT NULL,
    manifest  TEXT NOT NULL,
    pinned_at INTEGER NOT NULL,
    PRIMARY KEY (cluster, uid, reference, platform, manifest)
);

-- Images in the store, from their records.
CREATE TABLE images (
    manifest     TEXT NOT NULL,
    platform     TEXT NOT NULL,
    size         INTEGER NOT NULL,
    path         TEXT NOT NULL,
    created_at   INTEGER NOT NULL,
    last_used_at INTEGER,
    record       TEXT NOT NULL,
    PRIMARY KEY (manifest, platform)
);

-- Pulls that have not ended: what a restart goes on with.
CREATE TABLE pulls (
    id         TEXT PRIMARY KEY NOT NULL,
    reference  TEXT NOT NULL,
    platform   TEXT NOT NULL,
    started_at INTEGER NOT NULL
);
CREATE TABLE pull_uids (
    pull TEXT NOT NULL REFERENCES pulls (id) ON DELETE CASCADE,
    uid  INTEGER NOT NULL,
    PRIMARY KEY (pull, uid)
);
