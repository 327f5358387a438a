-- State of resumable backfills: which chunks of a range are done, and which files they published.
CREATE TABLE predictflow.backfill_runs (
    run_id          text        PRIMARY KEY,
    project         text        NOT NULL,
    feature_view    text        NOT NULL,
    definition_hash text        NOT NULL,
    range_start     timestamptz NOT NULL,
    range_end       timestamptz NOT NULL,
    known_by        timestamptz NOT NULL,
    status          text        NOT NULL,
    created_at      timestamptz NOT NULL,
    updated_at      timestamptz NOT NULL,
    CHECK (range_start < range_end),
    CHECK (status IN ('running', 'done', 'failed'))
);
CREATE INDEX backfill_runs_view ON predictflow.backfill_runs (project, feature_view);
COMMENT ON COLUMN predictflow.backfill_runs.range_end IS 'Exclusive: range_start <= event_timestamp < range_end';
COMMENT ON COLUMN predictflow.backfill_runs.known_by IS 'Inclusive: rows with created <= known_by';

CREATE TABLE predictflow.backfill_chunks (
    run_id       text        NOT NULL REFERENCES predictflow.backfill_runs ON DELETE CASCADE,
    chunk_number integer     NOT NULL,
    chunk_start  timestamptz NOT NULL,
    chunk_end    timestamptz NOT NULL,
    status       text        NOT NULL DEFAULT 'pending',
    row_count    bigint,
    file_names   text[]      NOT NULL DEFAULT '{}',
    sha256       text[]      NOT NULL DEFAULT '{}',
    error        text,
    started_at   timestamptz,
    finished_at  timestamptz,
    PRIMARY KEY (run_id, chunk_number),
    CHECK (chunk_number >= 0),
    CHECK (chunk_start < chunk_end),
    CHECK (status IN ('pending', 'running', 'done', 'failed')),
    CHECK (cardinality(file_names) = cardinality(sha256)),
    CHECK (status <> 'done' OR (row_count IS NOT NULL AND finished_at IS NOT NULL))
);
COMMENT ON COLUMN predictflow.backfill_chunks.sha256 IS 'Of the files in file_names, in the same order, in hex';
