"""The small program that stands between us and a server: it records the server, or makes it die with its parent.

Run by path (`python -I child.py ...`), so it imports the standard library alone and starts in a few milliseconds.

`record FILE JSON -- ARGV...` writes FILE (its own pid and start, which `exec` keeps, plus what JSON says) and then
becomes ARGV: whoever started it may be killed at any moment and the server is still known.
`watch PARENT FD SIGNAL -- ARGV...` runs ARGV in a process group of its own and ends that group when the pipe FD reaches
its end or PARENT is gone. PR_SET_PDEATHSIG would be simpler, but it is Linux only and `unshare` clears it.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import FrameType

STOP_PATIENCE_SECONDS = 10.0


def identity_of(pid: int) -> str | None:
    """What tells this process from a later one with the same pid; None when it is gone (a zombie is gone)."""
    try:
        # The command name in field 2 may hold spaces and brackets: count from the last bracket.
        fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except (FileNotFoundError, ProcessLookupError):
        return None if sys.platform == "linux" else _identity_without_proc(pid)
    return None if fields[0] in "ZX" else f"{boot}:{fields[19]}"


def _identity_without_proc(pid: int) -> str | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.2f}"
    except psutil.NoSuchProcess:
        return None


def become(user: str) -> None:
    """Give up root for `user`, for servers that refuse to run as root."""
    entry = pwd.getpwnam(user)
    os.setgroups([entry.pw_gid])
    os.setgid(entry.pw_gid)
    os.setuid(entry.pw_uid)


def record(path: Path, facts: dict[str, object], argv: list[str]) -> None:
    """Write the record, then exec; on a failed exec the record goes again, and the log has the reason."""
    pid = os.getpid()
    temporary = path.with_name(f".{path.name}.{pid}")
    temporary.write_text(json.dumps({**facts, "pid": pid, "identity": identity_of(pid), "argv": argv}))
    temporary.replace(path)
    os.set_inheritable(int(str(facts["lock"])), False)  # the server must not hold the home's lock
    try:
        if user := facts.get("user"):
            become(str(user))
        os.execvp(argv[0], argv)
    except OSError as error:
        path.unlink(missing_ok=True)
        sys.exit(f"cannot run {argv[0]}: {error.strerror}")


def watch(parent: int, pipe: int, stop_signal: int, user: str, argv: list[str]) -> int:
    """Run argv until it ends or its parent does; the exit code of argv."""
    try:
        other = {"user": user, "group": pwd.getpwnam(user).pw_gid, "extra_groups": []} if user else {}
        child = subprocess.Popen(argv, start_new_session=True, stdin=subprocess.DEVNULL, **other)  # type: ignore[call-overload]  # keywords of two types in one dict
    except OSError as error:
        sys.exit(f"cannot run {argv[0]}: {error.strerror}")

    def end(sig: int) -> None:
        with contextlib.suppress(ProcessLookupError):  # it ended by itself meanwhile, which is what we want
            os.killpg(child.pid, sig)

    def guard() -> None:
        # The pipe reports at once; the parent's pid covers a pipe that a forked sibling still holds open.
        while not select.select([pipe], [], [], 1.0)[0] and os.getppid() == parent:
            pass
        end(stop_signal)
        time.sleep(STOP_PATIENCE_SECONDS)
        end(signal.SIGKILL)

    def forward(sig: int, _: FrameType | None) -> None:
        end(sig)

    for sig in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(sig, forward)
    threading.Thread(target=guard, daemon=True).start()
    code = child.wait()
    end(signal.SIGKILL)  # what the server left in its group
    return code if code >= 0 else 128 - code


def main(argv: list[str]) -> int:
    split = argv.index("--")
    options, command = argv[:split], argv[split + 1 :]
    if options[0] == "record":
        record(Path(options[1]), json.loads(options[2]), command)
    return watch(int(options[1]), int(options[2]), int(options[3]), options[4], command)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
