"""API keys: who may call the server, and for what.

A key is a random text that its owner sends as `Authorization: Bearer <key>` or `X-Api-Key: <key>`. The server knows only
its SHA-256 digest, one line `name scope[,scope...] digest` per key in a text file; `#` starts a comment.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import secrets
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from feature_store.durable import locked, sync_directory, writing
from feature_store.errors import NotFoundError, UsageError

Scope = Literal["read", "write", "predict", "admin"]
SCOPES: tuple[Scope, ...] = ("read", "write", "predict", "admin")
"""read: features, catalogue, jobs, metrics; write: push; predict: predictions; admin: all, and every key's jobs."""

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/health", "/docs", "/docs/oauth2-redirect", "/openapi.json"})
"""Answered without a key: probes have none, and the interface is no secret."""
WRITE_PATHS = frozenset({"/api/v1/features/push", "/push", "/write-to-online-store"})
_PREDICT = "/api/v1/predict/"
_NAME = re.compile(r"[A-Za-z0-9._@-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")


class UnauthorizedError(UsageError):
    """No key, or one that the server does not know: HTTP 401."""

    code = "unauthorized"


class ForbiddenError(UsageError):
    """A key without the scope that the route needs: HTTP 403."""

    code = "forbidden"


def scope_of(path: str) -> Scope | None:
    """The scope that a request path needs; None: open to everyone. An unknown path needs `read`, as most do."""
    if path in OPEN_PATHS:
        return None
    if path in WRITE_PATHS:
        return "write"
    return "predict" if path.startswith(_PREDICT) else "read"


@dataclass(frozen=True, slots=True)
class ApiKey:
    """One key as the server knows it."""

    name: str
    scopes: frozenset[str]
    digest: bytes

    def may(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes


class Keys:
    """The keys of one file. `refresh` follows changes of the file; looking a key up reads no file."""

    def __init__(self, path: Path) -> None:
        """UsageError for a file that cannot be read, holds a malformed line, or no key at all."""
        self._path = Path(path)
        self._seen = _version(self._path)
        self._keys = read_keys(self._path)
        if not self._keys:
            raise UsageError("no API key in the file", value=str(path), next_step="predictflow serve-key new --help")

    def refresh(self) -> bool:
        """Reads the file again if it changed; True if it did. On an error (UsageError) the keys at hand stay in force.

        A file without keys is no error here: it revokes them all.
        """
        seen = _version(self._path)
        if seen == self._seen:
            return False
        self._keys = read_keys(self._path)
        self._seen = seen
        return True

    def find(self, token: bytes) -> ApiKey | None:
        """The key with this text, in a time that does not tell how much of any digest matched."""
        digest = hashlib.sha256(token).digest()
        found = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def token_of(headers: Mapping[bytes, bytes]) -> bytes | None:
    """The key text in a request's headers (names in lower case), None without one."""
    given = headers.get(b"x-api-key")
    if given is not None:
        return given.strip()
    scheme, _, token = headers.get(b"authorization", b"").partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" and token.strip() else None


def read_keys(path: Path) -> tuple[ApiKey, ...]:
    """The keys in `path`; UsageError names the line that is none (never what stands in it)."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(
            f"the API keys file cannot be read ({type(e).__name__})",
            value=str(path),
            next_step="predictflow serve-key new --help",
        ) from e
    keys: dict[str, ApiKey] = {}
    for number, line in enumerate(lines, 1):
        fields = line.partition("#")[0].split()
        if not fields:
            continue
        if len(fields) != 3 or not _NAME.fullmatch(fields[0]) or not _DIGEST.fullmatch(fields[2]):
            raise UsageError(f"{path}, line {number} is not `name scope[,scope] sha256`", next_step="mend or remove it")
        name, scopes = fields[0], _scopes(fields[1].split(","))
        if name in keys:
            raise UsageError(f"{path}, line {number}: two keys of one name", value=name, next_step="remove one")
        keys[name] = ApiKey(name, scopes, bytes.fromhex(fields[2]))
    return tuple(keys.values())


def add_key(path: Path, name: str, scopes: Iterable[str]) -> str:
    """Makes a key, adds its digest to `path` (made if it is not there, readable by its owner only) and returns the key:
    the one time that it is shown. UsageError for a taken or malformed name and an unknown scope. Not safe to repeat.
    """
    wanted = _scopes(scopes)
    if not _NAME.fullmatch(name):
        raise UsageError("not a name for a key", value=name, next_step="up to 64 letters, digits and . _ @ -")
    with locked(_lock(path)):
        held = read_keys(path) if path.exists() else ()
        if any(key.name == name for key in held):
            raise UsageError("there is a key of this name", value=name, next_step=f"predictflow serve-key drop {name}")
        text = path.read_text(encoding="utf-8") if path.exists() else "# name scope[,scope] sha256\n"
        token = "pf_" + secrets.token_urlsafe(32)
        line = f"{name} {','.join(s for s in SCOPES if s in wanted)} {hashlib.sha256(token.encode()).hexdigest()}\n"
        _write(path, text if text.endswith("\n") or not text else text + "\n", line)
    return token


def drop_key(path: Path, name: str) -> None:
    """Takes a key out of `path`; running servers refuse it within seconds. NotFoundError when there is none."""
    with locked(_lock(path)):
        held = [key.name for key in read_keys(path)]
        if name not in held:
            raise NotFoundError("no such key", value=name, valid=held)
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        _write(path, "".join(line for line in lines if line.partition("#")[0].split()[:1] != [name]), "")


def _write(path: Path, text: str, more: str) -> None:
    """Replaces the file by one of the same owner, group and mode, so that the server that reads it still can; a new file
    is its owner's only. UsageError, and the file as it was, where this user may not make such a file.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        held = path.stat() if path.exists() else None
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
        try:
            with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as f:
                if held is not None:
                    _like(f.fileno(), held, path)
                f.write((text + more).encode())
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        sync_directory(path.parent)


def _like(handle: int, held: os.stat_result, path: Path) -> None:
    made = os.fstat(handle)
    try:
        if (made.st_uid, made.st_gid) != (held.st_uid, held.st_gid):
            os.fchown(handle, held.st_uid, held.st_gid)
    except PermissionError as e:
        raise UsageError(
            "the API keys file belongs to another user or group, whose server could not read what this user writes",
            value=str(path),
            next_step="run the command as its owner, or as root",
        ) from e
    os.fchmod(handle, stat.S_IMODE(held.st_mode))


def _lock(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _scopes(given: Iterable[str]) -> frozenset[str]:
    scopes = frozenset(given)
    for scope in sorted(scopes):
        if scope not in SCOPES:
            raise UsageError("not a scope", value=scope, valid=SCOPES)
    if not scopes:
        raise UsageError("a key needs a scope", valid=SCOPES)
    return scopes


def _version(path: Path) -> tuple[int, int, int] | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
