"""The port is the server's from the first moment: two servers must never share one unnoticed."""

from __future__ import annotations

import socket

import pytest

from feature_store.errors import PredictFlowError
from predictflow.cli_serve import listen


def test_a_second_server_on_the_port_is_refused_before_the_first_is_ready() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with listen("127.0.0.1", port), pytest.raises(PredictFlowError, match=f"cannot listen on 127.0.0.1:{port}"):
        listen("127.0.0.1", port)
