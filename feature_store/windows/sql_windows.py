"""The windows of a SELECT: that its FROM, GROUP BY and OVER say one the engine has, over the entity's key and event time."""

from __future__ import annotations

from collections.abc import Sequence

from feature_store.windows.definition import EventSource
from feature_store.windows.ir import Window
from feature_store.windows.sql_intervals import Interval, interval_sql
from feature_store.windows.sql_tokens import At, SqlError
from feature_store.windows.sql_tree import TABLE_FORM, Function, Name, Node, Over, Select, TableFunction

WINDOW_FUNCTIONS = ("TUMBLE", "HOP", "SESSION")
BOUNDS = ("window_start", "window_end")
MAX_TILES = 100_000
"""A state holds tiles of the slide's length: so many in a window at most."""
_LENGTHS = {"TUMBLE": ("the size",), "HOP": ("the slide", "the size"), "SESSION": ("the gap",)}


class WindowChecker:
    """The windows of one SELECT."""

    def __init__(self, tree: Select, source: EventSource, key: tuple[str, ...]) -> None:
        self._tree = tree
        self._source = source
        self._key = key

    def of_group(self) -> Window | None:
        """The window of FROM and GROUP BY; None where aggregates bring their own, with OVER."""
        tree = self._tree
        if tree.function is None and tree.group_by is None:
            if tree.emit is not None:
                raise SqlError(tree.emit, "an OVER window moves with every event and never closes", nearest=TABLE_FORM)
            return None
        if tree.windows:
            at = next(iter(tree.windows.values())).at
            raise SqlError(
                at, "a SELECT has one kind of window", value="WINDOW", nearest="two SELECTs with ; between them"
            )
        if tree.function is not None:
            return self._table_window(tree.function)
        assert tree.group_by is not None
        found = None
        for node in tree.group_by:
            if isinstance(node, Function) and node.name.upper() in WINDOW_FUNCTIONS:
                if found is not None:
                    raise SqlError(node.at, "two windows in one GROUP BY", nearest="two SELECTs with ; between them")
                found = self._call_window(node)
        if found is None:
            raise SqlError(
                tree.group_by[0].at,
                "GROUP BY without a window",
                nearest=self._group_form("TUMBLE(ts, INTERVAL '1' HOUR)"),
            )
        self._check_group([n for n in tree.group_by if not isinstance(n, Function)], tree.group_by, bounds=False)
        if found.kind == "session" and tree.where is not None:
            # Flink's GROUP BY SESSION forms sessions of what WHERE keeps, TABLE(SESSION) of all events, as we do.
            raise SqlError(
                tree.where.at, "WHERE before GROUP BY SESSION(...) would change the sessions, which are of all events",
                nearest=f"FILTER (WHERE ...), or FROM TABLE(SESSION(TABLE {tree.table.text} PARTITION BY ..., ...)) WHERE ...",
            )  # fmt: skip
        return found

    def _call_window(self, node: Function) -> Window:
        kind = node.name.upper()
        if node.distinct or node.filter is not None or node.over is not None:
            raise SqlError(node.at, "not an aggregate", value=node.name, nearest=self._group_form(f"{kind}(...)"))
        if not node.arguments or not isinstance(node.arguments[0], Name):
            raise SqlError(
                node.at, "the first argument is the time column", value=node.name, valid=[self._source.timestamp]
            )
        lengths = []
        for length in node.arguments[1:]:
            if not isinstance(length, Interval):
                raise SqlError(length.at, "expected the length of a window", nearest="INTERVAL '1' HOUR")
            lengths.append(length)
        self._check_time(node.arguments[0])
        return self._window(node.at, kind, lengths)

    def _table_window(self, f: TableFunction) -> Window:
        self._check_time(f.timestamp)
        if f.kind == "SESSION":
            form = f"SESSION(TABLE {self._tree.table.text} PARTITION BY {', '.join(self._key)}, ...)"
            if f.partition is None:
                raise SqlError(f.at, "a session belongs to one entity", nearest=form)
            self._check_key(f.partition, f.at, form)
        elif f.partition is not None:
            raise SqlError(
                f.partition[0].at, f"PARTITION BY stands in SESSION only, not in {f.kind}", nearest=TABLE_FORM
            )
        group = self._tree.group_by
        form = self._group_form("window_start, window_end")
        if group is None:
            raise SqlError(self._tree.at, "a window function needs a GROUP BY", nearest=form)
        for node in group:
            if isinstance(node, Function) and node.name.upper() in WINDOW_FUNCTIONS:
                raise SqlError(node.at, "the window stands in FROM already", value=node.name, nearest=form)
        self._check_group(list(group), group, bounds=True)
        return self._window(f.at, f.kind, f.lengths)

    def _window(self, at: At, kind: str, lengths: Sequence[Interval]) -> Window:
        wanted, on_close = _LENGTHS[kind], self._tree.emit is not None
        if len(lengths) != len(wanted):
            raise SqlError(
                at, f"{kind} takes {len(wanted)} length{'s'[: len(wanted) - 1]} ({', then '.join(wanted)}), not {len(lengths)}",
                nearest=f"{kind}(..., {', '.join(['INTERVAL ...'] * len(wanted))})",
            )  # fmt: skip
        size = lengths[-1].us
        if kind == "SESSION":
            return Window("session", size, 0, on_close)
        slide = lengths[0].us
        if size % slide:
            multiple = max(1, round(size / slide)) * slide
            raise SqlError(
                lengths[-1].at, "HOP's size (the second length) must be a multiple of its slide (the first)",
                nearest=f"HOP(..., {interval_sql(slide)}, {interval_sql(multiple)})",
            )  # fmt: skip
        self._check_tiles(lengths, size, slide)
        return Window("tumble" if kind == "TUMBLE" else "hop", size, slide, on_close)

    def _check_tiles(self, lengths: Sequence[Interval], size: int, slide: int) -> None:
        """That a state can hold a window's tiles, and number those of closed windows in 62 bits (`layout.Track.factor`)."""
        tiles = size // slide
        if tiles <= MAX_TILES:
            return
        fewer = next(n for n in range(MAX_TILES, 0, -1) if size % (n * 1000) == 0)
        raise SqlError(
            lengths[0].at, f"HOP's size is {tiles:,} slides, and a state holds at most {MAX_TILES:,}",
            nearest=f"HOP(..., {_readable(size // fewer)}, {_readable(size)}), or an OVER window",
        )  # fmt: skip

    def _group_form(self, window: str) -> str:
        return f"GROUP BY {', '.join([*self._key, window])}"

    def _check_group(self, nodes: Sequence[Node], group: Sequence[Node], *, bounds: bool) -> None:
        """Exactly the key, and with `bounds` the window's bounds."""
        wanted = [*self._key, *(BOUNDS if bounds else ())]
        form = self._group_form("window_start, window_end" if bounds else "TUMBLE(ts, INTERVAL '1' HOUR)")
        seen = set()
        for node in nodes:
            self.check_table(node)
            if not isinstance(node, Name) or node.name not in wanted:
                value = node.name if isinstance(node, Name) else None
                raise SqlError(
                    node.at,
                    "GROUP BY takes exactly the entity's key and the window",
                    value=value,
                    valid=wanted,
                    nearest=form,
                )
            if node.name in seen:
                raise SqlError(node.at, "twice in GROUP BY", value=node.name, nearest=form)
            seen.add(node.name)
        missing = [n for n in wanted if n not in seen]
        if missing:
            raise SqlError(group[0].at, f"GROUP BY without {', '.join(missing)}", nearest=form)
        for other in group:
            if isinstance(other, Function) and other.name.upper() not in WINDOW_FUNCTIONS:
                raise SqlError(
                    other.at, "GROUP BY takes exactly the entity's key and the window", value=other.name, nearest=form
                )

    def check_table(self, node: Node) -> None:
        if isinstance(node, Name) and node.table is not None and node.table not in self._tree.names:
            raise SqlError(node.at, "unknown table before a column", value=node.table, valid=self._tree.names)

    def _check_time(self, column: Name) -> None:
        self.check_table(column)
        if column.name != self._source.timestamp:
            raise SqlError(
                column.at, "not the time column of the events", value=column.name, valid=[self._source.timestamp]
            )

    def _check_key(self, names: Sequence[Name], at: At, form: str) -> None:
        for name in names:
            self.check_table(name)
            if name.name not in self._key:
                raise SqlError(name.at, "not the entity's key", value=name.name, valid=self._key, nearest=form)
        if len(names) != len(self._key) or len({n.name for n in names}) != len(names):
            raise SqlError(at, "PARTITION BY takes each column of the entity's key once", valid=self._key, nearest=form)

    def of_over(self, over: Over) -> Window:
        """The window of an OVER."""
        self._check_key(over.partition, over.partition[0].at, f"PARTITION BY {', '.join(self._key)}")
        self._check_time(over.order)
        return Window("over", over.size.us)


def _readable(us: int) -> str:
    """A length as this SQL takes it, which knows no fractions."""
    return interval_sql(us) if us % 1_000_000 == 0 else f"INTERVAL '{us // 1000}' MILLISECONDS"
