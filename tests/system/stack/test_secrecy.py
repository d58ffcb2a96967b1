"""What the real stack writes down, and what it lets the network do: markers sent through every route, and every log."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

import httpx
import pytest
from local_stack.stack import LOOPBACK, LocalStack

from tests.system.stack.client import run_script

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

TEXT, KEY, ADMIN_KEY, WRONG_KEY = "marker-text", "marker-key-0123", "marker-admin-key", "marker-wrong-key"
BODIES = [
    {"texts": [TEXT]},
    {"texts": [TEXT, 5]},
    {"texts": TEXT},
    {"texts": [TEXT], "dimensions": TEXT},
    {"texts": [TEXT], "normalize": TEXT},
    {"texts": [f"{TEXT} " * 400], "truncate": False},
    {"inputs": [TEXT]},
    {"input": TEXT},
    {"input": {TEXT: TEXT}},
    {"inputs": [TEXT], "texts": [TEXT]},
    {"text": TEXT},
]
POSTS = ["/", "/embed", "/v1/embeddings", "/embeddings", "/tokenize", "/vectors", "/cache/clear", "/nowhere"]
GETS = ["/health", "/livez", "/readyz", "/info", "/models", "/v1/models", "/cache/stats", "/metrics", "/openapi.json"]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    folder = tmp_path_factory.mktemp("secrecy")
    file = folder / "keys"
    file.write_text(f"{KEY}\n")
    env = {"API_KEYS_FILE": str(file), "ADMIN_API_KEYS": ADMIN_KEY, "LOG_LEVEL": "DEBUG", "EMBEDDING_CHECK_HITS": "1"}
    with LocalStack(state_dir=folder, replicas=1, env=env) as stack:
        stack.start()
        stack.wait_ready()
        yield stack


def test_no_log_of_any_part_holds_a_text_or_a_key(stack: LocalStack) -> None:
    statuses = set()
    with httpx.Client(timeout=60) as http:
        for key in (KEY, ADMIN_KEY, WRONG_KEY):
            headers = {"authorization": f"Bearer {key}"}
            for url in (stack.url, stack.ml_url):
                for path in POSTS:
                    for body in BODIES:
                        statuses.add(http.post(url + path, json=body, headers=headers).status_code)
                    http.post(url + path, content=f'{{"texts":["{TEXT}'.encode(), headers=headers)
                for path in GETS:
                    reply = http.get(url + path, headers=headers)
                    statuses.add(reply.status_code)
                    assert "marker" not in reply.text, path
    assert {200, 400, 401, 403, 404, 422} <= statuses
    assert not [status for status in statuses if status >= 500]
    logs = {part.name: part.log_text() for part in stack.parts}
    assert all(logs.values())
    assert not [(name, line) for name, log in logs.items() for line in log.splitlines() if "marker" in line]


def test_a_hit_is_checked_against_a_real_replica(stack: LocalStack) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=stack.url, headers=headers, timeout=60) as http:
        for _ in range(10):
            assert http.post("/embed", json={"texts": ["checked", "also checked"]}).status_code == 200
        metrics = http.get("/metrics").text.splitlines()
    figures = dict(line.rsplit(" ", 1) for line in metrics if line.startswith("embedding_drift"))
    assert float(figures['embedding_drift_checks_total{result="same"}']) >= 1
    assert float(figures['embedding_drift_checks_total{result="different"}']) == 0
    assert float(figures["embedding_drift_worst"]) < 0.001


@pytest.mark.parametrize("script", ["validate_scaling.py", "warm_cache.py"])
def test_the_scripts_open_a_locked_gateway_and_do_not_tell_with_what(
    stack: LocalStack, tmp_path: Path, script: str
) -> None:
    texts = tmp_path / "texts"
    texts.write_text("one\ntwo\n")
    where: list[str | Path] = ["--url", stack.url, "--stats-url", stack.stats_url, "--replicas", "1"]
    options = where if script == "validate_scaling.py" else [texts, "--url", stack.url]
    locked, _, _ = run_script(script, *options)
    opened, out, err = run_script(script, *options, "--api-key-file", stack.state_dir / "keys")
    assert (locked != 0, opened) == (True, 0), out + err
    assert KEY not in out + err


def runtime(stack: LocalStack, command: str) -> str:
    """HAProxy's runtime socket, over the network."""
    with socket.create_connection((LOOPBACK, stack.ports.stats), timeout=5) as connection:
        connection.sendall(command.encode() + b"\n")
        return b"".join(iter(lambda: connection.recv(4096), b"")).decode()


@pytest.mark.parametrize(
    "command",
    [
        "disable server ml-base/ml-base-1",
        "set server ml-base/ml-base-1 state maint",
        "set server ml-base/ml-base-1 addr 127.0.0.1",
        "shutdown sessions server ml-base/ml-base-1",
        "clear counters all",
        "set maxconn global 1",
        "disable frontend ml-base-lb",
        "expert-mode on",
        "operator; disable server ml-base/ml-base-1",
    ],
)
def test_haproxys_socket_on_the_network_changes_nothing(stack: LocalStack, command: str) -> None:
    before = stack.servers()
    assert "permission denied" in runtime(stack, command).lower()
    assert stack.servers() == before
    assert "ml-base-1" in runtime(stack, "show stat")


def test_haproxys_page_takes_no_action(stack: LocalStack) -> None:
    page = httpx.get(f"{stack.stats_url}/stats")
    assert page.status_code == 200
    assert 'name="action"' not in page.text
    form = {"s": "ml-base-1", "action": "maint", "b": "#2"}
    assert "stats: OK" not in str(httpx.post(f"{stack.stats_url}/stats", data=form).headers)
    assert set(stack.servers().values()) == {"UP"}
