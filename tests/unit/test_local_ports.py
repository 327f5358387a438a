"""Ports are remembered, and a busy one is replaced."""

from __future__ import annotations

import socket
from pathlib import Path

from predictflow.local.ports import HOST, Ports, answers, free_port, is_free


def test_a_port_is_remembered(tmp_path: Path) -> None:
    chosen, busy = Ports(tmp_path / "ports.json").choose("redis")
    assert busy is None
    assert Ports(tmp_path / "ports.json").choose("redis") == (chosen, None)
    assert Ports(tmp_path / "ports.json").get("redis") == chosen


def test_a_remembered_port_that_is_busy_is_named_and_replaced(tmp_path: Path) -> None:
    ports = Ports(tmp_path / "ports.json")
    first, _ = ports.choose("redis")
    with socket.socket() as other:
        other.bind((HOST, first))
        other.listen()
        assert not is_free(first)
        assert answers(first)
        second, busy = ports.choose("redis")
    assert busy == first
    assert second != first
    assert ports.get("redis") == second


def test_ports_stay_out_of_the_ephemeral_range() -> None:
    """There, an outgoing connection can take the port of a stopped server, or connect to itself."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        ephemeral = probe.getsockname()[1]
    assert free_port() < 32_000 < ephemeral
