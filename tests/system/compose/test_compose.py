"""`docker compose up --wait` from the root, for real: what an operator and a storage server find."""

from __future__ import annotations

import json
import shlex
import socket
import time
from typing import TYPE_CHECKING

import pytest

from tests.system.compose.project import REPLICAS, ROOT, eventually, listens, run

if TYPE_CHECKING:
    from tests.system.compose.project import Project

# Building the model image takes minutes where its layers are not cached yet.
pytestmark = [pytest.mark.compose, pytest.mark.timeout(1500)]

SERVICES = ["embedding", "ml-base", "ml-base-lb", "redis-cache"]
MIB = 1 << 20

# What a storage server in a container of its own does: URL, JSON body.
CALL = """
import sys, urllib.request
request = urllib.request.Request(sys.argv[1], sys.argv[2].encode(), {"content-type": "application/json"})
print(urllib.request.urlopen(request, timeout=30).read().decode())
"""


def readme_curl() -> list[str]:
    [command] = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("    curl -s http")]
    return shlex.split(command)


def own_address() -> str:
    """An address of this machine that is not loopback. Nothing is sent: a datagram socket only looks up the route."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))
        return str(probe.getsockname()[0])


# --- what an operator sees ---


def test_every_service_is_healthy_with_three_replicas(project: Project) -> None:
    rows = [row.split() for row in project.compose("ps", "--format", "{{.Service}} {{.Health}}").splitlines()]
    assert sorted(rows) == [[service, "healthy"] for service in sorted([*SERVICES, "ml-base", "ml-base"])]


def test_the_balancer_sees_three_replicas_up(project: Project) -> None:
    eventually(lambda: project.replicas_up() == REPLICAS, "all replicas are in service", within_s=10)
    assert "Statistics Report" in project.get("STATS_PORT", "/stats").text


def test_the_runtime_socket_answers_show_stat(project: Project) -> None:
    with socket.create_connection(("127.0.0.1", project.port("STATS_PORT")), timeout=10) as connection:
        connection.sendall(b"show stat\n")
        answer = connection.makefile("rb").read().decode()
    assert answer.startswith("# pxname,svname,")


def test_the_gateway_is_connected_to_both_sides(project: Project) -> None:
    assert project.get("EMBEDDING_PORT", "/health").json()["ml_base_connected"] is True
    assert project.redis_connected()


def test_the_readmes_curl_gets_a_vector(project: Project) -> None:
    command = [word.replace("localhost:8888", f"localhost:{project.port('EMBEDDING_PORT')}") for word in readme_curl()]
    reply = json.loads(run(*command))
    assert (reply["dimension"], len(reply["embeddings"][0])) == (384, 384)


# --- what callers get ---


def test_a_text_is_embedded_once_and_then_cached(project: Project) -> None:
    first, second = (project.embed(["The quick brown fox"]) for _ in range(2))
    assert (first["cached_count"], second["cached_count"]) == (0, 1)
    assert first["embeddings"] == second["embeddings"]


def test_the_balancers_port_embeds_too_uncached(project: Project) -> None:
    through_gateway = project.embed(["The slow red fox"])
    direct = project.embed(["The slow red fox"], port="ML_PORT")
    assert direct["cached_count"] == 0
    assert direct["embeddings"][0] == pytest.approx(through_gateway["embeddings"][0], abs=1e-5)


@pytest.mark.parametrize("url", ["http://embedding:8888/embed", "http://ml-base-lb:8887/embed"])
def test_a_storage_server_on_the_network_calls_by_name(project: Project, url: str) -> None:
    container = ["--rm", "--network", project.environment["SUTRA_NETWORK"], "python:3.11-slim-bookworm"]
    body = json.dumps({"texts": ["a document", "another"], "normalize": True})
    reply = json.loads(run("docker", "run", *container, "python", "-c", CALL, url, body))
    assert [len(vector) for vector in reply["embeddings"]] == [384, 384]


# --- what is closed ---


def test_only_the_gateway_listens_outside_this_machine(project: Project) -> None:
    ports = {name: project.port(name) for name in ("EMBEDDING_PORT", "ML_PORT", "STATS_PORT")}
    assert [name for name, port in ports.items() if listens(own_address(), port)] == ["EMBEDDING_PORT"]
    assert all(listens("127.0.0.1", port) for port in ports.values())


def test_no_other_port_of_any_container_is_published(project: Project) -> None:
    published = [
        (service, port, binding["HostIp"] in {"127.0.0.1", "::1"})
        for service in SERVICES
        for container in project.inspect(service)
        for port, bindings in container["NetworkSettings"]["Ports"].items()
        for binding in bindings or ()
    ]
    assert set(published) == {
        ("embedding", "8888/tcp", False),
        ("ml-base-lb", "8887/tcp", True),
        ("ml-base-lb", "9999/tcp", True),
    }


@pytest.mark.parametrize("service", SERVICES)
def test_a_container_is_shut_in(project: Project, service: str) -> None:
    for container in project.inspect(service):
        host = container["HostConfig"]
        assert host["ReadonlyRootfs"]
        assert host["CapDrop"] == ["ALL"]
        assert host["SecurityOpt"] == ["no-new-privileges:true"]
        assert host["Memory"] > 0
        assert host["PidsLimit"] > 0
        assert host["LogConfig"]["Config"] == {"max-size": "10m", "max-file": "3"}


@pytest.mark.parametrize("service", SERVICES)
def test_a_process_is_not_root_has_no_capability_and_cannot_write_its_root(project: Project, service: str) -> None:
    status = project.compose("exec", "-T", service, "cat", "/proc/1/status")
    fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert "0" not in fields["Uid"].split()
    assert int(fields["CapEff"], 16) == int(fields["CapPrm"], 16) == 0
    assert fields["NoNewPrivs"] == "1"
    denied = project.compose("exec", "-T", service, "sh", "-c", "touch /usr/x 2>&1 || true")
    assert "Read-only file system" in denied or "Permission denied" in denied


def test_the_gateways_image_adds_little_to_its_base(project: Project) -> None:
    sizes = [
        int(run("docker", "image", "inspect", "--format", "{{.Size}}", image))
        for image in (f"{project.name}-embedding", "python:3.11-slim-bookworm")
    ]
    assert sizes[0] - sizes[1] < 250 * MIB


def test_replicas_start_with_the_model_that_came_with_the_image(project: Project) -> None:
    log = project.compose("logs", "ml-base")
    assert "from='wheel" in log
    assert "converted the model" not in log
    assert "torch float32 is used" not in log


@pytest.mark.parametrize("service", ["embedding", "ml-base"])
def test_an_image_holds_nothing_but_pinned_versions(project: Project, service: str) -> None:
    # its base brings pip and what belongs to it; torch adds where it was built for
    frozen = run("docker", "run", "--rm", f"{project.name}-{service}", "pip", "freeze").replace("+cpu", "")
    ours = {line.lower().replace("_", "-") for line in frozen.splitlines() if "==" in line}
    allowed = set((ROOT / "constraints.txt").read_text().splitlines())
    assert ours <= allowed


# --- stopping ---


def test_a_stopped_stack_has_ended_cleanly_and_finds_its_vectors_when_it_is_back(project: Project) -> None:
    before = project.embed(["The third fox sleeps"])
    began = time.monotonic()
    project.compose("stop")
    took_s = time.monotonic() - began
    ended = project.compose("ps", "--all", "--format", "{{.Service}} {{.ExitCode}}").splitlines()
    project.up()
    after = project.embed(["The third fox sleeps"])
    assert {line.split()[1] for line in ended} == {"0"}, ended
    assert took_s < 40, "no process was killed because it did not obey SIGTERM"
    assert after["cached_count"] == 1
    assert after["embeddings"] == before["embeddings"]
