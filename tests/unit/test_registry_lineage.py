"""Nodes, edges, shortest paths and the printed tree."""

from __future__ import annotations

from datetime import UTC, datetime
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.errors import UsageError
from feature_store.lineage import KINDS, Edge, Node, Step, as_edges, as_node, shortest_path, tree

AT = datetime(2026, 1, 1, tzinfo=UTC)


def step(source: str, target: str, depth: int = 1) -> Step:
    return Step(depth, Edge(Node.parse(source), Node.parse(target)), None, AT, AT)


def test_a_node_is_kind_and_name_and_names_may_hold_colons() -> None:
    node = Node.parse("feature:churn_features:tenure_months")
    assert node == ("feature", "churn_features:tenure_months")
    assert str(node) == "feature:churn_features:tenure_months"
    assert as_node(("topic", "events")) == as_node("topic:events") == Node("topic", "events")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("featur:x:y", "unknown kind of lineage node: 'featur'.*did you mean 'feature'"),
        ("churn_features", "unknown kind of lineage node: 'churn_features'"),
        ("feature:", "lineage node without a name: 'feature:'"),
        ("feature", "lineage node without a name: 'feature'.*feature:NAME"),
        ("", "unknown kind"),
    ],
)
def test_a_wrong_node_is_a_clear_error(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Node.parse(text)


def test_edges_are_checked_sorted_and_the_later_of_two_counts() -> None:
    edges = as_edges(
        [
            (("table", "t"), ("feature_view", "v")),
            Edge(Node("column", "b.x"), Node("feature", "v:f"), "sql", "old"),
            ("column:a.x", "feature:v:f"),
            (("column", "b.x"), ("feature", "v:f"), "sql", "new"),
        ]
    )
    assert [str(e.source) for e in edges] == ["column:a.x", "column:b.x", "table:t"]
    assert [e.transformation for e in edges] == ["", "new", ""]
    with pytest.raises(UsageError, match="to itself"):
        as_edges([("topic:a", "topic:a")])
    with pytest.raises(UsageError, match="unknown kind"):
        as_edges([("topic:a", "tabel:b")])


def test_every_kind_has_an_example() -> None:
    assert all(": " in meaning for meaning in KINDS.values())


ids = st.integers(0, 6)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(ids, ids).filter(lambda e: e[0] != e[1]), max_size=15), ids, ids)
def test_the_shortest_path_is_connected_and_as_short_as_any(pairs: list[tuple[int, int]], a: int, b: int) -> None:
    path = shortest_path(
        [step(f"table:{s}", f"table:{t}") for s, t in pairs], Node("table", f"{a}"), Node("table", f"{b}")
    )
    reach, hops = {a}, 0
    while b not in reach and hops < 8:
        reach |= {t for s, t in pairs if s in reach}
        hops += 1
    if b not in reach or a == b:
        assert path == []
        return
    assert len(path) == hops
    assert (path[0].source.name, path[-1].target.name) == (str(a), str(b))
    assert all(x.target == y.source for x, y in pairwise(path))
    assert {(int(e.source.name), int(e.target.name)) for e in path} <= set(pairs)


def test_the_tree_shows_views_first_repeats_leaves_and_counts_branches_shown_before() -> None:
    steps = [
        step("feature_view:v", "feature_service:s"),
        step("feature:v:a", "feature_service:s"),
        step("feature:v:b", "feature_service:s"),
        step("feature:v:a", "feature_view:v", 2),
        step("feature:v:b", "feature_view:v", 2),
        step("column:t.x", "feature:v:a", 3),
        step("column:t.x", "feature:v:b", 3),
    ]
    assert tree(steps, Node("feature_service", "s"), upstream=True) == [
        "feature_service:s",
        "  feature_view:v",
        "    feature:v:a",
        "      column:t.x",
        "    feature:v:b",
        "      column:t.x",
        "  (2 shown above)",
    ]


def test_the_tree_of_a_cycle_ends() -> None:
    steps = [step("table:a", "table:b"), step("table:b", "table:a")]
    assert tree(steps, Node("table", "a"), upstream=False) == ["table:a", "  table:b", "    (1 shown above)"]
