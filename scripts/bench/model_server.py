"""How fast the model server is, beside `SentenceTransformer.encode` in float32 on all cores, in the same run.

In process: tokens/s by length of text, one query, one thread and all cores, two streams. Over HTTP through HAProxy,
with the load generator on the same cores: bulk, one query idle, 16 at once, one query beside saturating bulk, for one,
two and three replicas; then through the gateway. Nothing else may run on the machine. A quarter of an hour.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from local_stack.stack import LocalStack  # noqa: E402 - beside this folder, not in it
from model_server_load import CORPUS, MODEL, TEXTS  # noqa: E402

LOAD = Path(__file__).with_name("model_server_load.py")
QUIET_QUERY_MS = 100  # 14 to 24 ms on an idle machine; beside anything else its threads wait for each other
LIBRARIES = ("torch", "sentence-transformers", "openvino")


@dataclass
class Report:
    """What was measured; `targets` are (what, figure, bound, whether it holds)."""

    around: dict[str, str]
    encode: dict[str, Any] = field(default_factory=dict)
    backends: list[dict[str, Any]] = field(default_factory=list)
    http: list[dict[str, Any]] = field(default_factory=list)
    targets: list[tuple[str, float, str, bool]] = field(default_factory=list)

    def want(self, what: str, figure: float, *, least: float | None = None, most: float | None = None) -> None:
        bound = f">= {least:g}" if least is not None else f"<= {most:g}"
        holds = (least is None or figure >= least) and (most is None or figure <= most)
        self.targets.append((what, figure, bound, holds))


class Bench:
    """Runs the measuring processes, one at a time."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self._seconds = options.seconds
        self._repeats = options.repeats
        self._folder = folder
        self._env = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        self._env.setdefault("ML_BASE_CACHE_DIR", str(ROOT / ".local" / "models"))

    def load(self, *words: str) -> dict[str, Any]:
        sys.stderr.write(f"  {' '.join(words)}\n")
        done = subprocess.run(
            [sys.executable, str(LOAD), *words], env=self._env, capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise SystemExit(f"{LOAD.name} {' '.join(words)} failed:\n{done.stderr[-2000:]}")
        figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return figures

    def http(self, url: str, kind: str) -> dict[str, float]:
        """Medians of the repeats."""
        runs = [self.load("http", url, kind, str(self._seconds)) for _ in range(self._repeats)]
        return {name: statistics.median(run[name] for run in runs) for name in runs[0]}

    def stack(self, dtype: str, replicas: int, *, gateway: bool) -> dict[str, Any]:
        """All kinds of load on one stack; `gateway`: through it, else through HAProxy."""
        state = self._folder / f"{dtype}-{replicas}"
        env = {"ML_BASE_DTYPE": dtype, "ML_BASE_CACHE_DIR": self._env["ML_BASE_CACHE_DIR"]}
        env["ML_BASE_THREADS"] = "1"  # a single replica would take all cores: then a second could only take them away
        state.mkdir(exist_ok=True)
        with LocalStack(state_dir=state, replicas=replicas, env=env) as stack:
            stack.start()
            stack.wait_ready()
            url = stack.url if gateway else stack.ml_url
            figures = {kind: self.http(url, kind) for kind in ("query", "burst", "bulk", "beside")}
        return {"dtype": dtype, "replicas": replicas, "gateway": gateway, **figures}


def measure(bench: Bench, options: argparse.Namespace) -> Report:
    report = Report(surroundings(options))
    report.encode = bench.load("encode")
    if report.encode["query_p50_ms"] > QUIET_QUERY_MS:
        sys.stderr.write("encode is very slow with one query: is something else running on these cores?\n")
    for dtype in options.dtypes:
        report.backends.append(bench.load("backend", dtype))
    for dtype in options.dtypes:
        report.http += [bench.stack(dtype, replicas, gateway=False) for replicas in options.replicas]
    if not options.no_gateway:
        report.http.append(bench.stack(options.dtypes[0], max(options.replicas), gateway=True))
    judge(report)
    return report


def judge(report: Report) -> None:
    """The issue's targets, as far as this run measured them."""
    encode = report.encode
    tokens = encode["tokens"]["paragraphs"] / TEXTS
    for one in report.backends:
        dtype = one["dtype"]
        best = max(one["two_streams"]["paragraphs"], *(one[name]["paragraphs"] for name in one if "threads_" in name))
        report.want(f"in process, {dtype}: x encode", best / encode["tokens_per_s"]["paragraphs"], least=4.0)
        report.want(f"{dtype}: lowest cosine", one["cosine_lowest"], least=0.985 if dtype == "int8" else 0.9995)
    for one in report.http:
        way = "gateway" if one["gateway"] else "HAProxy"
        name = f"{one['dtype']}, {one['replicas']} replicas, {way}"
        bulk = one["bulk"]["bulk_texts_per_s"]
        if one["replicas"] == 1:
            continue  # measured for what a second one adds
        report.want(f"bulk, {name}: x encode", bulk * tokens / encode["tokens_per_s"]["paragraphs"], least=4.0)
        report.want(f"idle query, {name}: p50 ms", one["query"]["p50_ms"], most=12)
        at_once = one["burst"]["queries_per_s"] / encode["one_at_a_time_per_s"]
        report.want(f"16 at once, {name}: x encode one by one", at_once, least=5.0)
        beside = one["beside"]
        report.want(f"query beside bulk, {name}: p99 ms", beside["p99_ms"], most=120 if one["replicas"] > 2 else 70)  # noqa: PLR2004
        report.want(f"bulk beside it, {name}: share kept", beside["bulk_texts_per_s"] / bulk, least=0.85)
    direct = {
        (one["dtype"], one["replicas"]): one["bulk"]["bulk_texts_per_s"] for one in report.http if not one["gateway"]
    }
    for (dtype, replicas), rate in direct.items():
        if replicas == 2 and (dtype, 1) in direct:  # noqa: PLR2004
            report.want(f"1 -> 2 replicas, {dtype}", rate / direct[dtype, 1], least=1.8)


def markdown(report: Report) -> str:
    """Tables as GitHub renders them."""
    around = ", ".join(f"{name} {value}" for name, value in report.around.items())
    encode = report.encode
    mixes = list(encode["tokens"])
    lines = [around, "", "corpus: " + ", ".join(f"{mix} {count:,} tokens" for mix, count in encode["tokens"].items())]
    lines += ["", f"| In process, tokens/s | {' | '.join(mixes)} | one query | cosine, lowest / mean |"]
    lines += ["|---|" + "--:|" * (len(mixes) + 2)]
    rates = " | ".join(f"{encode['tokens_per_s'][mix]:,.0f}" for mix in mixes)
    lines += [f"| encode, float32, all cores | {rates} | {encode['query_p50_ms']:.1f} ms | 1 |"]
    for one in report.backends:
        lines += _backend_rows(one, encode, mixes)
    lines += [
        "",
        "| Over HTTP | bulk, texts/s | idle query p50 / p99 | 16 at once | query beside bulk p50 / p99 | bulk keeps |",
    ]
    lines += ["|---|--:|--:|--:|--:|--:|"]
    lines += [_http_row(one) for one in report.http]
    lines += ["", "| Target | measured | bound | |", "|---|--:|--:|---|"]
    lines += [
        f"| {what} | {figure:.3g} | {bound} | {'✓' if holds else '✗'} |"
        for what, figure, bound, holds in report.targets
    ]
    return "\n".join(lines)


def _backend_rows(one: dict[str, Any], encode: dict[str, Any], mixes: list[str]) -> list[str]:
    def cells(rates: dict[str, float]) -> str:
        return " | ".join(f"{rates[mix]:,.0f} ({rates[mix] / encode['tokens_per_s'][mix]:.1f} x)" for mix in mixes)

    own = {f"{name.removeprefix('threads_')} threads": one[name] for name in one if name.startswith("threads_")}
    rows = [
        f"| {one['dtype']}, {name}, batches of {rates['slice_tokens']} | {cells(rates)} | | |"
        for name, rates in own.items()
    ]
    cosine = f"{one['cosine_lowest']:.5f} / {one['cosine_mean']:.5f}"
    streams = f"| {one['dtype']}, two streams of one thread | {cells(one['two_streams'])}"
    return [*rows, f"{streams} | {one['query_p50_ms']:.1f} ms | {cosine} |"]


def _http_row(one: dict[str, Any]) -> str:
    bulk, beside = one["bulk"]["bulk_texts_per_s"], one["beside"]
    return (
        f"| {one['dtype']}, {one['replicas']} replicas{', gateway' if one['gateway'] else ''} | {bulk:.0f} "
        f"| {one['query']['p50_ms']:.1f} / {one['query']['p99_ms']:.1f} ms | {one['burst']['queries_per_s']:.0f}/s "
        f"| {beside['p50_ms']:.0f} / {beside['p99_ms']:.0f} ms | {beside['bulk_texts_per_s'] / bulk:.0%} |"
    )


def surroundings(options: argparse.Namespace) -> dict[str, str]:
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    return {
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "cores": f"{len(os.sched_getaffinity(0))} of {processor}",
        "model": MODEL,
        "corpus": CORPUS.name,
        "runs": f"{options.repeats} x {options.seconds} s",
        **versions,
    }


def parse_options() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=float, default=8, help="of one run over HTTP (default 8)")
    options.add_argument("--repeats", type=int, default=3, help="of each run over HTTP (default 3)")
    options.add_argument("--dtypes", nargs="+", default=["auto", "int8"], help="default: auto int8 (int8 needs nncf)")
    options.add_argument("--replicas", nargs="+", type=int, default=[1, 2, 3], help="default: 1 2 3")
    options.add_argument("--no-gateway", action="store_true", help="leave out the runs through the gateway")
    options.add_argument("--json", action="store_true", help="machine-readable instead of tables")
    return options.parse_args()


def main() -> int:
    options = parse_options()
    with tempfile.TemporaryDirectory(prefix="model-server-") as folder:
        report = measure(Bench(options, Path(folder)), options)
    print(json.dumps(vars(report)) if options.json else markdown(report))
    return 0 if all(holds for *_, holds in report.targets) else 1


if __name__ == "__main__":
    sys.exit(main())
