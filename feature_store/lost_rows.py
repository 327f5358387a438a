"""What became of events that the states hold and the log does not: rows that a disk lost, delivered once more.

The states say only that such an event was met. Whether it counted, was late or a duplicate, is found again as it was the
first time: from states made of the log's rows before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from feature_store.batch_columns import Key
from feature_store.bootstrap_states import LoggedStates
from feature_store.errors import NotFoundError
from feature_store.logged import Bools, Ints
from feature_store.point_in_time.engine import ident
from feature_store.windows.definition import WindowedView
from feature_store.windows.sql_text import constant_sql
from feature_store.windows.state import Events, States


def outcomes_of_lost(
    definition: WindowedView, directory: Path, keys: Sequence[Key], events: Events, lost: Bools
) -> Ints:
    """The outcome of each event for which `lost` is set; of the others nothing is said.

    `events`: the batch as `States.apply` takes it, `events.entity` numbers the `keys`; `directory`: of history and log.
    DataError: files that cannot be read.
    """
    firsts = {
        p: int(events.offset[lost & (events.partition == p)].min()) for p in np.unique(events.partition[lost]).tolist()
    }
    concerned, numbers = np.unique(events.entity[lost]), np.full(len(keys), -1)
    numbers[concerned] = np.arange(len(concerned))
    again = numbers[events.entity] >= 0
    for p in np.unique(events.partition).tolist():
        again &= (events.partition != p) | (events.offset >= firsts.get(p, 2**62))
    asked = [keys[i] for i in concerned.tolist()]
    states = _states(definition, directory, asked, firsts)
    taken = {f.name: _taken(getattr(events, f.name), again) for f in fields(events)}
    some = replace(events, **taken)
    outcome = np.zeros(len(lost), np.int64)
    outcome[again] = states.apply(replace(some, entity=numbers[some.entity]))
    return outcome


def _states(definition: WindowedView, directory: Path, keys: Sequence[Key], firsts: dict[int, int]) -> States:
    """Of the entities, from what the log holds before the first lost offset of each partition."""
    names = ", ".join(ident(k) for k in definition.entity_key)
    kinds: Any = definition.key_types
    listed = ", ".join(
        "(" + ", ".join(constant_sql(v, kind) for v, kind in zip(key, kinds, strict=True)) + ")" for key in keys
    )
    before = [f"NOT (_partition = {p} AND _offset >= {first})" for p, first in firsts.items()]
    found: dict[Key, bytes] = {}
    try:
        with LoggedStates(definition, directory, None, [f"({names}) IN ({listed})", *before]) as logged:
            for chunk in logged.chunks():
                found |= zip(chunk.keys, chunk.states.encode(), strict=True)
    except NotFoundError:  # nothing is left of the log, and there is no history
        pass
    return States.decode(definition, [found.get(k) for k in keys])


def _taken(column: Any, some: Bools) -> Any:
    return [c[some] for c in column] if isinstance(column, list) else column[some]
