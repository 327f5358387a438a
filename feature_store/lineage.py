"""The words of lineage: nodes, edges and the steps of a walk. Pure data; `registry.py` keeps them in Postgres.

A node is `(kind, name)` and is written `kind:name`, for example `feature:churn_features:tenure_months`. An edge points
the way the data flows: from what was read to what was made of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from datetime import datetime
from typing import NamedTuple

from feature_store.errors import UsageError

KINDS = {
    "column": "a column of a raw table: events.quantity",
    "topic": "a Kafka topic: customer-events",
    "table": "a table of the offline store: churn_features",
    "feature_view": "a feature view: churn_features",
    "feature": "one feature: churn_features:tenure_months",
    "feature_service": "a feature service: churn_v1",
    "training_set": "a training set: the name its run gave it",
    "model_version": "a version of a registered model: churn-predictor/3",
    "endpoint": "what a server answers on: POST /api/v1/predict/churn-predictor",
}
"""Every kind of node, with an example name."""


class Node(NamedTuple):
    """One thing that data flows from or to."""

    kind: str
    name: str

    @classmethod
    def parse(cls, text: str) -> Node:
        """`kind:name` as a Node; UsageError names the valid kinds. Names may hold further colons."""
        kind, colon, name = text.partition(":")
        if kind not in KINDS:
            raise UsageError(
                "unknown kind of lineage node", value=kind, valid=KINDS, next_step="write kind:name, as in topic:events"
            )
        if not colon or not name:
            raise UsageError("lineage node without a name", value=text, next_step=f"write {kind}:NAME, {KINDS[kind]}")
        return cls(kind, name)

    def __str__(self) -> str:
        return f"{self.kind}:{self.name}"


class Edge(NamedTuple):
    """`target` was made from `source`. `transformation` is the text of how (SQL, a definition), its kind says which."""

    source: Node
    target: Node
    transformation_kind: str = ""
    transformation: str = ""


class Step(NamedTuple):
    """One edge met on a walk, `depth` edges away from the start (1: next to it), with the times of its recording."""

    depth: int
    edge: Edge
    run_id: str | None
    recorded_at: datetime
    last_recorded_at: datetime


def as_node(node: Node | tuple[str, str] | str) -> Node:
    """Any of the accepted ways to name a node as a checked Node."""
    if isinstance(node, str):
        return Node.parse(node)
    return Node.parse(f"{node[0]}:{node[1]}")


def as_edges(edges: Iterable[Edge | tuple[object, ...]]) -> list[Edge]:
    """Checked edges, one per (source, target) and sorted, so that concurrent writers lock rows in one order.

    Of two edges with the same ends the later one counts.
    """
    checked: dict[tuple[Node, Node], Edge] = {}
    for given in edges:
        edge = Edge(*given)
        source, target = as_node(edge.source), as_node(edge.target)
        if source == target:
            raise UsageError("lineage edge from a node to itself", value=str(source))
        checked[source, target] = edge._replace(source=source, target=target)
    return [checked[ends] for ends in sorted(checked)]


def shortest_path(steps: Iterable[Step], start: Node, end: Node) -> list[Edge]:
    """The fewest edges that lead from `start` to `end`; empty where none do. Ties go to the first by name."""
    following: dict[Node, list[Edge]] = {}
    for step in sorted(steps, key=lambda s: (s.edge.source, s.edge.target)):
        following.setdefault(step.edge.source, []).append(step.edge)
    came_by: dict[Node, Edge | None] = {start: None}
    queue = deque([start])
    while queue:
        for edge in following.get(queue.popleft(), []):
            if edge.target not in came_by:
                came_by[edge.target] = edge
                queue.append(edge.target)
    path: list[Edge] = []
    edge_before = came_by.get(end)
    while edge_before is not None:
        path.append(edge_before)
        edge_before = came_by[edge_before.source]
    return path[::-1]


def tree(steps: Iterable[Step], start: Node, *, upstream: bool) -> list[str]:
    """Lines that show a walk from `start` as an indented tree; a branch shown before is counted, not shown again."""
    nexts: dict[Node, set[Node]] = {}
    for step in steps:
        near, far = (step.edge.target, step.edge.source) if upstream else (step.edge.source, step.edge.target)
        nexts.setdefault(near, set()).add(far)
    shown = {start}
    lines = [str(start)]

    def show(node: Node, indent: str) -> None:
        again = 0
        # Views first: their features then stand below them, and not beside them.
        for far in sorted(nexts.get(node, ()), key=lambda n: (n.kind != "feature_view", n)):
            if far in shown and far in nexts:
                again += 1
                continue
            shown.add(far)
            lines.append(f"{indent}{far}")
            show(far, indent + "  ")
        if again:
            lines.append(f"{indent}({again} shown above)")

    show(start, "  ")
    return lines
