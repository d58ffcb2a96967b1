"""The real program in its own process: what it prints, what it answers, how it ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx
import numpy as np
import pytest

from ml_base.models.loading import resolve
from tests.support.tiny_model import DIMENSION, save_tiny

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

START_S = 60.0  # loading takes 4 s on an idle machine


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def program(log: Path, *, module: str = "ml_base", **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m` that module, ended whatever happens."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ML_BASE_")}
    settings = {
        "ML_BASE_HOST": "127.0.0.1",
        "ML_BASE_THREADS": "1",
        "ML_BASE_DTYPE": "float32",  # held to encode digit by digit
        "ML_BASE_MAX_SLICE_MS": "10",  # fewer sizes are tried, fewer shapes warmed
        "ML_BASE_CACHE_DIR": str(log.parent / "models"),
        **environment,
    }
    with log.open("wb") as output:
        process = subprocess.Popen([sys.executable, "-m", module], env=inherited | settings, stderr=output)
        try:
            yield process
        finally:
            process.kill()
            process.wait()


def wait_until_healthy(url: str, process: subprocess.Popen[bytes]) -> None:
    give_up = time.monotonic() + START_S
    while time.monotonic() < give_up and process.poll() is None:
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.TransportError:
            time.sleep(0.1)
    pytest.fail("it did not become healthy")


def test_it_serves_the_vectors_of_encode_and_drains_on_sigterm(tmp_path: Path) -> None:
    """One start for the whole life: refused while loading, 200 when warm, 503 but serving while draining, exit 0."""
    from sentence_transformers import SentenceTransformer  # noqa: PLC0415 - seconds, which the other tests do not need

    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log = tmp_path / "log"
    with program(log, ML_BASE_PORT=str(port), ML_BASE_DRAIN_S="1") as process:
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        wait_until_healthy(url, process)
        texts = ["hello world", "", "a longer text " * 100]
        reply = httpx.post(f"{url}/embed", content=json.dumps({"texts": texts}), timeout=30)
        assert reply.headers["x-model-fingerprint"]
        model = SentenceTransformer(resolve("all-MiniLM-L6-v2").location, device="cpu")
        assert np.allclose(reply.json()["embeddings"], model.encode(texts), atol=1e-5)
        process.send_signal(signal.SIGTERM)
        give_up = time.monotonic() + 10
        while (status := httpx.get(f"{url}/health").status_code) == 200 and time.monotonic() < give_up:
            time.sleep(0.02)
        assert status == 503
        late = httpx.post(f"{url}/embed", content=b'{"texts":["late"]}')
        assert (late.status_code, late.headers["connection"]) == (200, "close")
        assert process.wait(timeout=15) == 0
    written = log.read_text()
    assert "threads=1 (set by ML_BASE_THREADS)" in written
    assert "Traceback" not in written


def test_what_was_prepared_is_only_loaded_and_a_second_model_when_it_is_asked_for(tiny: Path, tmp_path: Path) -> None:
    port, log, preparing = free_port(), tmp_path / "log", tmp_path / "preparing"
    url = f"http://127.0.0.1:{port}"
    models = {
        "ML_BASE_MODELS": f"{tiny}, {save_tiny(tmp_path / 'other', seed=1)}",
        "ML_BASE_MAX_BATCH_TOKENS": "64",  # else so small a model has hundreds of shapes
    }
    with program(preparing, module="ml_base.prepare", **models) as process:
        assert process.wait(timeout=START_S) == 0
    assert preparing.read_text().count("converted the model") == 2
    with program(log, ML_BASE_PORT=str(port), ML_BASE_DRAIN_S="0", **models) as process:
        wait_until_healthy(url, process)
        assert [one["state"] for one in httpx.get(f"{url}/models").json()["models"]] == ["ready", "unloaded"]
        replies = [
            httpx.post(f"{url}/embed", content=json.dumps({"texts": ["a b"], "model_id": name}), timeout=30).json()
            for name in ("tiny", "other")
        ]
        assert [reply["dimension"] for reply in replies] == [DIMENSION] * 2
        assert replies[0]["embeddings"] != replies[1]["embeddings"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=15) == 0
    assert "converted" not in log.read_text()


@pytest.mark.parametrize(
    ("environment", "code", "says"),
    [
        ({"ML_BASE_BACKEND": "onnx"}, 2, "ml-base: ML_BASE_BACKEND: Input should be 'auto', 'torch' or 'openvino'"),
        (
            {"ML_BASE_MODELS": "no-such/model", "HF_HUB_OFFLINE": "1"},
            1,
            "ml-base: model 'no-such/model' cannot be loaded from the model hub: ",
        ),
        ({"ML_BASE_MODELS": "./no-such-model"}, 1, "ml-base: model './no-such-model': no such folder"),
        (
            {"ML_BASE_MODELS": "all-MiniLM-L6-v2,all-MiniLM-L6-v2"},
            1,
            "ml-base: ML_BASE_MODELS: two of all-MiniLM-L6-v2,all-MiniLM-L6-v2 have the same name",
        ),
    ],
)
def test_what_cannot_work_ends_it_with_one_line(
    environment: dict[str, str], code: int, says: str, tmp_path: Path
) -> None:
    with program(tmp_path / "log", ML_BASE_PORT=str(free_port()), **environment) as process:
        assert process.wait(timeout=START_S) == code
    written = (tmp_path / "log").read_text().splitlines()
    assert written[-1].startswith(says)
    assert all(" INFO " in line or " WARNING " in line for line in written[:-1])


def test_a_port_in_use_ends_it_at_once_with_one_line(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with program(tmp_path / "log", ML_BASE_PORT=str(port)) as process:
            assert process.wait(timeout=START_S) == 1
    assert (tmp_path / "log").read_text() == (
        f"ml-base: cannot listen on 127.0.0.1 port {port} (ML_BASE_HOST, ML_BASE_PORT): Address already in use\n"
    )


@pytest.mark.parametrize("ending", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_model_loads_ends_it_at_once_with_0(ending: signal.Signals, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with program(log, ML_BASE_PORT=str(free_port())) as process:
        give_up = time.monotonic() + START_S
        while "threads=" not in log.read_text() and time.monotonic() < give_up:
            time.sleep(0.05)
        process.send_signal(ending)
        assert process.wait(timeout=10) == 0
    assert "Traceback" not in log.read_text()


def test_all_but_the_backends_can_be_imported_without_torch() -> None:
    code = "import ml_base.__main__, ml_base.backends, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
