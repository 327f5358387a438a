"""Asks the broker now and then, beside other work, whether a topic is still the one that a consumer started on."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

log = logging.getLogger(__name__)

_EVERY_SECONDS = 3.0
_FRESH_SECONDS = 0.5
_REQUEST_SECONDS = 10.0


class TopicWatch:
    """The id of one topic, as `topic.topic_id`, without waiting for the answer."""

    def __init__(self, config: Mapping[str, Any], topic: str) -> None:
        from confluent_kafka.admin import AdminClient

        # Quiet: the consumer tells of a broker that is away.
        self._admin = AdminClient({**config, "log_level": 2})
        self._topic = topic
        self._asked: Any = None
        self._asked_at = float("-inf")
        self._known = ""

    def id(self, wait: float = 0.0) -> str:
        """The id by the last answer; '' before the first, and where the broker has none.

        `wait`: seconds for a fresh answer, at most; without it the broker is asked every 3 seconds.
        """
        age = time.monotonic() - self._asked_at
        if self._asked is None and age >= (_FRESH_SECONDS if wait else _EVERY_SECONDS):
            self._ask()
        until = time.monotonic() + wait
        while self._asked is not None and not self._asked.done() and time.monotonic() < until:
            time.sleep(0.01)
        if self._asked is not None and self._asked.done():
            self._take()
        return self._known

    def _ask(self) -> None:
        from confluent_kafka import TopicCollection

        asked = self._admin.describe_topics(TopicCollection([self._topic]), request_timeout=_REQUEST_SECONDS)
        self._asked = asked[self._topic]
        self._asked_at = time.monotonic()

    def _take(self) -> None:
        from confluent_kafka import KafkaException

        asked, self._asked = self._asked, None
        try:
            self._known = str(asked.result().topic_id)
        except KafkaException as e:  # no broker, no topic: the consumer says so; or no topic ids
            log.debug("no topic id of %s: %s", self._topic, e)
