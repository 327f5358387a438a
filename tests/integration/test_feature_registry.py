"""The feature registry on real Postgres: schema and steps alike, versions, lineage, several processes at once."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psycopg2
import pytest
import sqlalchemy
from feast.repo_config import RepoConfig
from sqlalchemy.dialects import plugins

from feature_store import schema
from feature_store.apply_hook import record_apply
from feature_store.errors import NotFoundError, UnavailableError, UsageError
from feature_store.feature import Feature
from feature_store.lineage import Edge, Node
from feature_store.registry import FeatureRegistry

ROOT = Path(__file__).parents[2]
T0 = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


@pytest.fixture
def registry(postgres_url: str) -> Iterator[FeatureRegistry]:
    with FeatureRegistry(postgres_url) as opened:
        yield opened


def execute(url: str, sql: str) -> list[tuple]:
    connection = psycopg2.connect(url.replace("+psycopg2", ""))
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


# Schema

CATALOGUE = """
SELECT 'column', c.table_name, c.ordinal_position::text, c.column_name, c.data_type, c.is_nullable, c.column_default,
       col_description(format('predictflow.%I', c.table_name)::regclass, c.ordinal_position)
FROM information_schema.columns c WHERE c.table_schema = 'predictflow'
UNION ALL
SELECT 'constraint', conrelid::regclass::text, conname, pg_get_constraintdef(oid), '', '', '', ''
FROM pg_constraint WHERE connamespace = 'predictflow'::regnamespace
UNION ALL
SELECT 'index', tablename, indexname, indexdef, '', '', '', '' FROM pg_indexes WHERE schemaname = 'predictflow'
UNION ALL
SELECT 'table', relname, relkind::text, obj_description(oid), '', '', '', ''
FROM pg_class WHERE relnamespace = 'predictflow'::regnamespace
ORDER BY 1, 2, 3, 4
"""


def test_the_whole_schema_equals_the_steps_one_after_the_other(postgres_url: str) -> None:
    execute(postgres_url, (schema.migrations_dir() / "feature_registry.sql").read_text())
    whole = execute(postgres_url, CATALOGUE)
    execute(postgres_url, "DROP SCHEMA predictflow CASCADE")
    for step in schema.steps():
        execute(postgres_url, step.sql())
    assert execute(postgres_url, CATALOGUE) == whole
    assert {row[1] for row in whole if row[0] == "column"} == {
        "schema_version",
        "features",
        "feature_lineage",
        "backfill_runs",
        "backfill_chunks",
    }
    # The comparison would see a difference.
    execute(postgres_url, "ALTER TABLE predictflow.features ALTER COLUMN owner DROP DEFAULT")
    assert execute(postgres_url, CATALOGUE) != whole


def test_migrate_applies_once_and_upgrades_an_older_database_without_losing_rows(
    postgres_url: str, registry: FeatureRegistry
) -> None:
    names = [s.name for s in schema.steps()]
    assert registry.migrate() == names
    assert registry.migrate() == []
    registry.register_feature("v", "f", dtype="Int64", definition={}, at=T0)
    whole = execute(postgres_url, CATALOGUE)
    execute(
        postgres_url,
        "DROP TABLE predictflow.backfill_chunks, predictflow.backfill_runs;"
        "DELETE FROM predictflow.schema_version WHERE step >= 2",
    )
    with FeatureRegistry(postgres_url) as older:
        with pytest.raises(schema.SchemaError, match=r"lacks 002_backfill_runs; next: predictflow migrate"):
            older.get_features()
        assert older.migrate() == ["002_backfill_runs"]
        assert [f.full_name for f in older.get_features()] == ["v:f"]
    assert execute(postgres_url, CATALOGUE) == whole


def test_a_database_newer_than_the_code_is_refused(postgres_url: str, registry: FeatureRegistry) -> None:
    registry.migrate()
    execute(postgres_url, "INSERT INTO predictflow.schema_version VALUES (999, '999_future')")
    with pytest.raises(schema.SchemaError, match="has had migration step 999"):
        registry.migrate()
    with FeatureRegistry(postgres_url) as other, pytest.raises(schema.SchemaError, match="update the checkout"):
        other.get_features()


def test_reading_a_fresh_database_names_the_command_and_writing_makes_the_schema(registry: FeatureRegistry) -> None:
    with pytest.raises(schema.SchemaError, match="no predictflow schema yet; next: predictflow migrate"):
        registry.get_features()
    registry.record_lineage([("topic:a", "feature_view:b")], at=T0)
    assert len(registry.upstream("feature_view:b")) == 1


PROCESS = """
import sys
from datetime import UTC, datetime
from feature_store.feature import Feature
from feature_store.registry import FeatureRegistry
url, number = sys.argv[1], int(sys.argv[2])
at = datetime(2026, 1, 1, tzinfo=UTC)
names = [f"f{i}" for i in range(40)]
if number % 2:
    names.reverse()
with FeatureRegistry(url) as registry:
    if number < 2:
        registry.migrate()
    for _ in range(5):
        registry.register_features([Feature("v", n, "Int64", {"x": 1}) for n in names], at)
        registry.record_lineage([(("feature", f"v:{n}"), ("feature_view", "v")) for n in names], at=at, run_id=str(number))
"""


def test_processes_that_migrate_and_write_at_once_leave_one_of_everything(
    postgres_url: str, registry: FeatureRegistry
) -> None:
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, postgres_url, str(i)], cwd=ROOT, stderr=subprocess.PIPE, text=True
        )
        for i in range(4)
    ]
    assert [(p.communicate(timeout=120)[1], p.returncode) for p in running] == [("", 0)] * 4
    assert registry.migrate() == []
    assert len(registry.get_features(all_versions=True)) == 40
    assert {f.version for f in registry.get_features()} == {1}
    assert len(registry.upstream("feature_view:v")) == 40


def test_first_writers_that_meet_at_a_fresh_database_make_one_schema(postgres_url: str) -> None:
    # Each has already looked and found no schema, which Postgres's caches remember while they wait for the lock.
    count, rounds = 6, 4
    barrier = threading.Barrier(count)

    def write(number: int) -> None:
        with FeatureRegistry(postgres_url) as registry:
            with pytest.raises(schema.SchemaError, match="no predictflow schema"):
                registry.get_features()
            barrier.wait(timeout=60)
            if number % 2:
                registry.migrate()
            registry.register_features([Feature("v", f"f{i}", "Int64", {}) for i in range(5)], T0)

    for _ in range(rounds):
        execute(postgres_url, "DROP SCHEMA IF EXISTS predictflow CASCADE")
        with ThreadPoolExecutor(count) as pool:
            assert list(pool.map(write, range(count))) == [None] * count
        assert execute(postgres_url, "SELECT count(*) FROM predictflow.features") == [(5,)]


# Features


def test_a_new_version_only_when_the_definition_changed(registry: FeatureRegistry) -> None:
    first = registry.register_feature("v", "f", dtype="Int64", definition={"sql": "a"}, at=T0, owner="me", unit="days")
    again = registry.register_feature(
        "v", "f", dtype="Int64", definition={"sql": "a"}, at=T0 + DAY, owner="me", unit="days"
    )
    assert again == first
    assert (first.version, first.created_at, first.updated_at) == (1, T0, T0)
    words = registry.register_feature("v", "f", dtype="Int64", definition={"sql": "a"}, at=T0 + DAY, owner="you")
    assert (words.version, words.owner, words.created_at, words.updated_at) == (1, "you", T0, T0 + DAY)
    changed = registry.register_feature("v", "f", dtype="Int64", definition={"sql": "b"}, at=T0 + 2 * DAY)
    assert (changed.version, changed.created_at) == (2, T0 + 2 * DAY)
    retyped = registry.register_feature("v", "f", dtype="Float64", definition={"sql": "b"}, at=T0 + 3 * DAY)
    assert retyped.version == 3
    assert [f.version for f in registry.get_features(all_versions=True)] == [1, 2, 3]
    assert registry.get_feature("v:f", 1).definition == {"sql": "a"}
    assert registry.get_feature("v:f").dtype == "Float64"


def test_a_definition_that_comes_back_is_a_new_version_of_its_own(registry: FeatureRegistry) -> None:
    for n, text in enumerate(["a", "b", "a"]):
        registry.register_feature("v", "f", dtype="Int64", definition={"sql": text}, at=T0 + n * DAY)
    assert registry.get_feature("v:f").version == 3


def test_features_are_found_by_group_owner_and_words(registry: FeatureRegistry) -> None:
    registry.register_features(
        [
            Feature(
                "churn", "tenure", "Float64", {}, "team-a", "Time since the customer joined", "months", {"pii": "no"}
            ),
            Feature("churn", "charges", "Float64", {}, "team-b", "What the customer pays", "EUR"),
            Feature("behavior", "events_7d", "Int64", {}, "team-a", "Events of 100% of types", "events"),
        ],
        T0,
    )

    def names(**filters: str) -> list[str]:
        return [f.full_name for f in registry.get_features(**filters)]

    assert names() == ["behavior:events_7d", "churn:charges", "churn:tenure"]
    assert names(group="churn") == ["churn:charges", "churn:tenure"]
    assert names(group="churn", owner="team-a") == ["churn:tenure"]
    assert names(text="CUSTOMER joined") == ["churn:tenure"]
    assert names(text="eur") == ["churn:charges"]
    assert names(text="pii") == ["churn:tenure"]
    assert names(text="100%") == ["behavior:events_7d"]  # a sign of LIKE is a sign like any other
    assert names(text="%") == ["behavior:events_7d"]
    assert names(text="tenure charges") == []
    assert names(group="nope") == []


def test_an_unknown_feature_or_version_names_the_nearest(registry: FeatureRegistry) -> None:
    registry.register_feature("churn", "tenure_months", dtype="Float64", definition={}, at=T0)
    with pytest.raises(
        NotFoundError, match=r"no such feature: 'churn:tenure_month'.*did you mean 'churn:tenure_months'"
    ):
        registry.get_feature("churn:tenure_month")
    with pytest.raises(NotFoundError, match="did you mean 'churn:tenure_months'"):
        registry.get_feature("tenure_months")
    with pytest.raises(NotFoundError, match="no such version of feature churn:tenure_months: 2; valid: 1"):
        registry.get_feature("churn:tenure_months", 2)


def test_retired_features_are_hidden_kept_and_come_back(registry: FeatureRegistry) -> None:
    registry.register_features([Feature("v", "a", "Int64", {}), Feature("v", "b", "Int64", {})], T0)
    assert registry.retire_features("v", ["a"], T0 + DAY) == ["v:b"]
    assert registry.retire_features("v", ["a"], T0 + 2 * DAY) == []
    assert [f.name for f in registry.get_features()] == ["a"]
    assert [(f.name, f.retired_at) for f in registry.get_features(retired=True)] == [("a", None), ("b", T0 + DAY)]
    registry.register_features([Feature("v", "b", "Int64", {})], T0 + 3 * DAY)
    assert registry.get_feature("v:b").retired_at is None
    assert registry.get_feature("v:b").version == 1


def test_projects_do_not_see_each_other(postgres_url: str, registry: FeatureRegistry) -> None:
    registry.register_feature("v", "f", dtype="Int64", definition={}, at=T0)
    registry.record_lineage([("feature:v:f", "feature_view:v")], at=T0)
    with FeatureRegistry(postgres_url, project="mine") as mine:
        assert mine.get_features() == []
        with pytest.raises(NotFoundError):
            mine.upstream("feature_view:v")


# Lineage

CHAIN = [
    Edge(Node("column", "accounts.joined_at"), Node("feature", "v:tenure"), "sql", "date_diff(joined_at)"),
    Edge(Node("column", "accounts.joined_at"), Node("table", "v")),
    Edge(Node("feature", "v:tenure"), Node("feature_view", "v")),
    Edge(Node("table", "v"), Node("feature_view", "v")),
    Edge(Node("feature_view", "v"), Node("feature_service", "s")),
    Edge(Node("feature_service", "s"), Node("training_set", "set-1")),
    Edge(Node("training_set", "set-1"), Node("model_version", "churn/3")),
    Edge(Node("model_version", "churn/3"), Node("endpoint", "POST /api/v1/predict/churn")),
]


def test_lineage_leads_from_endpoint_to_column_and_back(registry: FeatureRegistry) -> None:
    assert registry.record_lineage(CHAIN, at=T0, run_id="r1") == len(CHAIN)
    up = registry.upstream("endpoint:POST /api/v1/predict/churn")
    assert {s.edge for s in up} == set(CHAIN)
    assert [s.depth for s in up] == sorted(s.depth for s in up)
    assert (up[0].edge, up[0].depth, up[-1].depth) == (CHAIN[-1], 1, 6)
    assert {s.edge for s in registry.downstream(("column", "accounts.joined_at"))} == set(CHAIN)
    assert [s.edge for s in registry.upstream("model_version:churn/3", depth=2)] == [CHAIN[6], CHAIN[5]]
    assert registry.upstream("column:accounts.joined_at") == []
    path = registry.path("column:accounts.joined_at", "model_version:churn/3")
    assert str(path[0].source) == "column:accounts.joined_at"
    assert len(path) == 5
    assert registry.path("model_version:churn/3", "column:accounts.joined_at") == []


def test_an_edge_recorded_again_is_the_same_edge_with_a_newer_time(
    postgres_url: str, registry: FeatureRegistry
) -> None:
    edge = CHAIN[0]
    registry.record_lineage([edge], at=T0, run_id="r1")
    registry.record_lineage([edge, edge], at=T0 + DAY, run_id="r2")
    # An old run that is repeated later does not turn the newest one back.
    registry.record_lineage([edge._replace(transformation="old")], at=T0 - DAY, run_id="r0")
    (step,) = registry.upstream("feature:v:tenure")
    assert (step.recorded_at, step.last_recorded_at, step.run_id) == (T0, T0 + DAY, "r2")
    assert step.edge.transformation == "date_diff(joined_at)"
    registry.record_lineage([edge._replace(transformation="new")], at=T0 + 2 * DAY)
    (step,) = registry.upstream("feature:v:tenure")
    assert (step.edge.transformation, step.run_id) == ("new", "r2")
    assert execute(postgres_url, "SELECT count(*) FROM predictflow.feature_lineage") == [(1,)]


def test_a_cycle_and_a_wide_diamond_end(registry: FeatureRegistry) -> None:
    registry.record_lineage([("table:a", "table:b"), ("table:b", "table:a")], at=T0)
    assert [s.depth for s in registry.upstream("table:a")] == [1, 2]
    layers = [(f"topic:{i}.{a}", f"topic:{i + 1}.{b}") for i in range(12) for a in range(3) for b in range(3)]
    registry.record_lineage(layers, at=T0)
    assert len(registry.downstream("topic:0.0")) == 3 + 11 * 9


def test_retired_edges_are_left_out_of_walks_and_come_back(registry: FeatureRegistry) -> None:
    registry.record_lineage([("column:t.old", "feature:v:f"), ("column:t.kept", "feature:v:f")], at=T0)
    registry.record_lineage([("column:t.kept", "feature:v:f")], at=T0 + DAY)
    assert registry.retire_lineage([Node("feature", "v:f")], ["column"], T0 + DAY) == 1
    assert [str(s.edge.source) for s in registry.upstream("feature:v:f")] == ["column:t.kept"]
    registry.record_lineage([("column:t.old", "feature:v:f")], at=T0 + 2 * DAY)
    assert len(registry.upstream("feature:v:f")) == 2


def test_a_walk_as_of_a_time_follows_the_edges_that_stood_then(registry: FeatureRegistry) -> None:
    registry.record_lineage([("column:t.old", "feature:v:f"), ("feature:v:f", "feature_view:v")], at=T0)
    registry.record_lineage([("column:t.new", "feature:v:f")], at=T0 + 2 * DAY)
    registry.retire_lineage([Node("feature", "v:f")], ["column"], T0 + 2 * DAY)

    def columns(as_of: datetime | None) -> list[str]:
        steps = registry.upstream("feature_view:v", as_of=as_of)
        return [s.edge.source.name for s in steps if s.edge.source.kind == "column"]

    assert columns(None) == ["t.new"]
    assert columns(T0 + DAY) == ["t.old"]
    assert columns(T0 + 2 * DAY) == ["t.new"]
    assert columns(T0 - DAY) == []
    assert registry.downstream("column:t.old", as_of=T0 + DAY)[-1].edge.target == Node("feature_view", "v")
    assert registry.nodes("column") == [Node("column", "t.new"), Node("column", "t.old")]


def test_wrong_nodes_are_clear_errors(registry: FeatureRegistry) -> None:
    registry.record_lineage(CHAIN, at=T0)
    with pytest.raises(NotFoundError, match=r"'feature:v:tenur'.*did you mean 'feature:v:tenure'"):
        registry.upstream("feature:v:tenur")
    with pytest.raises(NotFoundError, match="'model_version:churn/4'; valid: model_version:churn/3"):
        registry.path("column:accounts.joined_at", "model_version:churn/4")
    with pytest.raises(UsageError, match="unknown kind of lineage node: 'model'"):
        registry.record_lineage([("model:x", "endpoint:y")], at=T0)
    with pytest.raises(UsageError, match="at least 1: 0"):
        registry.upstream("feature:v:tenure", depth=0)


def test_a_transaction_is_all_or_nothing_even_for_the_schema(registry: FeatureRegistry) -> None:
    def fail_after_a_write() -> None:
        with registry.transaction():
            registry.register_feature("v", "f", dtype="Int64", definition={}, at=T0)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail_after_a_write()
    with pytest.raises(schema.SchemaError, match="no predictflow schema"):
        registry.get_features()
    registry.register_feature("v", "g", dtype="Int64", definition={}, at=T0)
    assert [f.name for f in registry.get_features()] == ["g"]


def test_the_next_call_connects_again_after_the_server_dropped_the_connection(
    postgres_url: str, registry: FeatureRegistry
) -> None:
    registry.migrate()
    execute(
        postgres_url,
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
        "WHERE datname = current_database() AND pid <> pg_backend_pid()",
    )
    with pytest.raises(UnavailableError, match="POSTGRES_URL"):
        registry.get_features()
    assert registry.get_features() == []


def test_a_database_that_does_not_exist_is_a_clear_error(postgres_url: str) -> None:
    with pytest.raises(UnavailableError, match='database "nowhere" does not exist'):
        FeatureRegistry(postgres_url.rpartition("/")[0] + "/nowhere").migrate()


def test_the_engine_plugin_makes_feasts_own_connect_errors_one_line(postgres_url: str) -> None:
    plugins.register("predictflow", "feature_store.sqlalchemy_plugin", "ClearErrors")
    refused = sqlalchemy.create_engine("postgresql+psycopg2://u:hunter2@127.0.0.1:1/d", plugins=["predictflow"])
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:1/d \(POSTGRES_URL\): Connection refused") as e:
        refused.connect()
    assert "hunter2" not in e.value.message
    engine = sqlalchemy.create_engine(postgres_url, plugins=["predictflow"])
    with engine.connect() as connection, pytest.raises(sqlalchemy.exc.ProgrammingError):
        connection.execute(sqlalchemy.text("SELECT * FROM nowhere"))
    engine.dispose()


# Apply


def test_an_apply_registers_retires_and_replaces_edges(postgres_url: str, registry: FeatureRegistry) -> None:
    from feast import Entity, FeatureService, FeatureView, Field, FileSource, ValueType
    from feast.types import Float64

    customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)

    def view(sql: str, *names: str) -> FeatureView:
        source = FileSource(name="src", path="v", timestamp_field="event_timestamp", tags={"predictflow.sql": sql})
        fields = [Field(name=n, dtype=Float64) for n in names]
        return FeatureView(name="v", entities=[customer], schema=fields, source=source, ttl=DAY)

    config = RepoConfig(
        project="predictflow",
        provider="local",
        registry={"registry_type": "sql", "path": postgres_url},
        entity_key_serialization_version=3,
    )

    def apply(v: FeatureView, day: int, services: tuple[str, ...] = ("s",)) -> None:
        record_apply(config, [v], [FeatureService(name=n, features=[v]) for n in services], T0 + day * DAY)

    first = view("SELECT joined_at AS a, monthly_charges AS b FROM accounts", "a", "b")
    apply(first, 0)
    apply(first, 1)
    assert {(f.name, f.version) for f in registry.get_features()} == {("a", 1), ("b", 1)}
    assert registry.path("column:accounts.joined_at", "feature_service:s")[0].target == Node("feature", "v:a")

    second = view("SELECT created AS a FROM accounts", "a")
    apply(second, 2)
    assert [(f.name, f.version) for f in registry.get_features()] == [("a", 2)]
    assert {str(s.edge.source) for s in registry.upstream("feature_service:s")} == {
        "feature_view:v",
        "feature:v:a",
        "column:accounts.created",
        "table:v",
    }
    assert [s.edge for s in registry.downstream("column:accounts.monthly_charges")] == []

    apply(second, 3, services=("s", "t"))
    kept = [FeatureService(name="t", features=[second])]
    record_apply(config, [second], kept, T0 + 4 * DAY, services_complete=True)
    assert [str(s.edge.target) for s in registry.downstream("feature_view:v")] == ["feature_service:t"]

    record_apply(config, [], [], T0 + 5 * DAY, deleted_views=[second])
    assert registry.get_features() == []
    assert registry.upstream("feature_view:v") == []


def test_a_failed_apply_leaves_the_catalogue_as_it_was(
    postgres_url: str, registry: FeatureRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    from feast import FeatureView, Field, FileSource
    from feast.types import Float64

    registry.migrate()
    config = RepoConfig(
        project="predictflow",
        provider="local",
        registry={"registry_type": "sql", "path": postgres_url},
        entity_key_serialization_version=3,
    )
    source = FileSource(name="src", path="v", timestamp_field="event_timestamp")
    view = FeatureView(name="v", entities=[], schema=[Field(name="f", dtype=Float64)], source=source)

    def broken(*_: object, **__: object) -> int:
        raise UnavailableError("gone")

    monkeypatch.setattr(FeatureRegistry, "retire_lineage", broken)
    with pytest.raises(UnavailableError):
        record_apply(config, [view], [], T0)
    assert registry.get_features(retired=True) == []
