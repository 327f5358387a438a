"""The catalogue on Postgres: features with their versions, and lineage from raw column to endpoint.

Feast's own tables stay Feast's; these stand beside them in the schema `predictflow` (`migrations/`). SQL is in
`sql/registry.sql`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any

from feature_store import schema
from feature_store.errors import NotFoundError, UsageError
from feature_store.feature import Feature, RegisteredFeature
from feature_store.lineage import Edge, Node, Step, as_edges, as_node, shortest_path
from feature_store.postgres import Postgres
from feature_store.sql import blocks

if TYPE_CHECKING:
    from psycopg2.extensions import cursor as Cursor

MAX_DEPTH = 64
"""Deepest walk: far beyond raw column to endpoint (about 7), and a bound should a step ever read what it wrote."""


class FeatureRegistry:
    """Features and lineage of one Feast project.

    `url` is `postgresql://` or SQLAlchemy's `postgresql+psycopg2://`. Connects on first use, and again after the server
    was away; `close()` or a `with` block ends the connection. Threads may share it: calls take turns. Writing to a
    database without the schema makes it. Errors: UnavailableError when Postgres does not answer, SchemaError when
    its schema is older or newer than this code. Times are passed in and come back as aware UTC datetimes.
    """

    def __init__(self, url: str, project: str = "predictflow") -> None:
        self.project = project
        self._postgres = Postgres(url)
        self._checked = False
        self._sql: dict[str, str] = {}

    def __enter__(self) -> FeatureRegistry:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection; the next call opens a new one. Safe to call twice."""
        self._postgres.close()
        self._checked = False

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Calls inside the block are committed together, or not at all when it raises. May be nested."""
        try:
            with self._writing():
                yield
        except BaseException:
            self._checked = False  # a schema made in here is gone again
            raise

    # Schema

    def migrate(self) -> list[str]:
        """Bring the schema up to date; the names of the steps taken, empty if none. Safe to run twice and at once."""
        with self._postgres.transaction() as cursor:
            return schema.migrate(cursor)

    # Features

    def register_feature(
        self,
        group: str,
        name: str,
        *,
        dtype: str,
        definition: Mapping[str, object],
        at: datetime,
        owner: str = "",
        description: str = "",
        unit: str = "",
        tags: Mapping[str, str] | None = None,
    ) -> RegisteredFeature:
        """Register one feature of feature view `group` at time `at`; see `register_features`."""
        feature = Feature(group, name, dtype, definition, owner, description, unit, tags or {})
        with self.transaction():
            self.register_features([feature], at)
            return self.get_feature(feature.full_name)

    def register_features(self, features: Iterable[Feature], at: datetime) -> list[str]:
        """Register features at `at`; the full names of those that got a new version.

        A new version is opened only when the definition differs from the newest one's; changed words (owner,
        description, unit, tags) are updated in place. Safe to run twice, and from several processes at once.
        """
        wanted = {f.full_name: f for f in features}
        if not wanted:
            return []
        from psycopg2.extras import Json, execute_values

        with self._writing() as cursor:
            groups = sorted({f.group for f in wanted.values()})
            cursor.execute(self._block("latest_versions"), {"project": self.project, "groups": groups})
            latest = {f"{row[0]}:{row[1]}": (row[2], row[3]) for row in cursor.fetchall()}
            new, kept = [], []
            for full_name, f in sorted(wanted.items()):
                version, standing = latest.get(full_name, (0, None))
                words = (f.owner, f.description, f.unit, Json(dict(f.tags)))
                if standing == f.definition_hash:
                    kept.append((self.project, f.group, f.name, version, *words, at))
                else:
                    definition = (Json(dict(f.definition)), f.definition_hash)
                    new.append((self.project, f.group, f.name, version + 1, f.dtype, *words, *definition, at, at))
            if new:
                execute_values(cursor, self._block("insert_features"), new)
            if kept:
                types = "(%s, %s, %s, %s::integer, %s, %s, %s, %s::jsonb, %s::timestamptz)"
                execute_values(cursor, self._block("update_features"), kept, template=types)
            return [f"{row[1]}:{row[2]}" for row in new]

    def retire_features(self, group: str, keep: Iterable[str], at: datetime) -> list[str]:
        """Mark the features of `group` that are not in `keep` as no longer in use since `at`; their full names.

        Their versions stay; registering one again brings it back. Safe to run twice.
        """
        with self._writing() as cursor:
            names = {"project": self.project, "feature_group": group, "keep": list(keep), "at": at}
            cursor.execute(self._block("retire_features"), names)
            return sorted({f"{group}:{row[0]}" for row in cursor.fetchall()})

    def get_features(
        self,
        group: str | None = None,
        owner: str | None = None,
        text: str | None = None,
        *,
        all_versions: bool = False,
        retired: bool = False,
    ) -> list[RegisteredFeature]:
        """The newest version (or all) of each feature in use (or retired too), by group and name.

        `text`: every word of it must occur, in any case, in group, name, owner, description, unit or tags.
        """
        return self._features(
            group=group, owner=owner, words=(text or "").split(), all_versions=all_versions, retired=retired
        )

    def get_feature(self, name: str, version: int | None = None) -> RegisteredFeature:
        """The newest or the given version of `group:name`; NotFoundError with the nearest names or valid versions."""
        group, _, short = name.partition(":")
        found = self._features(group=group, name=short, all_versions=True, retired=True)
        chosen = [f for f in found if version in (None, f.version)]
        if chosen:
            return chosen[-1]
        if found:
            raise NotFoundError(f"no such version of feature {name}", value=version, valid=[f.version for f in found])
        raise NotFoundError("no such feature", value=name, valid=self._column("feature_names"))

    # Lineage

    def record_lineage(
        self, edges: Iterable[Edge | tuple[Any, ...]], *, at: datetime, run_id: str | None = None
    ) -> int:
        """Record that targets were made from sources at `at`, by the run `run_id`; the number of distinct edges.

        An edge recorded again keeps its first time, and takes the newer run, transformation and last time: safe to run
        twice, and from several processes at once. UsageError for an unknown kind of node.
        """
        checked = as_edges(edges)
        if not checked:
            return 0
        from psycopg2.extras import execute_values

        rows = [(self.project, *e.source, *e.target, *e[2:], run_id, at, at) for e in checked]
        with self._writing() as cursor:
            execute_values(cursor, self._block("upsert_edges"), rows, page_size=1000)
        return len(checked)

    def retire_lineage(self, targets: Iterable[Node], source_kinds: Sequence[str], at: datetime) -> int:
        """End the edges from `source_kinds` into `targets` that were last recorded before `at`; their number.

        For a step that has just recorded, at `at`, all that its targets are made from. Safe to run twice.
        """
        by_kind: dict[str, list[str]] = {}
        for target in sorted(set(targets)):
            by_kind.setdefault(target.kind, []).append(target.name)
        ended = 0
        with self._writing() as cursor:
            for kind, names in by_kind.items():
                values = {"target_kind": kind, "targets": names, "source_kinds": list(source_kinds), "at": at}
                cursor.execute(self._block("retire_edges"), {"project": self.project, **values})
                ended += cursor.rowcount
        return ended

    def upstream(
        self, node: Node | tuple[str, str] | str, depth: int | None = None, *, as_of: datetime | None = None
    ) -> list[Step]:
        """What `node` was made from, at most `depth` edges away (default: all), nearest first.

        `as_of`: by the edges that stood then (default: now), for instance when a model was trained.
        NotFoundError with the nearest names when no edge has ever named `node`; an empty list at a raw source.
        """
        return self._walk("upstream", as_node(node), depth, as_of)

    def downstream(
        self, node: Node | tuple[str, str] | str, depth: int | None = None, *, as_of: datetime | None = None
    ) -> list[Step]:
        """What was made from `node`; arguments and errors as for `upstream`."""
        return self._walk("downstream", as_node(node), depth, as_of)

    def nodes(self, kind: str) -> list[Node]:
        """Every node of `kind` that an edge has ever named, by name."""
        return [node for node in map(Node.parse, self._column("node_names")) if node.kind == kind]

    def path(self, start: Node | tuple[str, str] | str, end: Node | tuple[str, str] | str) -> list[Edge]:
        """The shortest chain of edges from `start` down to `end`; empty where there is none. Errors as `upstream`."""
        first, last = as_node(start), as_node(end)
        steps = self._walk("downstream", first, None)
        self._require_node(last)
        return shortest_path(steps, first, last)

    # Inside

    def _features(self, **filters: object) -> list[RegisteredFeature]:
        defaults: dict[str, object] = {"group": None, "name": None, "version": None, "owner": None, "words": []}
        with self._reading() as cursor:
            cursor.execute(self._block("get_features"), {"project": self.project, **defaults, **filters})
            rows = cursor.fetchall()
        return [
            RegisteredFeature(
                group=r[1],
                name=r[2],
                version=r[3],
                dtype=r[4],
                owner=r[5],
                description=r[6],
                unit=r[7],
                tags=r[8],
                definition=r[9],
                created_at=r[11],
                updated_at=r[12],
                retired_at=r[13],
            )
            for r in rows
        ]

    def _walk(self, direction: str, node: Node, depth: int | None, as_of: datetime | None = None) -> list[Step]:
        if depth is not None and depth < 1:
            raise UsageError("depth of a lineage walk must be at least 1", value=depth)
        values = {"kind": node.kind, "name": node.name, "depth": min(depth or MAX_DEPTH, MAX_DEPTH), "as_of": as_of}
        with self._reading() as cursor:
            statement = self._block(direction).replace("{stands}", self._block("stands"))
            cursor.execute(statement, {"project": self.project, **values})
            rows = cursor.fetchall()
        if not rows:
            self._require_node(node)
        return [Step(r[0], Edge(Node(r[1], r[2]), Node(r[3], r[4]), r[5], r[6]), r[7], r[8], r[9]) for r in rows]

    def _require_node(self, node: Node) -> None:
        names = self._column("node_names")
        if str(node) not in names:
            same_kind = [n for n in names if n.startswith(f"{node.kind}:")]
            raise NotFoundError("no lineage recorded for this node", value=str(node), valid=same_kind or names)

    def _column(self, block: str) -> list[str]:
        with self._reading() as cursor:
            cursor.execute(self._block(block), {"project": self.project})
            return [row[0] for row in cursor.fetchall()]

    def _block(self, name: str) -> str:
        self._sql = self._sql or blocks("registry.sql")
        return self._sql[name]

    @contextmanager
    def _reading(self) -> Iterator[Cursor]:
        with self._postgres.transaction() as cursor:
            if not self._checked:
                schema.require_current(cursor)
            yield cursor
        self._checked = True

    @contextmanager
    def _writing(self) -> Iterator[Cursor]:
        with self._postgres.transaction() as cursor:
            if not self._checked:
                schema.ensure(cursor)
            cursor.execute(self._block("lock_project"), {"project": self.project})
            yield cursor
        # Only after the commit: a schema made in a transaction that was rolled back is gone again.
        self._checked = True
