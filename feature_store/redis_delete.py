"""Removing views and entities: which Redis keys are a project's, and one script call on each of many, pipelined."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from feature_store.redis_cluster_writer import is_cluster
from feature_store.redis_connection import answering
from feature_store.redis_layout import join_keys_of

# Removes one view from a hash that several views share; the hash goes when no view is left in it.
DROP_VIEW = """
for i = 1, #ARGV, 2000 do
  redis.call('HDEL', KEYS[1], unpack(ARGV, i, math.min(i + 1999, #ARGV)))
end
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  if field:sub(1, 4) == '_ts:' then return 0 end
end
return redis.call('DEL', KEYS[1])
"""

_COMMAND_BATCH = 1_000


@dataclass(frozen=True)
class Command:
    """One script call on one key."""

    key: bytes
    args: list[bytes]


def run_script(client: Any, script: str, commands: Iterable[Command]) -> Iterator[list[int]]:
    """Runs `script` once per command, pipelined; yields the replies of each thousand.

    Safe to repeat where the script is. UnavailableError when Redis does not answer: batches before it are done.
    """
    batch: list[Command] = []
    for command in commands:
        batch.append(command)
        if len(batch) >= _COMMAND_BATCH:
            yield _run(client, script, batch)
            batch = []
    if batch:
        yield _run(client, script, batch)


def _run(client: Any, script: str, batch: list[Command]) -> list[int]:
    with answering(client):
        if is_cluster(client):  # its pipelines know no scripts
            return [int(client.eval(script, 1, c.key, *c.args)) for c in batch]
        sha = client.script_load(script)
        pipe = client.pipeline(transaction=False)
        for command in batch:
            pipe.evalsha(sha, 1, command.key, *command.args)
        return [int(reply) for reply in pipe.execute()]


def keys_of(client: Any, project: str, join_keys: Sequence[str]) -> Iterator[bytes]:
    """The keys of entities with exactly these join keys, of this project only; a key may come twice."""
    # Feast matches by a glob of prefix and suffix alone: bytes of a key can be wildcards, and a project's name can
    # end in another's, so each key is parsed.
    wanted = sorted(join_keys)
    with answering(client):
        for key in scan(client, project):
            if join_keys_of(key, project) == wanted:
                yield key


def scan(client: Any, project: str) -> Iterator[bytes]:
    """Every key whose bytes end in `project`, on all primaries of a Cluster too; a key may come twice."""
    yield from client.scan_iter(match=b"*" + _literal(project.encode()), count=1000)


def _literal(text: bytes) -> bytes:
    """`text` for a glob that matches it alone."""
    return b"".join(b"\\" + bytes([c]) if c in b"\\*?[]^-" else bytes([c]) for c in text)
