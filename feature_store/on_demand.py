"""On-demand feature views in an online read: inputs read with the rest, transformed for all rows at once, in Feast's modes.

The functions come from the definitions in the checkout (`features/*.py`), never out of the registry, where they are
pickled code: unpickling runs whatever was put there. `online_store.pickled_functions: run` (for the server,
PREDICTFLOW_ALLOW_PICKLED_FUNCTIONS=1) allows it where there is no checkout.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from feature_store.checkout import changed_definitions, definitions
from feature_store.errors import DataError
from feature_store.view_plan import (
    Feature,
    OnDemandViewError,
    UnsupportedOnDemandError,
    ViewPlan,
    ViewRow,
    python_value,
)
from feature_store.without_functions import message, view_named

if TYPE_CHECKING:
    import pyarrow as pa
    from feast import OnDemandFeatureView, RepoConfig

Entity = Mapping[str, object]


class OnDemandFunctionError(DataError):
    """The function of an on-demand view fails, or gives something else than it declares: HTTP 500."""

    code = "on_demand_function"


def source_view(registry: Any, project: str, name: str) -> Any:
    """The view that another one reads, without functions; Feast's own error where there is none."""
    found = view_named(registry, project, name)
    return registry.get_feature_view(name, project, allow_cache=True) if found is None else found


def with_function(config: RepoConfig, registry: Any, project: str, view: OnDemandFeatureView) -> OnDemandFeatureView:
    """`view` with the function to run, from the checkout as it is now. OnDemandViewError where it is not there or not as
    applied."""
    from feast import OnDemandFeatureView

    proto = _proto(registry, project, view.name)
    repo = getattr(config, "repo_path", None)
    found = definitions(repo).get(view.name)
    if found is None or not _as_applied(found, proto):  # it may have changed since it was imported
        found = changed_definitions(repo).get(view.name)
    if found is not None:
        if not _as_applied(found, proto):
            raise OnDemandViewError(
                "the on-demand feature view in the checkout is not the applied one",
                value=view.name,
                next_step="feast apply, or check out what was applied",
            )
        made = found
    elif getattr(config.online_store, "pickled_functions", "refuse") == "run":
        made = OnDemandFeatureView.from_proto(proto)
    else:
        raise OnDemandViewError(
            "the definition of this on-demand feature view is not in the checkout, and functions out of the registry "
            "are not run",
            value=view.name,
            next_step="run from the checkout that was applied, or set online_store.pickled_functions: run "
            "(for `predictflow serve`: PREDICTFLOW_ALLOW_PICKLED_FUNCTIONS=1)",
        )
    if made.mode not in ("pandas", "python") or made.aggregations or made.write_to_online_store:
        raise UnsupportedOnDemandError(
            "this kind of on-demand feature view is not computed at read time",
            value=f"{view.name} (mode {made.mode})",
            valid=["mode pandas", "mode python"],
            next_step="without aggregations, and without write_to_online_store",
        )
    copy: OnDemandFeatureView = made.with_projection(view.projection)
    return copy


def still_applied(registry: Any, project: str, view: OnDemandFeatureView) -> bool:
    """Whether a view that `with_function` gave is the applied one to this day, by the registry's cache."""
    proto = _proto(registry, project, view.name)
    return proto is not None and _as_applied(view, proto)


def _as_applied(view: OnDemandFeatureView, proto: Any) -> bool:
    return bool(_shape(view.to_proto().spec) == _shape(proto.spec))


def _proto(registry: Any, project: str, name: str) -> Any:
    """From the registry's cached message: its Python objects would come with their functions unpickled."""
    for view in message(registry, project).on_demand_feature_views:
        if view.spec.name == name and view.spec.project == project:
            return view
    return None


def _shape(spec: Any) -> Any:
    """What must agree between checkout and registry: everything that decides a value, the function's text included."""
    function = spec.feature_transformation.user_defined_function
    sources = []
    for name, source in spec.sources.items():
        kind = source.WhichOneof("source")
        if kind == "request_data_source":
            schema = source.request_data_source.request_data_options.schema
            sources.append((name, kind, sorted((f.name, f.value_type) for f in schema)))
        else:
            projection = source.feature_view_projection
            view = projection.feature_view_name or source.feature_view.spec.name
            names = [f.name for f in projection.feature_columns or source.feature_view.spec.features]
            sources.append((name, view, sorted(names)))
    features = sorted((f.name, f.value_type) for f in spec.features)
    return spec.mode or "pandas", spec.singleton, features, sorted(sources), function.body_text.strip()


class OnDemandPlan:
    """One on-demand view of a read plan; has the attributes of a `ViewPlan` that readers of answers need.

    `inputs`: the plans of its source views, read for it alone. `request_keys`: inputs that come with the request.
    `computing`: the view with its function.
    """

    definition = None
    key_parts = ()
    fields: Sequence[bytes] = ()
    ttl_ns = None

    def __init__(
        self,
        view: OnDemandFeatureView,
        names: Sequence[str],
        sources: Sequence[tuple[Any, Any]],
        config: RepoConfig,
        full_feature_names: bool,
    ) -> None:
        self.name: str = view.projection.name_to_use()
        self.view: str = view.name
        self.stored: str = view.name
        self.version: int = getattr(view, "current_version_number", 0) or 0
        types = {f.name: f.dtype.to_value_type() for f in view.features}
        self._types = [types[name] for name in names]
        self.features = [
            Feature(name, f"{self.name}__{name}" if full_feature_names else name, b"", None, types[name].name)
            for name in names
        ]
        self.inputs = [ViewPlan(source, [f.name for f in p.features], config, False) for source, p in sources]
        self._columns = [
            (v, i, f, f"{p.name}__{f.name}" if full_feature_names else f.name)
            for v, (_, p) in zip(self.inputs, sources)
            for i, f in enumerate(v.features)
        ]
        self._request = {
            name: kind.name
            for source in view.source_request_sources.values()
            for name, kind in ((f.name, f.dtype.to_value_type()) for f in source.schema)
        }
        self.request_keys = list(self._request)
        kinds: dict[str, str] = {p.requested: p.type for v in self.inputs for p in v.key_parts if p.requested}
        kinds |= self._request
        for _, p in sources:
            prefix = f"{p.name}__" if full_feature_names else ""
            kinds |= {prefix + f.name: f.dtype.to_value_type().name for f in p.features}
        self._arrow = {name: arrow_type(kind) for name, kind in kinds.items()}
        self.computing = view
        self._full = full_feature_names

    def at(self, entities: Sequence[Entity], answers: Sequence[Mapping[int, ViewRow]]) -> list[ViewRow]:
        """The view's part of each row. DataError when the function fails or does not give what it declares."""
        if not entities:
            return []
        columns: dict[str, list[Any]] = {name: [e[name] for e in entities] for name in entities[0]}
        for name, kind in self._request.items():
            if kind in ("FLOAT", "DOUBLE"):
                columns[name] = [float(v) if type(v) is int else v for v in columns[name]]
        for view, i, feature, name in self._columns:
            columns[name] = [python_value(feature, row[id(view)].cells[i])[1] for row in answers]
        found = computed(self.computing, columns, len(entities), [f.name for f in self.features], self._arrow)
        cells = [_cells(values, kind) for values, kind in zip(found, self._types, strict=True)]
        return [ViewRow(None, None, None, [column[i] for column in cells]) for i in range(len(entities))]


def arrow_type(kind: str) -> pa.DataType | None:
    """The Arrow type in which a function of mode pandas is given a join key, an input or a request column of this Feast
    value type, online and in history; None for types that Arrow has none of its own for. Numbers are widened: a null makes
    pandas hold a column of integers as float64, so int32 would wrap or not by what the other rows hold."""
    import pyarrow as pa

    if kind.endswith("_LIST"):
        item = arrow_type(kind.removesuffix("_LIST"))
        return None if item is None else pa.list_(item)
    return {
        "STRING": pa.string(),
        "BYTES": pa.binary(),
        "BOOL": pa.bool_(),
        "INT32": pa.int64(),
        "INT64": pa.int64(),
        "FLOAT": pa.float64(),
        "DOUBLE": pa.float64(),
        "UNIX_TIMESTAMP": pa.timestamp("us", "UTC"),
    }.get(kind)


def computed(
    view: OnDemandFeatureView,
    columns: Mapping[str, Any],
    rows: int,
    names: Sequence[str],
    types: Mapping[str, pa.DataType | None],
) -> list[list[Any]]:
    """The values of the features `names`, for all rows at once. `columns`: lists, or Arrow's for a view of mode pandas, which
    gets them in their `types`: what it computes depends on them.

    DataError when a column is not of its type; OnDemandFunctionError when the function fails or does not give what it
    declares.
    """
    if view.mode != "python":
        columns = {name: _typed(view, name, column, types.get(name)) for name, column in columns.items()}
    try:
        out = _transformed(view, columns)
    except Exception as e:  # the function is the user's: whatever it raises is told under the view's name
        raise OnDemandFunctionError(
            f"on-demand feature view {view.name} failed ({type(e).__name__}: {e})",
            next_step="its inputs can be null: let the function take that",
        ) from e
    for name in names:
        if out.get(name) is None or len(out[name]) != rows:
            raise OnDemandFunctionError(
                f"on-demand feature view {view.name} gives no value per row for a declared feature",
                value=name,
                valid=out,
            )
    return [out[name] for name in names]


def _typed(view: OnDemandFeatureView, name: str, column: Any, wanted: pa.DataType | None) -> Any:
    import pyarrow as pa

    if wanted is None:
        return column
    try:
        return column.cast(wanted) if isinstance(column, pa.ChunkedArray | pa.Array) else pa.array(column, wanted)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError) as e:
        raise DataError(
            f"on-demand feature view {view.name}: an input is not of its declared type",
            value=f"{name} ({wanted}): {str(e).splitlines()[0]}",
        ) from e


def _transformed(view: OnDemandFeatureView, columns: Mapping[str, Any]) -> dict[str, list[Any]]:
    if view.mode == "python":
        if not view.singleton:
            return {name: list(values) for name, values in view.transform_dict(dict(columns)).items()}
        count = len(next(iter(columns.values())))
        rows = [view.transform_dict({k: [v[i]] for k, v in columns.items()}) for i in range(count)]
        return {name: [row[name] for row in rows] for name in rows[0]}
    import pyarrow as pa

    table = view.transform_arrow(pa.Table.from_pydict(dict(columns)), False)
    return {name: table.column(name).to_pylist() for name in table.column_names}


def _cells(values: list[Any], kind: Any) -> list[Any]:
    from feast.type_map import python_values_to_proto_values

    out: list[Any] = [("NULL_VALUE", None)] * len(values)
    present = [i for i, v in enumerate(values) if v is not None]
    for i, proto in zip(present, python_values_to_proto_values([values[i] for i in present], kind)):
        data = proto.SerializeToString()
        if data:
            out[i] = ("PRESENT", data)
    return out
