-- A job's first answer is its user's: what somebody else says about the job counts for nothing. The table before this
-- one did not say whose its answers were, so they cannot be kept.
DROP TABLE job_answers;
CREATE TABLE job_answers (
    uid         INTEGER NOT NULL,
    cluster     TEXT NOT NULL,
    job         INTEGER NOT NULL,
    reference   TEXT NOT NULL,
    platform    TEXT NOT NULL,
    manifest    TEXT NOT NULL,
    answered_at INTEGER NOT NULL,
    PRIMARY KEY (uid, cluster, job, reference, platform)
);
