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
