-- The whole current schema of the feature registry, as migrations/steps/ build it one after the other; a fresh database
-- gets this file, an older one the steps it lacks. tests/integration/test_feature_registry.py proves that both end alike.
-- `predictflow migrate` applies it; nothing here depends on the clock or on data.

-- The schema beside Feast's own tables, and the record of the steps that made it.
CREATE SCHEMA predictflow;
CREATE TABLE predictflow.schema_version (
    step integer PRIMARY KEY,
    name text    NOT NULL
);
COMMENT ON TABLE predictflow.schema_version IS 'The steps of migrations/steps/ that this database has had';

-- Features with their versions, and lineage from raw column to endpoint.
CREATE TABLE predictflow.features (
    project         text        NOT NULL,
    feature_group   text        NOT NULL,
    name            text        NOT NULL,
    version         integer     NOT NULL,
    dtype           text        NOT NULL,
    owner           text        NOT NULL DEFAULT '',
    description     text        NOT NULL DEFAULT '',
    unit            text        NOT NULL DEFAULT '',
    tags            jsonb       NOT NULL DEFAULT '{}',
    definition      jsonb       NOT NULL,
    definition_hash text        NOT NULL,
    created_at      timestamptz NOT NULL,
    updated_at      timestamptz NOT NULL,
    retired_at      timestamptz,
    PRIMARY KEY (project, feature_group, name, version),
    CHECK (version >= 1)
);
COMMENT ON TABLE predictflow.features IS 'One row per version of a feature; a new version only when a value could change';
COMMENT ON COLUMN predictflow.features.feature_group IS 'Feature view';
COMMENT ON COLUMN predictflow.features.definition IS 'What the value depends on: type, entity, expression, source, ttl';
COMMENT ON COLUMN predictflow.features.definition_hash IS '16 hex digits of the SHA-256 of the canonical JSON of definition';
COMMENT ON COLUMN predictflow.features.retired_at IS 'When an apply no longer found it; null: in use or superseded by a newer version';

CREATE TABLE predictflow.feature_lineage (
    project             text        NOT NULL,
    source_kind         text        NOT NULL,
    source_name         text        NOT NULL,
    target_kind         text        NOT NULL,
    target_name         text        NOT NULL,
    transformation_kind text        NOT NULL DEFAULT '',
    transformation      text        NOT NULL DEFAULT '',
    run_id              text,
    recorded_at         timestamptz NOT NULL,
    last_recorded_at    timestamptz NOT NULL,
    retired_at          timestamptz,
    PRIMARY KEY (project, source_kind, source_name, target_kind, target_name)
);
CREATE INDEX feature_lineage_target ON predictflow.feature_lineage (project, target_kind, target_name);
COMMENT ON TABLE predictflow.feature_lineage IS 'Target was made from source; recorded by the step that did it';
COMMENT ON COLUMN predictflow.feature_lineage.run_id IS 'Run that recorded the edge last';
COMMENT ON COLUMN predictflow.feature_lineage.retired_at IS 'When a later definition of the target no longer read the source';

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
