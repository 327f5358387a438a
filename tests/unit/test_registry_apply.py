"""What an apply says of views and services: features with definitions, edges from column to service, collisions."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import mmh3
import pandas as pd
import pytest
from feast import Entity, FeatureService, FeatureView, Field, FileSource, RequestSource, ValueType
from feast.on_demand_feature_view import on_demand_feature_view
from feast.repo_config import RepoConfig
from feast.types import Float64, Int64

from feature_store.apply_hook import check_field_collisions, describe, record_apply
from feature_store.errors import DefinitionError
from feature_store.windows.declare import event_source, windowed_feature_view

customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
SQL = "SELECT customer_id, event_timestamp, created, 12 * monthly_charges AS yearly, joined_at AS joined FROM accounts"


def row_view(
    name: str = "account", fields: tuple[str, ...] = ("yearly",), sql: str | None = SQL, **source: Any
) -> FeatureView:
    return FeatureView(
        name=name,
        entities=[customer],
        ttl=timedelta(days=30),
        schema=[Field(name=f, dtype=Float64, description=f"the {f}", tags={"unit": "u", "pii": "no"}) for f in fields],
        source=FileSource(
            name=f"{name}_source",
            path=name,
            timestamp_field="event_timestamp",
            tags={"predictflow.sql": sql} if sql else {},
            **source,
        ),
        owner="me",
        tags={"domain": "account"},
    )


def windowed_view(days: int = 7, kind: str = "ticket") -> FeatureView:
    window = f"OVER (PARTITION BY customer_id ORDER BY event_timestamp RANGE INTERVAL '{days}' DAYS PRECEDING)"
    return windowed_feature_view(
        name="activity",
        entity=customer,
        source=event_source(topic="customer-events", columns={"kind": "string", "n": "int64"}),
        history_sql="SELECT customer_id, event_type AS kind, event_timestamp, created, quantity + amount_cents AS n FROM events",
        sql=f"SELECT SUM(n) {window} AS n_7d, COUNT(*) FILTER (WHERE kind = '{kind}') {window} AS tickets_7d FROM events",
        features={"n_7d": ("d", "items")},
        ttl=timedelta(days=60),
        owner="me",
    )


def edges(*views: Any, services: tuple[FeatureService, ...] = ()) -> set[tuple[str, str]]:
    return {(str(e.source), str(e.target)) for e in describe(views, services).edges}


def hashes(*views: Any) -> dict[str, str]:
    return {f.full_name: f.definition_hash for f in describe(views, []).features}


def test_a_row_view_leads_from_the_columns_of_its_sql_to_its_service() -> None:
    view = row_view()
    assert edges(view, services=(FeatureService(name="s", features=[view]),)) == {
        ("table:account", "feature_view:account"),
        ("column:accounts.monthly_charges", "feature:account:yearly"),
        ("feature:account:yearly", "feature_view:account"),
        ("feature_view:account", "feature_service:s"),
        ("feature:account:yearly", "feature_service:s"),
    }


def test_a_feature_carries_the_words_and_tags_that_a_person_wrote() -> None:
    (feature,) = describe([row_view()], []).features
    assert (feature.full_name, feature.dtype, feature.unit, feature.owner) == ("account:yearly", "Float64", "u", "me")
    assert feature.description == "the yearly"
    assert feature.tags == {"domain": "account", "pii": "no"}
    assert feature.definition["expression"] == "12 * monthly_charges"


def test_a_windowed_view_leads_from_the_raw_columns_behind_value_filter_and_time() -> None:
    found = {e for e in edges(windowed_view()) if e[0].startswith("column:")}
    assert found == {
        ("column:events.quantity", "feature:activity:n_7d"),
        ("column:events.amount_cents", "feature:activity:n_7d"),
        ("column:events.event_timestamp", "feature:activity:n_7d"),
        ("column:events.event_type", "feature:activity:tickets_7d"),
        ("column:events.event_timestamp", "feature:activity:tickets_7d"),
    }


def test_the_internal_state_of_a_windowed_view_is_no_feature() -> None:
    applied = describe([windowed_view()], [FeatureService(name="s", features=[windowed_view()])])
    assert applied.views == {"activity": ["n_7d", "tickets_7d"]}
    assert not [e for e in applied.edges if "window_state" in f"{e.source} {e.target}"]


def test_without_sql_the_fields_of_the_source_are_the_columns_mapping_included() -> None:
    view = row_view(fields=("yearly", "tenure"), sql=None, field_mapping={"raw_tenure": "tenure"})
    assert {e for e in edges(view) if e[0].startswith("column:")} == {
        ("column:account_source.yearly", "feature:account:yearly"),
        ("column:account_source.raw_tenure", "feature:account:tenure"),
    }


def test_a_source_outside_of_the_offline_store_is_named_not_located() -> None:
    source = FileSource(name="elsewhere", path="/data/x.parquet", timestamp_field="event_timestamp")
    view = FeatureView(name="v", entities=[customer], schema=[Field(name="f", dtype=Int64)], source=source)
    assert ("table:elsewhere", "feature_view:v") in edges(view)


def test_a_service_that_selects_features_is_fed_by_those_alone() -> None:
    view = row_view(fields=("yearly", "joined"))
    found = edges(view, services=(FeatureService(name="s", features=[view[["joined"]]]),))
    assert ("feature:account:joined", "feature_service:s") in found
    assert ("feature:account:yearly", "feature_service:s") not in found


def test_an_on_demand_view_is_made_from_its_input_features_and_request_fields() -> None:
    request = RequestSource(name="request", schema=[Field(name="rate", dtype=Float64)])

    @on_demand_feature_view(sources=[row_view(), request], schema=[Field(name="converted", dtype=Float64)])
    def converted_charges(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"converted": inputs["yearly"] * inputs["rate"]})

    assert edges(converted_charges) == {
        ("feature:account:yearly", "feature:converted_charges:converted"),
        ("column:request.rate", "feature:converted_charges:converted"),
        ("feature:converted_charges:converted", "feature_view:converted_charges"),
    }


def test_only_what_changes_a_value_changes_the_hash() -> None:
    before = hashes(row_view(fields=("yearly", "joined")), windowed_view())
    reworded = row_view(fields=("yearly", "joined"), sql=SQL.replace(" FROM", "\n  from"))
    reworded.owner, reworded.description = "you", "other words"
    assert hashes(reworded, windowed_view()) == before

    def changed(*views: Any) -> set[str]:
        return {name for name, h in hashes(*views).items() if before[name] != h}

    two = ("yearly", "joined")
    assert changed(row_view(fields=two, sql=SQL.replace("12 *", "13 *"))) == {"account:yearly"}
    assert changed(row_view(fields=two, sql=f"{SQL} WHERE contract_months > 1")) == {"account:yearly", "account:joined"}
    assert changed(windowed_view(days=8)) == {"activity:n_7d", "activity:tickets_7d"}
    assert changed(windowed_view(kind="call")) == {"activity:tickets_7d"}
    longer = row_view(fields=two)
    longer.ttl = timedelta(days=31)
    assert changed(longer) == {"account:yearly", "account:joined"}


def test_unreadable_sql_is_an_error_that_names_the_source() -> None:
    with pytest.raises(DefinitionError, match=r"source account_source: predictflow\.sql"):
        describe([row_view(sql="SELECT FROM FROM")], [])


def test_two_fields_with_one_redis_field_are_refused_within_and_across_views() -> None:
    seen: dict[int, str] = {}
    number = 0
    while (name := f"account:f{number}") and (h := mmh3.hash(name, signed=False)) not in seen:
        seen[h] = name
        number += 1
    first, second = seen[h].partition(":")[2], name.partition(":")[2]
    with pytest.raises(DefinitionError, match=f"account:{first} and account:{second} have the same Redis field"):
        check_field_collisions([row_view(fields=(first, second))])
    check_field_collisions([row_view(fields=(first,)), row_view("other", fields=(second,))])
    # One view given twice (Feast passes updated and kept ones) is no collision.
    check_field_collisions([row_view(fields=(first,)), row_view(fields=(first,))])


def test_a_registry_that_is_not_postgres_is_left_alone() -> None:
    config = RepoConfig(
        project="p", provider="local", registry="/nowhere/registry.db", entity_key_serialization_version=3
    )
    record_apply(config, [row_view()], [], at=pd.Timestamp("2026-01-01", tz="UTC").to_pydatetime())
