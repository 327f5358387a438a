"""Progress: a bar on a terminal, plain lines in a log, and no exception held back."""

from __future__ import annotations

import io
import subprocess
import sys

import pytest

from predictflow.progress import progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_log_gets_plain_lines_and_a_final_count():
    out = io.StringIO()
    with progress("backfill", total=10, unit="days", stream=out, every_seconds=0) as advance:
        advance(4)
        advance(6)
    lines = out.getvalue().splitlines()
    assert lines[:2] == ["backfill: 4 of 10 days (40%)", "backfill: 10 of 10 days (100%)"]
    assert lines[2].startswith("backfill: 10 days in ")
    assert "\r" not in out.getvalue()


def test_a_quick_step_writes_one_line_only():
    out = io.StringIO()
    with progress("read", unit="rows", stream=out, every_seconds=3600) as advance:
        for _ in range(1000):
            advance(1)
    assert len(out.getvalue().splitlines()) == 1
    assert out.getvalue().startswith("read: 1,000 rows in ")


def test_an_unknown_or_zero_total_is_no_error():
    out = io.StringIO()
    for total in (None, 0):
        with progress("read", total=total, stream=out, every_seconds=0) as advance:
            advance(0)
    assert "read: 0 rows\n" in out.getvalue()


def test_an_exception_passes_and_the_log_says_where_it_stopped():
    out = io.StringIO()

    def interrupted() -> None:
        with progress("sync", total=4, stream=out, every_seconds=3600) as advance:
            advance(1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert out.getvalue() == "sync: stopped after 1 of 4 rows (25%)\n"


def test_a_terminal_gets_a_bar():
    out = Terminal()
    with progress("train", total=2, unit="models", stream=out) as advance:
        advance(2)
    assert "\r" in out.getvalue()
    assert "train: 100%" in out.getvalue()


def test_importing_it_loads_no_bar():
    code = "import sys, predictflow.progress; print('tqdm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"
