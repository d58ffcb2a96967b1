"""`embedding-validate` against a real HTTP server on loopback that plays gateway, balancer and storage server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from embedding_service.tools.validate import __main__ as validate_scaling
from embedding_service.tools.validate.checks import Counts, judge_counters
from embedding_service.tools.validate.load import Load, Reply
from tests.support.embedding_server import JsonHandler, LoopbackServer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SCRIPT = Path(__file__).resolve().parents[5] / "scripts" / "validate_scaling.py"
Answer = tuple[int, dict[str, Any]]


class FakeSystem:
    """A gateway whose misses go round its replicas in turn. Tests change its attributes to break it."""

    def __init__(self) -> None:
        self.replicas = {"r1": "UP", "r2": "UP", "r3": "UP"}
        self.answered = dict.fromkeys(self.replicas, 100)
        self.health: Answer = (200, {"status": "healthy", "model_loaded": True, "ml_base_connected": True})
        self.misbehave: Callable[[dict[str, Any]], Answer | None] = lambda _: None
        self.caches = True
        self.counts = True
        self.stats_status = 200
        self.learned: list[dict[str, Any]] = []
        self.learned_status = 201
        self.vector_of: Callable[[str], list[float]] = lambda text: [float(len(text)), 1.0]
        self._totals = {"requests": 1000, "hits": 500}
        self._known: set[str] = set()
        self._lock = threading.Lock()
        system = self

        class Handler(JsonHandler):
            def do_GET(self) -> None:  # noqa: N802 - the name http.server calls
                if self.path == "/stats;csv":
                    self.answer(system.stats_status, system.table().encode())
                elif self.path == "/cache/stats":
                    self.answer(200, {"total": system._totals})
                else:
                    self.answer(*system.health)

            def do_POST(self) -> None:  # noqa: N802 - the name http.server calls
                request = self.request_json()
                with system._lock:
                    status, told = system.learn(request) if self.path == "/api/learn" else system.embed(request)
                self.answer(status, told)

        self.server = LoopbackServer(Handler)
        self.url = self.server.url

    def embed(self, request: dict[str, Any]) -> Answer:
        if (answer := self.misbehave(request)) is not None:
            return answer
        texts = request["texts"]
        cached = sum(text in self._known for text in texts)
        if self.caches:
            self._known.update(texts)
        if cached < len(texts):
            self.dispatch()
        if self.counts:
            self._totals["requests"] += len(texts)
            self._totals["hits"] += cached
        vectors = [self.vector_of(text) for text in texts]
        return 200, {"embeddings": vectors, "cached_count": cached, "model": "fake", "batch_size": len(texts)}

    def learn(self, request: dict[str, Any]) -> Answer:
        self.learned.append(request)
        status, _ = self.embed({"texts": request["content"].split("\n\n")})
        return (self.learned_status if status == 200 else status), {}

    def dispatch(self) -> None:
        up = [name for name, status in self.replicas.items() if status.startswith("UP")]
        if up:
            self.answered[min(up, key=self.answered.__getitem__)] += 1

    def table(self) -> str:
        rows = [
            f"ml-base,{name},{status},{2 * self.answered[name]},{self.answered[name]},"
            for name, status in self.replicas.items()
        ]
        return "\n".join(
            ["# pxname,svname,status,stot,hrsp_2xx,", "ml,FRONTEND,OPEN,9,9,", *rows, "ml-base,BACKEND,UP,9,9,", ""]
        )


@pytest.fixture
def system() -> Iterator[FakeSystem]:
    fake = FakeSystem()
    with fake.server.serving():
        yield fake


def validate(system: FakeSystem, *options: str) -> int:
    return validate_scaling.main(["--url", system.url, "--stats-url", system.url, *options])


def checks_of(system: FakeSystem, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, Any]:
    code = validate(system, "--json", *options)
    told = json.loads(capsys.readouterr().out)
    assert code == (0 if told["passed"] else 1)
    checks: dict[str, Any] = told["checks"]
    return checks


def missed(checks: dict[str, Any]) -> list[str]:
    return [name for name, check in checks.items() if check["passed"] is False]


# --- a whole run


def test_a_sound_system_passes_with_a_check_mark_per_target(
    system: FakeSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    assert validate(system) == 0
    out = capsys.readouterr().out
    assert out.count("  ✓ ") == 7
    assert "✗" not in out
    assert "3 of 3 took part" in out
    assert "PASSED: 7 met, 0 missed, 0 not judged" in out


def test_the_json_report_holds_every_figure(system: FakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
    checks = checks_of(system, capsys, "--requests", "20", "--texts", "3")
    assert missed(checks) == []
    assert list(checks) == [
        "health", "one_request", "concurrent_load", "repeated_load", "counters", "same_vectors", "replicas",
    ]  # fmt: skip
    load, repeated = checks["concurrent_load"], checks["repeated_load"]
    assert (load["requests"], load["success"], load["failures"]) == (20, 1.0, {})
    assert load["p50_ms"] <= load["p95_ms"]
    assert (repeated["texts"], repeated["hits"], repeated["hit_rate"]) == (60, 60, 1.0)
    assert sum(checks["replicas"]["requests"].values()) == 21
    assert min(checks["replicas"]["requests"].values()) == 7


def test_texts_are_new_in_every_run(system: FakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        assert sum(checks_of(system, capsys)["replicas"]["requests"].values()) == 61


def test_the_load_is_as_concurrent_as_asked(system: FakeSystem) -> None:
    barrier = threading.Barrier(12, timeout=30)

    def wait_for_all(request: dict[str, Any]) -> None:
        if "of document" in request["texts"][0]:
            system._lock.release()
            barrier.wait()
            system._lock.acquire()

    system.misbehave = wait_for_all
    assert validate(system, "--requests", "24") == 0


# --- stopped replicas


def test_two_stopped_replicas_are_named_and_fail_the_run(
    system: FakeSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    system.replicas |= {"r2": "DOWN", "r3": "DOWN 1/2"}
    assert validate(system) == 1
    out = capsys.readouterr().out
    assert "✗ replicas" in out
    assert "1 of 3 took part; not in service: r2, r3" in out
    assert "FAILED: 6 met, 1 missed" in out


@pytest.mark.parametrize("options", [["--backend", "elsewhere"], ["--stats-url", "http://127.0.0.1:1"]])
def test_without_the_balancers_figures_the_run_fails(
    system: FakeSystem, capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert missed(checks_of(system, capsys, *options)) == ["replicas"]


def test_a_balancer_that_refuses_its_figures_is_quoted(system: FakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
    system.stats_status = 401
    assert "status 401" in checks_of(system, capsys)["replicas"]["measured"]


# --- missed targets


def test_a_url_that_does_not_answer_fails_at_once_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert validate_scaling.main(["--url", "http://127.0.0.1:1"]) == 1
    out = capsys.readouterr().out
    assert "✗ health" in out
    assert "cannot connect to 127.0.0.1:1" in out
    assert "nothing else was tried" in out


def test_an_unhealthy_service_is_still_measured(system: FakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
    system.health = (503, {"status": "unhealthy", "ml_base_connected": False})
    checks = checks_of(system, capsys)
    assert missed(checks) == ["health"]
    assert checks["health"]["measured"] == "unhealthy, no replica connected"


@pytest.mark.parametrize(("failing", "passes"), [(3, False), (2, True)])
def test_more_than_95_percent_must_be_answered(
    system: FakeSystem, capsys: pytest.CaptureFixture[str], failing: int, passes: bool
) -> None:
    bad = tuple(f"document {index}," for index in range(failing))
    refused = (503, {"error": "no_replica"})
    system.misbehave = lambda request: refused if any(word in request["texts"][0] for word in bad) else None
    load = checks_of(system, capsys, "--requests", "60")["concurrent_load"]
    assert load["passed"] is passes
    assert load["failures"] == {"status 503: no_replica": failing}


def test_a_cache_that_never_hits_is_found_out(system: FakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
    system.caches = False
    assert missed(checks_of(system, capsys)) == ["repeated_load"]


def test_counters_that_tell_less_than_the_replies_are_found_out(
    system: FakeSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    system.counts = False
    assert missed(checks_of(system, capsys)) == ["counters"]


def test_the_traffic_of_others_is_no_disagreement() -> None:
    check = judge_counters(Counts(10, 10), Counts(15, 12))
    assert check.passed
    assert "others were served meanwhile" in check.details


def test_a_cache_that_returns_another_texts_vector_is_found_out(
    system: FakeSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    system.vector_of = lambda text: [1.0, 0.0] if text in system._known and system._totals["hits"] > 510 else [0.0, 1.0]
    assert missed(checks_of(system, capsys)) == ["same_vectors"]


@pytest.mark.parametrize(
    "reply",
    [
        pytest.param({}, id="no fields"),
        pytest.param({"embeddings": [[1.0]], "cached_count": 0, "model": "m"}, id="too few"),
        pytest.param({"embeddings": [1.0] * 8, "cached_count": 0, "model": "m"}, id="no rows"),
        pytest.param({"embeddings": [[None]] * 8, "cached_count": 0, "model": "m"}, id="not finite"),
    ],
)
def test_a_broken_reply_is_no_success(
    system: FakeSystem, capsys: pytest.CaptureFixture[str], reply: dict[str, Any]
) -> None:
    system.misbehave = lambda _: (200, reply)
    checks = checks_of(system, capsys, "--requests", "5")
    assert checks["concurrent_load"]["success"] == 0.0
    assert {"concurrent_load", "repeated_load", "replicas"} <= set(missed(checks))


def test_percentiles_are_latencies_that_some_request_had() -> None:
    load = Load([Reply(seconds / 1000) for seconds in range(100, 0, -1)])
    assert (load.percentile_ms(50), load.percentile_ms(95)) == (50.0, 95.0)
    assert load.mean_ms == pytest.approx(50.5)


# --- through a storage server


def test_a_storage_server_gets_the_same_load_as_content(system: FakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
    checks = checks_of(system, capsys, "--learn-url", f"{system.url}/api", "--requests", "20", "--texts", "3")
    assert missed(checks) == []
    assert len(system.learned) == 2 + 2 * 20
    assert all(set(request) == {"content", "metadata"} for request in system.learned)
    assert len(system.learned[-1]["content"].split("\n\n")) == 3
    assert checks["repeated_load"]["hit_rate"] == 1.0
    assert min(checks["replicas"]["requests"].values()) == 7


def test_a_storage_server_may_be_tried_where_gateway_and_balancer_are_out_of_reach(
    system: FakeSystem, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = "http://127.0.0.1:1"
    options = ["--learn-url", f"{system.url}/api", "--url", nowhere, "--stats-url", nowhere]
    assert validate_scaling.main(options) == 0
    assert "PASSED: 2 met, 0 missed, 3 not judged" in capsys.readouterr().out


def test_a_storage_server_must_answer_201(system: FakeSystem, capsys: pytest.CaptureFixture[str]) -> None:
    system.learned_status = 200
    checks = checks_of(system, capsys, "--learn-url", f"{system.url}/api", "--requests", "5")
    assert checks["concurrent_load"]["failures"] == {"status 200": 5}


# --- the command


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        pytest.param(["--url", "localhost:8888"], "is no http:// URL", id="url"),
        pytest.param(["--url", "http://[bad"], "is no http:// URL", id="broken url"),
        pytest.param(["--concurrency", "0"], "whole number above 0", id="count"),
        pytest.param(["--timeout", "inf"], "seconds above 0", id="seconds"),
        pytest.param(["--nonsense"], "unrecognized arguments", id="unknown"),
    ],
)
def test_a_mistake_is_one_clear_line(options: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        validate_scaling.main(options)
    err = capsys.readouterr().err
    assert exited.value.code == 2
    assert reason in err
    assert err.count("\n") == 1


def run_script(system: FakeSystem, **environment: str) -> subprocess.Popen[str]:
    command = [sys.executable, SCRIPT, "--url", system.url, "--stats-url", system.url]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ) | environment
    )


def test_ctrl_c_leaves_cleanly_with_what_was_found_so_far(system: FakeSystem) -> None:
    reached, release = threading.Event(), threading.Event()

    def hold(request: dict[str, Any]) -> None:
        if "of document" in request["texts"][0]:
            reached.set()
            system._lock.release()
            release.wait(30)
            system._lock.acquire()

    system.misbehave = hold
    with run_script(system) as process:
        assert reached.wait(30)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        release.set()
    assert process.returncode == 130
    assert err == ""
    assert "one request" in out
    assert "INTERRUPTED: 2 met, 0 missed" in out


def test_a_terminal_without_check_marks_gets_words(system: FakeSystem) -> None:
    out, err = run_script(system, PYTHONIOENCODING="ascii").communicate(timeout=30)
    assert "ok   health" in out
    assert err == ""


def test_help_names_every_target_and_the_script_can_be_run(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        validate_scaling.main(["--help"])
    assert exited.value.code == 0
    assert "under 2000 ms" in capsys.readouterr().out
    assert os.access(SCRIPT, os.X_OK)


@pytest.mark.parametrize(
    ("option", "printed"), [("--help", "usage: embedding-validate "), ("--version", "embedding-validate ")]
)
def test_the_command_is_named_as_it_is_installed(option: str, printed: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        validate_scaling.main([option])
    assert exited.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith(printed)
    assert "%%" not in out


def test_the_script_runs_in_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, SCRIPT, "--version"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert run.stdout.startswith("validate_scaling.py ")
