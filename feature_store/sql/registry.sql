-- Statements of feature_store/registry.py; parameters are psycopg2's, every time comes from the caller.

-- name: lock_project
-- One writer of a project at a time: versions are numbered from what stands there, and writers cannot deadlock.
SELECT pg_advisory_xact_lock(hashtextextended('predictflow.project/' || %(project)s, 0))

-- name: latest_versions
SELECT DISTINCT ON (feature_group, name) feature_group, name, version, definition_hash, retired_at IS NOT NULL
FROM predictflow.features
WHERE project = %(project)s AND feature_group = ANY (%(groups)s)
ORDER BY feature_group, name, version DESC

-- name: insert_features
INSERT INTO predictflow.features (project, feature_group, name, version, dtype, owner, description, unit, tags,
                                  definition, definition_hash, created_at, updated_at)
VALUES %s

-- name: update_features
-- Words about a feature may change without a new version; an unchanged row is not touched.
UPDATE predictflow.features AS f
SET owner = v.owner, description = v.description, unit = v.unit, tags = v.tags, updated_at = v.at, retired_at = NULL
FROM (VALUES %s) AS v (project, feature_group, name, version, owner, description, unit, tags, at)
WHERE (f.project, f.feature_group, f.name, f.version) = (v.project, v.feature_group, v.name, v.version)
  AND (f.owner, f.description, f.unit, f.tags, f.retired_at)
      IS DISTINCT FROM (v.owner, v.description, v.unit, v.tags, NULL::timestamptz)

-- name: retire_features
UPDATE predictflow.features
SET retired_at = %(at)s, updated_at = %(at)s
WHERE project = %(project)s AND feature_group = %(feature_group)s AND NOT name = ANY (%(keep)s) AND retired_at IS NULL
RETURNING name

-- name: get_features
SELECT project, feature_group, name, version, dtype, owner, description, unit, tags, definition, definition_hash,
       created_at, updated_at, retired_at
FROM predictflow.features AS f
WHERE project = %(project)s
  AND (%(group)s::text IS NULL OR feature_group = %(group)s)
  AND (%(name)s::text IS NULL OR name = %(name)s)
  AND (%(version)s::integer IS NULL OR version = %(version)s)
  AND (%(owner)s::text IS NULL OR owner = %(owner)s)
  AND (%(retired)s OR retired_at IS NULL)
  AND (%(all_versions)s OR NOT EXISTS (
        SELECT FROM predictflow.features AS newer
        WHERE (newer.project, newer.feature_group, newer.name) = (f.project, f.feature_group, f.name)
          AND newer.version > f.version))
  AND NOT EXISTS (
        SELECT FROM unnest(%(words)s::text[]) AS word
        WHERE strpos(lower(concat_ws(' ', feature_group, name, owner, description, unit, tags::text)), lower(word)) = 0)
ORDER BY feature_group, name, version

-- name: feature_names
SELECT DISTINCT feature_group || ':' || name FROM predictflow.features WHERE project = %(project)s ORDER BY 1

-- name: upsert_edges
-- An edge met again keeps its first time; a replay of an old run does not turn the newest one back.
INSERT INTO predictflow.feature_lineage AS l (project, source_kind, source_name, target_kind, target_name,
                                              transformation_kind, transformation, run_id, recorded_at, last_recorded_at)
VALUES %s
ON CONFLICT (project, source_kind, source_name, target_kind, target_name) DO UPDATE
SET transformation_kind = excluded.transformation_kind,
    transformation = excluded.transformation,
    run_id = coalesce(excluded.run_id, l.run_id),
    last_recorded_at = excluded.last_recorded_at,
    retired_at = NULL
WHERE excluded.last_recorded_at >= l.last_recorded_at

-- name: retire_edges
-- Edges into one of the given nodes from the given kinds of source, that were not recorded just now.
UPDATE predictflow.feature_lineage
SET retired_at = %(at)s
WHERE project = %(project)s
  AND target_kind = %(target_kind)s
  AND target_name = ANY (%(targets)s)
  AND source_kind = ANY (%(source_kinds)s)
  AND retired_at IS NULL
  AND last_recorded_at < %(at)s

-- name: stands
-- Whether the edge e stood at a time (null: stands now).
((e.retired_at IS NULL OR e.retired_at > %(as_of)s) AND (%(as_of)s::timestamptz IS NULL OR e.recorded_at <= %(as_of)s))

-- name: upstream
-- Depth is bounded, so a cycle (a step that reads what it wrote) ends too.
WITH RECURSIVE walk AS (
    SELECT 1 AS depth, e.*
    FROM predictflow.feature_lineage AS e
    WHERE (e.project, e.target_kind, e.target_name) = (%(project)s, %(kind)s, %(name)s) AND {stands}
    UNION
    SELECT w.depth + 1, e.*
    FROM walk AS w
    JOIN predictflow.feature_lineage AS e
      ON (e.project, e.target_kind, e.target_name) = (w.project, w.source_kind, w.source_name)
    WHERE w.depth < %(depth)s AND {stands}
)
SELECT min(depth), source_kind, source_name, target_kind, target_name, transformation_kind, transformation, run_id,
       recorded_at, last_recorded_at
FROM walk
GROUP BY source_kind, source_name, target_kind, target_name, transformation_kind, transformation, run_id, recorded_at,
         last_recorded_at
ORDER BY 1, 2, 3, 4, 5

-- name: downstream
WITH RECURSIVE walk AS (
    SELECT 1 AS depth, e.*
    FROM predictflow.feature_lineage AS e
    WHERE (e.project, e.source_kind, e.source_name) = (%(project)s, %(kind)s, %(name)s) AND {stands}
    UNION
    SELECT w.depth + 1, e.*
    FROM walk AS w
    JOIN predictflow.feature_lineage AS e
      ON (e.project, e.source_kind, e.source_name) = (w.project, w.target_kind, w.target_name)
    WHERE w.depth < %(depth)s AND {stands}
)
SELECT min(depth), source_kind, source_name, target_kind, target_name, transformation_kind, transformation, run_id,
       recorded_at, last_recorded_at
FROM walk
GROUP BY source_kind, source_name, target_kind, target_name, transformation_kind, transformation, run_id, recorded_at,
         last_recorded_at
ORDER BY 1, 2, 3, 4, 5

-- name: node_names
-- Every node that an edge has ever named.
SELECT source_kind || ':' || source_name FROM predictflow.feature_lineage WHERE project = %(project)s
UNION
SELECT target_kind || ':' || target_name FROM predictflow.feature_lineage WHERE project = %(project)s
ORDER BY 1
