"""Ports that several processes listen on together, checked and held before they start."""

from __future__ import annotations

import socket

from feature_store.errors import PredictFlowError


def reserve_port(host: str, port: int) -> socket.socket:
    """Holds a port for workers that bind it with SO_REUSEPORT; PredictFlowError when somebody else listens there.

    The socket is bound and does not listen, so no connection goes to it. Keep it open as long as the workers run.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:  # without SO_REUSEPORT: others there make it fail
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            port = probe.getsockname()[1]
        held = socket.socket(family, kind, protocol)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        held.bind((address[0], port, *address[2:]))
    except OSError as e:
        raise cannot_listen(host, port, str(e.strerror or e)) from e
    return held


def cannot_listen(host: str, port: int, why: str) -> PredictFlowError:
    """The error of a gRPC port that cannot be listened on."""
    return PredictFlowError(
        f"gRPC cannot listen on {host}:{port} ({why})",
        next_step="stop what listens there, or choose another --grpc-port (0: no gRPC)",
    )
