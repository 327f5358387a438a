"""Writes packed rows into a Redis Cluster: a call may hold keys of one slot only, so one call per row, to node after
node; in an event loop side by side on all nodes.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from feature_store.errors import UnavailableError
from feature_store.redis_batch import KEYS_PER_CALL, Batch
from feature_store.redis_connection import address_of, answering
from feature_store.redis_retry import Pause, ScriptLost, checked, raise_meaning, retried


def is_cluster(client: Any) -> bool:
    """Whether this is redis-py's client of a Cluster."""
    return hasattr(client, "nodes_manager")


def write_to_cluster(client: Any, batch: Batch, budget_seconds: float) -> int:
    """How many rows won. Safe to repeat. UnavailableError when a node has not answered for `budget_seconds`."""
    batch = batch.listed()
    pause = Pause(client, budget_seconds)
    written, left = 0, list(range(len(batch.keys)))
    while left:
        by_node: dict[str, tuple[Any, list[int]]] = {}
        for i in left:
            node = client.get_node_from_key(batch.keys[i])
            if node is None:  # a slot without a node
                raise UnavailableError(f"Redis Cluster at {address_of(client)} (REDIS_URL) does not cover all slots")
            by_node.setdefault(node.name, (node, []))[1].append(i)
        left, moved, error = [], [], None
        for node, rows in by_node.values():
            try:
                done, again = _on_node(client.get_redis_connection(node), batch, rows)
                written += done
                moved += again
            except retried() as e:
                left, error = left + rows, e
        with answering(client):
            for i in moved:  # the client follows the slot
                arguments = [batch.keys[i], *batch.head, *(part[i] for part in batch.rows)]
                written += int(client.eval(batch.script, 1, *arguments))
        if moved or left:
            with answering(client):
                client.nodes_manager.initialize()
        if error is not None:
            time.sleep(pause.after(error))  # grows, with jitter, and ends with the time budget
    return written


def _on_node(node: Any, batch: Batch, rows: list[int]) -> tuple[int, list[int]]:
    """Rows that won, and the rows that this node does not hold (any more)."""
    from redis.exceptions import AskError, ClusterDownError, MovedError, TryAgainError

    pool = node.connection_pool
    connection = pool.get_connection()
    written, again, script_lost = 0, [], False
    try:
        payload, calls = batch.calls(rows, per_call=1)
        connection.send_packed_command([payload])
        for i in rows[:calls]:
            try:
                written += checked(node, connection.read_response, disconnect_on_error=False)
            except ScriptLost:
                script_lost = True
                again.append(i)
            except (MovedError, AskError, TryAgainError, ClusterDownError):
                again.append(i)
    except BaseException:
        connection.disconnect()  # replies are left unread: whoever has it next would take them for its own
        raise
    finally:
        pool.release(connection)
    if script_lost:
        node.script_load(batch.script)
    return written, again


async def awrite_to_cluster(client: Any, batch: Batch, budget_seconds: float) -> int:
    """As `write_to_cluster`, on an asyncio client, which follows slots that move."""
    from redis.exceptions import ClusterDownError, NoScriptError, RedisClusterException

    batch = batch.listed()
    pause = Pause(client, budget_seconds)
    # RedisClusterException: not one node answers. AttributeError: the call that found a node gone has redis-py close the
    # connections of all the others, also of one that is just being made.
    waited = (*retried(), ClusterDownError, RedisClusterException, AttributeError)
    written, left = 0, list(range(len(batch.keys)))
    while left:
        again: list[int] = []
        error: Exception | None = None
        script_lost = False
        for start in range(0, len(left), KEYS_PER_CALL):  # as many connections at a time, at most
            some = left[start : start + KEYS_PER_CALL]
            calls = [
                client.evalsha(batch.sha, 1, batch.keys[i], *batch.head, *(part[i] for part in batch.rows))
                for i in some
            ]
            # All have ended before one's error is looked at: none runs on behind the caller's back.
            for i, reply in zip(some, await asyncio.gather(*calls, return_exceptions=True), strict=True):
                if isinstance(reply, NoScriptError):
                    script_lost = True
                    again.append(i)
                elif isinstance(reply, Exception) and isinstance(reply, waited):
                    error = reply
                    again.append(i)
                elif isinstance(reply, Exception):
                    raise_meaning(client, reply)
                    with answering(client):
                        raise reply
                elif isinstance(reply, BaseException):
                    raise reply
                else:
                    written += int(reply)
            if error is not None:
                again += left[start + KEYS_PER_CALL :]
                break
        if error is not None:
            await asyncio.sleep(pause.after(error))
        elif script_lost:
            with answering(client):
                await client.script_load(batch.script)  # on every primary
        left = again
    return written
