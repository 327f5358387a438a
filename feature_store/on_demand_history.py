"""On-demand feature views of historical rows: what they read is read with the rest, then each runs over a table at once.

Whose functions run is as in online reads (`on_demand.py`), and so is what they are given: join keys, the inputs that come
with the request, and the features they read.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from feature_store.on_demand import OnDemandFunctionError, arrow_type, computed, source_view, with_function

if TYPE_CHECKING:
    import pyarrow as pa
    from feast import FeatureView, OnDemandFeatureView, RepoConfig


@dataclass(frozen=True)
class _Computed:
    """One on-demand view: the columns it is given, by their names as read, and features by their names in the answer."""

    view: OnDemandFeatureView
    inputs: dict[str, str]
    types: dict[str, pa.DataType | None]
    outputs: dict[str, str]


class OnDemandHistory:
    """Made of what was asked for: each view with names of its features, in order; `join_keys` are those of the views read.

    `reads`: the views to read, with names, under `view__feature` names. `request`: columns that must come with the rows, and
    their Feast value types. OnDemandViewError for a function that may not run here.
    """

    def __init__(
        self,
        config: RepoConfig,
        registry: Any,
        project: str,
        wanted: Sequence[tuple[FeatureView, list[str]]],
        full_names: bool,
    ) -> None:
        from feast import OnDemandFeatureView

        self._read: dict[object, tuple[FeatureView, list[str]]] = {}
        self._columns: dict[str, str] = {}
        self._computed: list[_Computed] = []
        self.request: dict[str, str] = {}
        self.feature_names: list[str] = []
        for view, names in wanted:
            prefix = f"{view.projection.name_to_use()}__" if full_names else ""
            self.feature_names += [prefix + name for name in names]
            if not isinstance(view, OnDemandFeatureView):
                self._columns |= {prefix + name: self._column(view, name) for name in names}
                continue
            made = with_function(config, registry, project, view)
            inputs = {}
            types = {}
            for projection in made.source_feature_view_projections.values():
                source = source_view(registry, project, projection.name).with_projection(projection)
                before = f"{projection.name}__" if full_names else ""
                inputs |= {before + f.name: self._column(source, f.name) for f in projection.features}
                types |= {before + f.name: f.dtype.to_value_type().name for f in projection.features}
            for request in made.source_request_sources.values():
                self.request |= {f.name: f.dtype.to_value_type().name for f in request.schema}
            arrow = {name: arrow_type(kind) for name, kind in types.items()}
            self._computed.append(_Computed(made, inputs, arrow, {name: prefix + name for name in names}))
        self.reads = list(self._read.values())
        self.join_keys: dict[str, str] = {}
        for view, _ in self.reads:
            for column in view.entity_columns:
                name = view.projection.join_key_map.get(column.name, column.name)
                self.join_keys[name] = column.dtype.to_value_type().name

    def _column(self, view: FeatureView, name: str) -> str:
        """The name under which a feature is read. A view is read once for all that need it with the same keys."""
        projection = view.projection
        key = view.name, projection.version_tag, tuple(sorted(projection.join_key_map.items()))
        if key not in self._read:
            alias = copy(projection)
            alias.name_alias = f"_read_{len(self._read)}"
            self._read[key] = view.with_projection(alias), []
        read, names = self._read[key]
        if name not in names:
            names.append(name)
        return f"{read.projection.name_alias}__{name}"

    @property
    def read_names(self) -> list[str]:
        """The names of all columns that are read."""
        return [f"{view.projection.name_alias}__{name}" for view, names in self.reads for name in names]

    def answer(self, table: pa.Table) -> pa.Table:
        """Of rows with everything in `reads`, the rows with what was asked for. OnDemandFunctionError when a function fails."""
        found = {name: table.column(read) for name, read in self._columns.items()}
        for one in self._computed:
            found |= self._run(one, table)
        kept = table.drop_columns(self.read_names) if self.reads else table
        for name in self.feature_names:
            kept = kept.append_column(name, found[name])
        return kept

    def _run(self, one: _Computed, table: pa.Table) -> dict[str, pa.Array]:
        import pyarrow as pa
        from feast.types import from_feast_to_pyarrow_type

        given = [name for name in (*self.join_keys, *self.request) if name in table.column_names]
        columns: dict[str, Any] = {name: table.column(name) for name in given}
        columns |= {name: table.column(read) for name, read in one.inputs.items()}
        if one.view.mode == "python":
            columns = {name: column.to_pylist() for name, column in columns.items()}
        kinds = {name: kind for name, kind in (self.join_keys | self.request).items() if name not in one.types}
        declared = one.types | {name: arrow_type(kind) for name, kind in kinds.items()}
        names = list(one.outputs)
        values = computed(one.view, columns, table.num_rows, names, declared) if table.num_rows else []
        types = {f.name: f.dtype for f in one.view.features}
        out = {}
        for i, (name, output) in enumerate(one.outputs.items()):
            try:
                # NaN is null, as in an online read.
                out[output] = pa.array(
                    values[i] if values else [], from_feast_to_pyarrow_type(types[name]), from_pandas=True
                )
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as e:
                raise OnDemandFunctionError(
                    f"on-demand feature view {one.view.name} gives values of another type than it declares",
                    value=f"{name} ({types[name]}): {str(e).splitlines()[0]}",
                ) from e
        return out
