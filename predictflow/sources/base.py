"""The adapter interface of a data source: what it is given, and what it must deliver. A user's own class implements it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Protocol, runtime_checkable

from feature_store.errors import UsageError
from predictflow.progress import Advance
from predictflow.sources.raw import Summary

Progress = Callable[..., AbstractContextManager[Advance]]
"""`predictflow.progress.progress`, or a stand-in: `with progress("label", total=n, unit="rows") as advance: advance(k)`."""


@dataclass(frozen=True)
class SourceOptions:
    """What the command line was given; None: not given, the source's own default holds."""

    path: Path | None = None
    customers: int | None = None
    days: int | None = None
    seed: int | None = None

    def only(self, source: str, *accepted: str) -> None:
        """UsageError when an option is set that `source` does not take, so that none is ignored silently."""
        for option in fields(self):
            if getattr(self, option.name) is not None and option.name not in accepted:
                raise UsageError(
                    f"source {source} does not take this option",
                    value=f"--{option.name}",
                    valid=[f"--{a}" for a in accepted],
                )


class DataSource(Protocol):
    """One source of raw data. Built as `Class(options)`; nothing is read before `write`."""

    name: str

    def __init__(self, options: SourceOptions) -> None: ...

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """Whether a file of this name looks like this source's; used when no source is named. Must be cheap."""
        ...

    def write(self, raw_dir: Path, progress: Progress) -> Summary:
        """Writes accounts, events and labels (`raw.write_table`) and `rejects.jsonl` (`raw.Rejects`) into `raw_dir`.

        `raw_dir` exists and is empty; it is published only when this returns and the files keep the contract, so a
        failure may simply raise. The same options and input must give the same bytes: no wall clock, no unseeded
        randomness. Raises NotFoundError or DataError for input that cannot be used as a whole; single bad lines go
        to the rejects.
        """
        ...


@runtime_checkable
class InputCheck(Protocol):
    """A source that can tell early whether its input is of its kind, before anything is started or replaced."""

    def check_input(self) -> None:
        """Reads no more than the start of the input. Raises what `write` would for input of another kind."""
        ...
