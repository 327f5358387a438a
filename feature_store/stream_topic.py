"""Which views a topic feeds, opened for streaming: windowed views with their log's record checked, ordinary ones beside."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from feature_store.clock import ClockMode
from feature_store.errors import DataError, NotFoundError
from feature_store.row_view import RowView, topic_of
from feature_store.stream_view import StreamView
from feature_store.topic_record import (
    TopicRecord,
    read_record,
    refuse_other_partitions,
    refuse_other_topic,
    write_record,
)
from feature_store.windows.definition import definition_of

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

AnyView = StreamView | RowView


def topics_of(store: FeatureStore) -> list[str]:
    """The topics that feed views of the registry. NotFoundError: none."""
    return sorted(_fed(store))


def _fed(store: FeatureStore) -> dict[str, list[FeatureView]]:
    fed: dict[str, list[FeatureView]] = {}
    for view in store.list_feature_views():
        definition = definition_of(view)
        name = topic_of(view) if definition is None else definition.topic
        if name:
            fed.setdefault(name, []).append(view)
    if not fed:
        raise NotFoundError("the registry holds no feature view that a topic feeds", next_step="feast apply")
    return fed


def views_of_topic(store: FeatureStore, topic: str | None = None) -> tuple[str, list[FeatureView]]:
    """The topic (None: the only one) and the views that it feeds. NotFoundError: none, or several."""
    fed = _fed(store)
    if topic is None and len(fed) > 1:
        raise NotFoundError("several topics have feature views", valid=fed, next_step="pass --topic")
    if topic is not None and topic not in fed:
        raise NotFoundError("no feature view reads this topic", value=topic, valid=fed)
    chosen = topic if topic is not None else next(iter(fed))
    return chosen, fed[chosen]


def open_views(
    store: FeatureStore,
    views: Sequence[FeatureView],
    topic: str,
    topic_id: str,
    partitions: int,
    offline_path: str,
    clock: ClockMode,
    schema_registry: str | None = None,
    begun: Callable[[], Mapping[int, int]] | None = None,
) -> list[AnyView]:
    """The views, ready to apply batches. `begun`: asks for partitions of which the group has done messages -> its next offset.

    DataError: the topic is not the one their states were made from, or a view is new to a topic of which the group has
    done messages; StateLostError: Redis does not hold these states;
    DefinitionError: it holds those of another definition; UnavailableError: no Redis.
    """
    opened: list[AnyView] = []
    for v in views:
        if definition_of(v) is None:
            opened.append(RowView(store, v, offline_path, clock, schema_registry=schema_registry))
        else:
            opened.append(StreamView(store, v, offline_path, topic_id, clock, schema_registry=schema_registry))
    windowed = [v for v in opened if isinstance(v, StreamView)]
    paths = [v.log.directory for v in windowed]
    for view in windowed:
        if paths.count(view.log.directory) > 1:
            raise DataError("two windowed views share one source path", value=str(view.log.directory))
        refuse_other_topic(view.name, view.log, topic_id)
        record = read_record(view.log)
        if record is None and begun is not None and not view.log.files():
            _refuse_middle(view.name, topic, begun())
        bootstrapped = record is not None and record.history_watermark_us is not None
        view.online.attach(applied=bootstrapped or bool(view.log.files()), run_id=uuid.uuid4().hex)
        if record is None or not record.partitions:
            write_record(
                view.log, replace(record or TopicRecord(topic, "", 0), topic_id=topic_id, partitions=partitions)
            )
        else:
            refuse_other_partitions(view.name, record, partitions)
    return opened


def _refuse_middle(view: str, topic: str, begun: Mapping[int, int]) -> None:
    """DataError where a new view would begin in the middle of a topic: its windows would lack events, and nobody would know."""
    if begun:
        raise DataError(
            f"{view}: the view is new, and the consumer group is in the middle of topic {topic}: it would miss what was before",
            value=", ".join(f"partition {p} at offset {o}" for p, o in sorted(begun.items())),
            next_step=f"stop every sync of the group, then `predictflow windows bootstrap {view}`",
        )
