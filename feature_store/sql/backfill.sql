-- Statements of feature_store/backfill_state.py; parameters are psycopg2's, every time comes from the caller.

-- name: open_run
INSERT INTO predictflow.backfill_runs (run_id, project, feature_view, definition_hash, range_start, range_end, known_by,
                                       status, created_at, updated_at)
VALUES (%(run_id)s, %(project)s, %(view)s, %(definition_hash)s, coalesce(%(start)s, '-infinity'::timestamptz),
        coalesce(%(end)s, 'infinity'::timestamptz), coalesce(%(known_by)s, 'infinity'::timestamptz),
        'running', %(at)s, %(at)s)
ON CONFLICT (run_id) DO UPDATE SET status = 'running', updated_at = excluded.updated_at

-- name: run_status
SELECT status FROM predictflow.backfill_runs WHERE run_id = %(run_id)s

-- name: done_chunk
SELECT row_count, file_names, sha256
FROM predictflow.backfill_chunks
WHERE run_id = %(run_id)s AND chunk_number = %(number)s AND status = 'done'

-- name: done_chunks
SELECT chunk_number, row_count, file_names, sha256
FROM predictflow.backfill_chunks
WHERE run_id = %(run_id)s AND status = 'done'
ORDER BY chunk_number

-- name: start_chunk
INSERT INTO predictflow.backfill_chunks (run_id, chunk_number, chunk_start, chunk_end, status, started_at)
VALUES (%(run_id)s, %(number)s, %(start)s, %(end)s, 'running', %(at)s)
ON CONFLICT (run_id, chunk_number) DO UPDATE
SET status = 'running', row_count = NULL, file_names = '{}', sha256 = '{}', error = NULL, started_at = excluded.started_at,
    finished_at = NULL

-- name: finish_chunk
UPDATE predictflow.backfill_chunks
SET status = 'done', row_count = %(rows)s, file_names = %(files)s, sha256 = %(sha256)s, error = NULL, finished_at = %(at)s
WHERE run_id = %(run_id)s AND chunk_number = %(number)s

-- name: fail_chunk
UPDATE predictflow.backfill_chunks
SET status = 'failed', row_count = NULL, file_names = '{}', sha256 = '{}', error = %(error)s, finished_at = %(at)s
WHERE run_id = %(run_id)s AND chunk_number = %(number)s

-- name: close_run
UPDATE predictflow.backfill_runs SET status = %(status)s, updated_at = %(at)s WHERE run_id = %(run_id)s
