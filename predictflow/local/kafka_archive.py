"""A class-data archive for the broker: the JVM maps its classes instead of parsing jars, and starts in a third of the time.

The first broker of a user writes one when it stops (`-XX:ArchiveClassesAtExit`, about 3 s and 50 MB, once); the next start
takes it up. An archive that does not fit is ignored by the JVM, so this can cost time, never correctness.
"""

from __future__ import annotations

import hashlib
import subprocess
import time
import uuid
from pathlib import Path

ABANDONED_SECONDS = 24 * 3600.0


def option(java: str, java_version: str, class_path: str, directory: Path) -> str:
    """The JVM option that uses the archive in `directory`, or that writes one at exit when there is none yet.

    One archive per Java version: an archive of another one would be ignored for ever.
    """
    name = f"classes-{hashlib.sha256(java_version.encode()).hexdigest()[:8]}"
    archive = directory / f"{name}.jsa"
    if not archive.exists():
        for written in directory.glob(f"{name}.*.new"):
            if _complete(java, class_path, written):
                written.replace(archive)
                break
            if time.time() - written.stat().st_mtime > ABANDONED_SECONDS:
                written.unlink()
    if archive.exists():
        return f"-XX:SharedArchiveFile={archive}"
    # A name of its own: two brokers that stop at once must not write into one file.
    return f"-XX:ArchiveClassesAtExit={directory / name}.{uuid.uuid4().hex[:8]}.new"


def _complete(java: str, class_path: str, archive: Path) -> bool:
    """Whether the JVM accepts it; the header comes last, so one that is being written is refused."""
    argv = [java, "-XX:+UseSerialGC", f"-XX:SharedArchiveFile={archive}", "-Xshare:on", "-cp", class_path, "-version"]
    return subprocess.run(argv, capture_output=True).returncode == 0
