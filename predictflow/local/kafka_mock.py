"""librdkafka's mock Kafka cluster in a process of its own: `python kafka_mock.py FILE` writes its address to FILE.

Not durable, no admin calls, at most 5 MiB or 100,000 messages per partition: for the tutorial only.
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path


def main(address_file: str) -> None:
    """Run until a signal ends the process."""
    from confluent_kafka import Producer

    # The cluster lives inside this client and serves other processes over TCP.
    cluster = Producer({"test.mock.num.brokers": 1, "bootstrap.servers": "replaced-by-the-mock"})
    addresses = [f"{broker.host}:{broker.port}" for broker in cluster.list_topics(timeout=10).brokers.values()]
    temporary = Path(f"{address_file}.new")
    temporary.write_text(",".join(addresses))
    temporary.replace(address_file)
    sys.stdout.write(f"mock Kafka cluster at {','.join(addresses)}: not durable, for the tutorial only\n")
    sys.stdout.flush()
    signal.pause()


if __name__ == "__main__":
    main(sys.argv[1])
