"""Commands for messages that the stream refused: `dlq list`, `dlq replay`."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import click

from feature_store.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from feature_store.dead_letters import DeadLetter

_SHOWN = 200


@click.group()
def dlq() -> None:
    """Messages that the stream refused."""


def _filters(command: Callable[..., Any]) -> Callable[..., Any]:
    options = [
        click.option("--topic", default=None, help="Event topic; default: those that feed the registry's views."),
        click.option("--partition", type=click.IntRange(min=0), default=None, help="Only of this partition."),
        click.option("--offset", type=click.IntRange(min=0), multiple=True, help="Only these offsets of the topic."),
        click.option("--view", default=None, help="Only those that this feature view refused."),
        click.option("--reason", default=None, help="Only those whose reason has this text in it."),
        click.option("--key", default=None, help="Only those with this message key."),
    ]
    for option in reversed(options):
        command = option(command)
    return command


@dlq.command("list")
@_filters
@click.option("--not-replayed", is_flag=True, help="Only those that were not sent again.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per line.")
def list_letters(topic: str | None, not_replayed: bool, as_json: bool, **filters: Any) -> None:
    """Show the dead letters of a topic, oldest first: where from, why, and the message."""
    count, (_, topics) = 0, _topics(topic)
    for name in topics:
        for letter in _letters(name, filters):
            if not_replayed and letter.replayed:
                continue
            count += 1
            key, value = _text(letter.key), _text(letter.value)
            if as_json:
                shown = {
                    "topic": letter.topic,
                    "partition": letter.partition,
                    "offset": letter.offset,
                    "reason": letter.reason,
                    "view": letter.view,
                    "key": key,
                    "value": value,
                    "replayed": letter.replayed,
                }
                click.echo(json.dumps(shown))
            else:
                again = " (replayed)" if letter.replayed else ""
                click.echo(f"{_place(letter)} {letter.view}: {_safe(letter.reason)}{again}")
                click.echo(f"  key {_safe(key)} value {_safe(value)}")
    if not as_json:
        click.echo(f"{count} dead letter(s) of {', '.join(topics)}")


@dlq.command("replay")
@_filters
@click.option("--again", is_flag=True, help="Also those that were sent again before.")
@click.option("--dry-run", is_flag=True, help="Show what would be sent; send nothing.")
@click.option("--yes", is_flag=True, help="Send them. Without this, or --dry-run, nothing is sent.")
def replay(topic: str | None, again: bool, dry_run: bool, yes: bool, **filters: Any) -> None:
    """Send refused messages to their topic once more, with their key and bytes: after a mended view or producer.

    Each message goes once, however often this is run; a killed run goes on where it stopped. A view that took the message
    the first time counts it again, unless its source names an event id.
    """
    from feature_store.dead_letters import replay_dead_letters

    if dry_run == yes:
        raise UsageError("a message that was sent cannot be taken back: pass --dry-run to see them, or --yes to send")
    config, topics = _topics(topic)
    for name in topics:
        done = replay_dead_letters(config, name, _letters(name, filters), again=again, dry_run=dry_run)
        if dry_run:
            for letter in done.sent:
                click.echo(f"{_place(letter)} {letter.view}: {_safe(letter.reason)}")
        click.echo(
            f"{name}: {len(done.sent)} message(s) {'would be sent' if dry_run else 'sent'} again, "
            f"{done.before} were before (--again sends them too), "
            f"{done.truncated} cannot be: the dead-letter topic holds a part of them only"
        )


def _topics(topic: str | None) -> tuple[dict[str, Any], list[str]]:
    from feature_store.stream_topic import topics_of
    from feature_store.topic import client_config
    from predictflow.settings import Settings
    from predictflow.wiring import feast_store

    settings = Settings.from_environ(os.environ)
    config = client_config(settings.need("kafka_bootstrap_servers"))
    return config, [topic] if topic else topics_of(feast_store(settings))


def _letters(topic: str, filters: dict[str, Any]) -> list[DeadLetter]:
    from feature_store.dead_letters import read_dead_letters
    from feature_store.topic import client_config
    from predictflow.settings import Settings

    config = client_config(Settings.from_environ(os.environ).need("kafka_bootstrap_servers"))
    partition, offsets, view, reason, key = (filters[n] for n in ("partition", "offset", "view", "reason", "key"))
    return [
        x
        for x in read_dead_letters(config, topic)
        if (partition is None or x.partition == partition)
        and (not offsets or x.offset in offsets)
        and (view is None or x.view == view)
        and (reason is None or reason in x.reason)
        and (key is None or x.key == key.encode())
    ]


def _place(letter: DeadLetter) -> str:
    return f"{letter.topic}/{letter.partition}/{letter.offset}"


def _text(data: bytes | None) -> str | None:
    return None if data is None else data.decode("utf-8", "backslashreplace")


def _safe(text: str | None) -> str:
    """For a terminal: control characters of a message must not reach it."""
    if text is None:
        return "none"
    return ascii(text[:_SHOWN]) + ("..." if len(text) > _SHOWN else "")


COMMANDS = [dlq]
