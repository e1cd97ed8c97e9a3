-- A showing of a blob counts for the credential that saw it, and for a while. The table before this one did not say
-- which and when, so its rows cannot be kept.
DROP TABLE blob_sources;
CREATE TABLE blob_sources (
    digest     TEXT NOT NULL,
    registry   TEXT NOT NULL,
    repository TEXT NOT NULL,
    credential TEXT NOT NULL,
    shown_at   INTEGER NOT NULL,
    PRIMARY KEY (digest, registry, repository, credential)
);

-- Pulls that have ended, for those who ask what became of them. `pull` is the API's JSON.
CREATE TABLE ended_pulls (
    id       TEXT PRIMARY KEY NOT NULL,
    ended_at INTEGER NOT NULL,
    uids     TEXT NOT NULL,
    pull     TEXT NOT NULL
);

-- What is removed by age.
CREATE INDEX job_answers_by_age ON job_answers (answered_at);
CREATE INDEX pins_by_age ON pins (pinned_at);
CREATE INDEX manifests_by_age ON manifests (fetched_at);
CREATE INDEX ended_pulls_by_age ON ended_pulls (ended_at);
