"""Callers that leave at every point of a request. What they leave behind is nothing."""

from __future__ import annotations

import random
import socket
import time
from typing import TYPE_CHECKING

import orjson
import pytest
from local_stack.part import wait_until
from local_stack.stack import LOOPBACK

from tests.system.faults.load import Load
from tests.system.faults.processes import children, descriptors, resident_mb
from tests.system.stack.client import fresh_texts

if TYPE_CHECKING:
    from collections.abc import Callable

    from local_stack.stack import LocalStack

    from tests.system.stack.client import Client

pytestmark = [pytest.mark.faults, pytest.mark.stack, pytest.mark.timeout(120)]

VANISHING = 400
LATEST_S = 0.01  # a request takes some milliseconds: before its reply, in the middle of it, and after
GROWTH_MB = 32


def vanish(port: int, dice: random.Random) -> None:
    """Sends some or all of a request, waits a moment, perhaps reads some of its reply, and is gone without a word."""
    body = orjson.dumps({"texts": fresh_texts(dice.choice((1, 50)))})
    whole = b"POST /embed HTTP/1.1\r\nhost: gateway\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)
    with socket.create_connection((LOOPBACK, port), timeout=5) as connection:
        # an end that is a reset, as of a process that was killed with data unread
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\0\0\0\0\0\0\0")
        connection.sendall(whole if dice.random() < 0.7 else whole[: dice.randrange(len(whole))])
        time.sleep(dice.uniform(0, LATEST_S))
        if dice.random() < 0.3:
            connection.setblocking(False)
            try:
                connection.recv(100)
            except BlockingIOError:
                return


def pending_bytes(client: Client) -> float:
    lines = client.send("GET", "/metrics").text.splitlines()
    return sum(float(line.split()[1]) for line in lines if line.startswith("embedding_pending_"))


def test_callers_that_vanish(cheap: LocalStack, cheap_client: Client, figures: Callable[..., None]) -> None:
    assert cheap.gateway.pid is not None
    [worker] = children(cheap.gateway.pid)
    dice = random.Random(7)
    cheap_client.vectors(fresh_texts(1))
    open_before, before_mb = descriptors(worker), resident_mb(worker)
    with Load(cheap.url, callers=2) as load:
        for _ in range(VANISHING):
            vanish(cheap.ports.gateway, dice)
    wait_until(lambda: pending_bytes(cheap_client) == 0, "no work is left over", timeout_s=10)
    wait_until(lambda: descriptors(worker) <= open_before + 8, "their connections are closed", timeout_s=30)
    grown_mb = resident_mb(worker) - before_mb
    figures(
        "callers that vanish", vanished=VANISHING, requests=len(load), failed=load.failed, memory=f"{grown_mb:+.0f} MB"
    )
    assert load.failed == 0, load.statuses
    assert grown_mb < GROWTH_MB
    assert "Traceback" not in cheap.gateway.log_text()
