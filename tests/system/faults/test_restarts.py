"""Everything restarted under load, one part after the other: nobody notices."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
from local_stack.part import wait_until

from tests.system.faults.load import Load
from tests.system.faults.processes import children

if TYPE_CHECKING:
    from collections.abc import Callable

    from local_stack.stack import LocalStack

pytestmark = [pytest.mark.faults, pytest.mark.timeout(240)]


EVERY_S = 0.2
"""Of each caller: replicas that load their models need some of the machine."""


def reload_haproxy(stack: LocalStack) -> None:
    loaded = stack.haproxy.log_text().count("Loading success")
    stack.haproxy.send(signal.SIGUSR2)
    wait_until(lambda: stack.haproxy.log_text().count("Loading success") > loaded, "it has reloaded", timeout_s=20)


def replace_gateway(stack: LocalStack) -> None:
    parent = stack.gateway.pid
    assert parent is not None
    [old] = children(parent)
    stack.gateway.send(signal.SIGHUP)
    wait_until(lambda: len(now := children(parent)) == 1 and now != [old], "a successor is alone", timeout_s=60)


def replace_replicas(stack: LocalStack) -> None:
    for replica in stack.replicas:
        assert replica.stop() == 0
        replica.start()
        stack.wait_ready()


@pytest.mark.parametrize(
    ("name", "restart"),
    [
        pytest.param("rolling restart of all replicas", replace_replicas, id="replicas"),
        pytest.param("reload of HAProxy", reload_haproxy, id="haproxy", marks=pytest.mark.stack),
        pytest.param("replacement of the gateway", replace_gateway, id="gateway", marks=pytest.mark.stack),
    ],
)
def test_a_restart_under_load_fails_no_request(
    stack: LocalStack, figures: Callable[..., None], name: str, restart: Callable[[LocalStack], None]
) -> None:
    with Load(stack.url, every_s=EVERY_S) as load:
        wait_until(lambda: len(load) > 200, "load is on", timeout_s=60)
        restart(stack)
        before = len(load)
        wait_until(lambda: len(load) > before + 200, "load goes on", timeout_s=60)
    figures(name, requests=len(load), failed=load.failed)
    assert load.failed == 0, load.statuses
