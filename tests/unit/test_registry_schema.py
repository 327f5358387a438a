"""The files behind the schema, and URLs, before any server is asked."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from feature_store import registry, schema
from feature_store.errors import NotFoundError, UnavailableError, UsageError
from feature_store.postgres import Postgres
from feature_store.registry import FeatureRegistry
from feature_store.sql import blocks

ROOT = Path(__file__).parents[2]


def test_the_migrations_of_the_checkout_are_found_and_in_order() -> None:
    assert schema.migrations_dir() == ROOT / "migrations"
    assert [s.number for s in schema.steps()] == list(range(len(schema.steps())))
    assert len(schema.steps()) >= 3


def test_steps_that_leave_a_gap_or_have_no_number_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "migrations_dir", lambda: tmp_path)
    (tmp_path / "steps").mkdir()
    (tmp_path / "steps" / "000_a.sql").touch()
    (tmp_path / "steps" / "002_b.sql").touch()
    with pytest.raises(schema.SchemaError, match=r"'002_b.sql'; next: name it 001_what.sql"):
        schema.steps()
    (tmp_path / "steps" / "002_b.sql").rename(tmp_path / "steps" / "later.sql")
    with pytest.raises(schema.SchemaError, match=r"'later.sql'"):
        schema.steps()


def test_missing_migrations_are_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(schema, "__file__", str(tmp_path / "feature_store" / "schema.py"))
    monkeypatch.setattr("sys.prefix", str(tmp_path))
    with pytest.raises(NotFoundError, match=rf"tried {tmp_path}/migrations.*make install"):
        schema.migrations_dir()


def test_every_sql_block_is_used_and_every_used_block_exists() -> None:
    used = set(re.findall(r'_block\("(\w+)"\)', Path(registry.__file__).read_text()))
    indirect = {"upstream", "downstream", "feature_names", "node_names"}
    assert used | indirect == set(blocks("registry.sql"))


@pytest.mark.parametrize("url", ["redis://u:secret@h:1/0", "sqlite:///x.db", "", "h:5432/db", "${POSTGRES_URL}"])
def test_only_postgres_urls_are_taken(url: str) -> None:
    with pytest.raises(UsageError, match=r"needs a Postgres URL.*set POSTGRES_URL") as e:
        FeatureRegistry(url)
    assert "secret" not in e.value.message


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg2", "postgresql+psycopg"])
def test_an_unreachable_server_is_named_without_the_password(scheme: str) -> None:
    with pytest.raises(UnavailableError) as e, FeatureRegistry(f"{scheme}://u:hunter2@127.0.0.1:1/shop") as unreachable:
        unreachable.get_features()
    assert "127.0.0.1:1/shop (POSTGRES_URL): Connection refused" in e.value.message
    assert "hunter2" not in repr(e.value.__cause__) + e.value.message


@pytest.mark.parametrize(
    "url", ["postgresql://u:hun@ter2@h:1/x", "postgresql://u:hunter2@h:1/x?bad=1", "postgresql://u:ter2@[h/x"]
)
def test_an_unreadable_url_is_refused_without_the_password(url: str) -> None:
    with pytest.raises(UsageError, match="POSTGRES_URL") as e:
        Postgres(url).address  # noqa: B018  # reading it is the check
    assert "ter2" not in e.value.message
