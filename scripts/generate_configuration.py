#!/usr/bin/env python3
"""Writes docs/configuration.md from the settings classes of both processes: variable, default, explanation.

Run it with the project's Python after a change of a setting: .venv/bin/python scripts/generate_configuration.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from embedding_common.settings import variables  # noqa: E402 - found only now
from embedding_service.config import Settings as GatewaySettings  # noqa: E402
from ml_base.config import Settings as ReplicaSettings  # noqa: E402

PAGE = ROOT / "docs" / "configuration.md"
MIB = 1 << 20

HEAD = """# Configuration

This page is generated from the settings classes (`embedding_service/config.py`, `ml_base/config.py`) by
`scripts/generate_configuration.py`; a test compares the two.

Settings are environment variables, read once at the start. Every wrong one is named in a line of its own, and the exit code
is 2. `embedding-service --help` and `ml-base --help` list the same variables. Under Compose put them into `.env`
(`.env.example` lists what Compose adds). `scripts/up` passes them on, except for those that say where the parts listen and
find each other (`HOST`, `ML_BASE_URL`, `REDIS_HOST`, ...): it stays on loopback. An empty variable counts as not set.

"""
TAIL = """
## Values, and what else to know

- `ML_BASE_BACKEND`: `auto`, `openvino`, or `torch`, which is sentence-transformers as it is.
- `ML_BASE_DTYPE`: `auto`, `float32`, `bfloat16`, `int8` (with the extra `int8`) or `float16` (CUDA). `auto` looks for AVX512-BF16
  or AMX. Name one where replicas run on unlike CPUs, since all replicas must have one fingerprint.
- `ML_BASE_DEVICE`: `auto`, `cpu` or `cuda`. `ML_BASE_LOAD_AT_START`: `default` or `all`.
- `EMPTY_TEXTS`: `accept`, or `refuse`, which answers 400 in OpenAI's and TEI's dialects.
- `API_KEYS` and `ADMIN_API_KEYS`, and the files in their place: the keys may be separated by commas or by line ends.
- `EMBEDDING_WORKERS`: statistics and clearing speak for all workers. `EMBEDDING_CACHE_SIZE`: the default takes about 100 MB.
- `ML_BASE_MODEL_UNLOAD_TIMEOUT`: a replica also takes `POST /models/load` and `POST /models/unload`.
- `ML_BASE_MAX_SLICE_MS`: the search reckons with all replicas of the machine at work.
- `ML_BASE_MAX_QUEUE_TEXTS`: a replica whose lane is full answers 429.
- `ML_BASE_THREADS`: `auto` goes by the affinity mask and the cgroup quota; the log names the number and the reason.

## HAProxy and the local stack

HAProxy reads `ML_BIND`, `ML_PORT`, `STATS_BIND`, `STATS_PORT` and, in containers, `ML_BASE_ADDR`. If `ML_BASE_TIMEOUT` is
raised above 30 s, the 35 s in `haproxy/haproxy.cfg` have to rise too, so that the gateway is the one to give up.
`scripts/up` also takes `REPLICAS` and `STATE_DIR`, and ports by option: `scripts/up --help`. Compose and `scripts/up` set
`ML_BASE_REPLICAS_PER_HOST` to the number of replicas that share the machine. The model server's image sets
`ML_BASE_CACHE_DIR` to `/models/converted` and `ML_BASE_BAKED_DIR` to `/opt/ml-base`.
"""


def page() -> str:
    """The whole document."""
    gateway = _table("The gateway", GatewaySettings)
    return HEAD + gateway + "\n" + _table("ML-Base, the model server", ReplicaSettings) + TAIL


def _table(title: str, settings: type) -> str:
    rows = [f"| `{one.name}` | {_readable(one.default)} | {one.description} |" for one in variables(settings)]
    return "\n".join((f"## {title}", "", "| Variable | Default | |", "|---|---|---|", *rows, ""))


def _readable(default: str) -> str:
    if default.isdigit() and int(default) >= MIB and int(default) % MIB == 0:
        return f"{default} ({int(default) // MIB} MiB)"
    return f"`{default}`" if default else "none"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
