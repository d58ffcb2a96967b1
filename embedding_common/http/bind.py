"""Takes a port. It is apart from `server`, because the supervisor serves nothing itself and so loads no server."""

from __future__ import annotations

import socket


def bind(host: str, port: int, *, variables: str) -> socket.socket:
    """Takes the port, without listening yet: connections are refused until a server listens on it.

    Raises `OSError` with one line that names the variables to change.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as problem:
        listener.close()
        raise OSError(f"cannot listen on {host} port {port} ({variables}): {problem.strerror}") from None
    return listener
