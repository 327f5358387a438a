"""Shows how far a long step is: a tqdm bar on a terminal, plain lines in a log. Never needed for a correct result."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

Advance = Callable[[int], None]
"""Reports that so many more units are done."""

SECONDS_BETWEEN_LINES = 5.0


@contextmanager
def progress(
    label: str,
    total: int | None = None,
    unit: str = "rows",
    *,
    stream: TextIO | None = None,
    every_seconds: float = SECONDS_BETWEEN_LINES,
) -> Iterator[Advance]:
    """Yields `advance(n)`; `total` None: length unknown. Writes to `stream` (default: standard error).

    In a log: a line at most every `every_seconds`, and one at the end with the count and the seconds taken, or with
    `stopped` when an exception passes through (which is never held back).
    """
    out = sys.stderr if stream is None else stream
    if out.isatty():
        from tqdm import tqdm

        with tqdm(total=total, desc=label, unit=f" {unit}", file=out, unit_scale=True, dynamic_ncols=True) as bar:
            yield lambda n: _update(bar, n)
        return
    lines = _Lines(label, total, unit, out, every_seconds)
    try:
        yield lines.advance
    except BaseException:
        lines.write(f"stopped after {lines.so_far()}")
        raise
    lines.write(f"{lines.done:,} {unit} in {time.monotonic() - lines.started:.1f} s")


def no_progress(n: int) -> None:
    """An `advance` that shows nothing, for callers that report elsewhere."""


def _update(bar: object, n: int) -> None:
    bar.update(n)  # type: ignore[attr-defined]  # tqdm, imported only on a terminal


class _Lines:
    """The plain form: one line per report, no carriage returns, nothing that a log collector would garble."""

    def __init__(self, label: str, total: int | None, unit: str, out: TextIO, every_seconds: float) -> None:
        self.label, self.total, self.unit, self.out, self.every = label, total, unit, out, every_seconds
        self.done = 0
        self.started = self.written = time.monotonic()

    def so_far(self) -> str:
        if not self.total:
            return f"{self.done:,} {self.unit}"
        return f"{self.done:,} of {self.total:,} {self.unit} ({100 * self.done // self.total}%)"

    def advance(self, n: int) -> None:
        self.done += n
        if time.monotonic() - self.written >= self.every:
            self.write(self.so_far())

    def write(self, text: str) -> None:
        self.written = time.monotonic()
        print(f"{self.label}: {text}", file=self.out, flush=True)
