"""Children that die with us, in whatever way we die: the servers of tests, and helpers such as initdb and Maven."""

from __future__ import annotations

import os
import subprocess
import sys
import threading

from feature_store.errors import UnavailableError
from predictflow.local import child
from predictflow.local.program import Program, await_ready, log_tail


class Watched:
    """Starts children that end when this process does, in whatever way; `close` ends them earlier. Safe to close twice."""

    def __init__(self) -> None:
        self._children: dict[subprocess.Popen[bytes], int] = {}
        self._mutex = threading.Lock()

    def start(self, program: Program) -> int:
        """Start and wait until ready; the pid is the guard's, not the program's."""
        process = self.launch(program)
        await_ready(program, lambda: process.poll() is None)
        return process.pid

    def launch(self, program: Program) -> subprocess.Popen[bytes]:
        program.log.parent.mkdir(parents=True, exist_ok=True)
        read_end, write_end = os.pipe()
        arguments = [str(os.getpid()), str(read_end), str(int(program.stop_signal)), program.user or ""]
        with open(program.log, "ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-I", child.__file__, "watch", *arguments, "--", *program.argv],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **program.env},
                pass_fds=[read_end],
            )
        os.close(read_end)
        with self._mutex:
            self._children[process] = write_end
        return process

    def run(self, program: Program) -> None:
        """Run a command to its end (`program.timeout` seconds at most); `UnavailableError` with its log when it fails."""
        process = self.launch(program)
        try:
            code = process.wait(program.timeout)
        except subprocess.TimeoutExpired as error:
            raise UnavailableError(
                f"{program.name} took more than {program.timeout:.0f} s; the end of {program.log}:{log_tail(program.log)}"
            ) from error
        finally:
            self._end(process)
        if code:
            raise UnavailableError(f"{program.name} failed; the end of {program.log}:{log_tail(program.log)}")

    def close(self) -> None:
        for process in reversed(list(self._children)):
            self._end(process)

    def _end(self, process: subprocess.Popen[bytes]) -> None:
        with self._mutex:
            write_end = self._children.pop(process, None)
        if write_end is not None:
            os.close(write_end)  # the guard sees the end of the pipe
        process.wait()

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
