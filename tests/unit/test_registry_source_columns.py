"""Raw columns behind each output column of a source's SQL."""

from __future__ import annotations

import pytest

from feature_store.errors import DefinitionError
from feature_store.source_columns import columns_of


def columns(sql: str) -> dict[str, tuple[str, ...]]:
    return {name: c.columns for name, c in columns_of(sql, "view v").items()}


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT joined_at FROM accounts", {"joined_at": ("accounts.joined_at",)}),
        (
            "SELECT date_diff('day', joined_at, event_timestamp) / 30.4375 AS m FROM accounts",
            {"m": ("accounts.event_timestamp", "accounts.joined_at")},
        ),
        ("SELECT Quantity AS Q FROM Events", {"q": ("events.quantity",)}),
        (
            "SELECT quantity, joined_at FROM accounts JOIN events ON accounts.created = events.created",
            {"quantity": ("events.quantity",), "joined_at": ("accounts.joined_at",)},
        ),
        (
            "WITH x AS (SELECT customer_id, sum(amount_cents) AS s FROM events GROUP BY 1) "
            "SELECT x.s / 100 AS spend FROM accounts a JOIN x USING (customer_id)",
            {"spend": ("events.amount_cents",)},
        ),
        (
            "SELECT monthly_charges AS v FROM accounts UNION ALL SELECT quantity FROM events",
            {"v": ("accounts.monthly_charges", "events.quantity")},
        ),
        ("SELECT count(*) AS n FROM events", {"n": ("events.*",)}),
        ("SELECT a + b AS c FROM own_table", {"c": ("own_table.a", "own_table.b")}),
    ],
)
def test_raw_columns_are_found(sql: str, expected: dict[str, tuple[str, ...]]) -> None:
    assert columns(sql) == expected


def test_a_star_is_resolved_to_the_columns_of_the_raw_table() -> None:
    found = columns("SELECT * FROM events")
    assert found["amount_cents"] == ("events.amount_cents",)
    assert set(found) >= {"event_id", "customer_id", "event_timestamp", "created", "quantity"}


def test_the_rest_of_the_statement_belongs_to_a_column() -> None:
    plain = columns_of("SELECT quantity AS q, event_type FROM events", "v")["q"]
    filtered = columns_of("SELECT quantity AS q FROM events WHERE quantity > 0", "v")["q"]
    spaced = columns_of("select   quantity as q\nfrom events -- all of them\n", "v")["q"]
    assert plain.statement != filtered.statement
    assert (
        (plain.expression, plain.columns)
        == (filtered.expression, filtered.columns)
        == (spaced.expression, spaced.columns)
    )


@pytest.mark.parametrize(
    "sql", ["", "SELEC x", "DELETE FROM events", "SELECT 1 AS a; SELECT 2 AS b", "SELECT a b c FROM"]
)
def test_what_is_not_one_readable_select_is_refused(sql: str) -> None:
    with pytest.raises(DefinitionError, match=r"view v: predictflow\.sql") as e:
        columns_of(sql, "view v")
    assert "\x1b" not in e.value.message
    assert "\n" not in e.value.message
