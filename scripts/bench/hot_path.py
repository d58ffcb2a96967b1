#!/usr/bin/env python3
"""The gateway's hot path beside what lies underneath it: hits in L1 and L2, misses, large requests, memory.

Real processes on loopback: what is measured runs on one core, load and all other servers on another. Each scenario
alternates with its reference, and the table shows medians. Exit code 0: every target is met; 1: one is not; 2: the
figures would mean nothing, and one line says why.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from subprocess import PIPE
from typing import TYPE_CHECKING

from hot_path_load import LOOPBACK, LUA_FROM_FILE, LUA_NEW_TEXTS, BenchError, bodies_file, body, first_line, path_of
from hot_path_tools import Child, Gateway, Lab, Measured, surroundings, wrk_figures

if TYPE_CHECKING:
    from collections.abc import Iterable

KEYS = 50_000
HOT_KEYS = 1_000
L2_KEYS = 10_000
LARGE_TEXTS = 2_048
ONE_L1_HIT = "L1 hit, 1 text"
BUSY_SHARE = 0.9
NUMBERS = "--:|" * 4
NOTE = f"""CPU: of one request. †: took less than {BUSY_SHARE:.0%} of its core, so others set the pace;
beside such a reference the targets take the lower of the two ratios."""
OUTLAST_S = 3  # the probe is ready that much later at most


@dataclass(frozen=True, slots=True)
class Row:
    """A scenario and what it is held against.

    `ratio` is that of requests/s, the median over pairs of neighbouring runs. `cpu_ratio` compares CPU times of a
    request, and so says what `ratio` would be if neither had had to wait for the load.
    """

    name: str
    measured: Measured
    reference: str = ""
    beside: Measured | None = None
    ratio: float = 0.0
    cpu_ratio: float = 0.0

    @classmethod
    def of(cls, name: str, reference: str, pairs: Iterable[tuple[Measured, ...]]) -> Row:
        ours, theirs = zip(*pairs, strict=True)
        ratio = median(one.rate / other.rate for one, other in zip(ours, theirs, strict=True))
        cpu_ratio = median(other.cpu_ms / one.cpu_ms for one, other in zip(ours, theirs, strict=True))
        return cls(name, Measured.median(ours), reference, Measured.median(theirs), ratio, cpu_ratio)

    def judged(self) -> float:
        """What targets are held against: a reference that was kept waiting must not make us look good."""
        waited = self.beside is not None and self.beside.busy < BUSY_SHARE
        return min(self.ratio, self.cpu_ratio) if waited else self.ratio


@dataclass(frozen=True, slots=True)
class Memory:
    """`grown_mb` is what the process holds beyond what it held before its first text."""

    name: str
    entries: int
    l1_mb: float
    grown_mb: float


@dataclass(frozen=True, slots=True)
class Target:
    """One figure that must be shown, with its bound in words."""

    what: str
    measured: float
    met: bool


@dataclass(slots=True)
class Report:
    """What has been measured so far."""

    around: dict[str, str]
    rows: list[Row] = field(default_factory=list)
    memory: list[Memory] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)

    def at_least(self, what: str, value: float, bound: float) -> None:
        self.targets.append(Target(f"{what} >= {bound:,g}", value, value >= bound))

    def at_most(self, what: str, value: float, bound: float) -> None:
        self.targets.append(Target(f"{what} <= {bound:,g}", value, value <= bound))


# --- scenarios ---


def l1_hits(lab: Lab, stub: Child, report: Report) -> None:
    """Targets 1 and 5, on one gateway that holds every key."""
    with lab.gateway(stub) as gateway:
        gateway.fill(KEYS)
        for name, keys, texts, encoding, field, bound in (
            (ONE_L1_HIT, KEYS, 1, None, "texts", 0.40),
            (f"{ONE_L1_HIT}, TEI", KEYS, 1, None, "inputs", 0.40),
            (f"{ONE_L1_HIT}, OpenAI", KEYS, 1, None, "input", 0.40),
            (f"{ONE_L1_HIT}, OpenAI, base64", KEYS, 1, "base64", "input", 0.40),
            (f"L1 hit, 32 texts, JSON, {KEYS:,} keys", KEYS, 32, None, "texts", 0.30),
            (f"L1 hit, 32 texts, JSON, {HOT_KEYS:,} hot keys", HOT_KEYS, 32, None, "texts", 0.40),
            (f"L1 hit, 32 texts, base64, {KEYS:,} keys", KEYS, 32, "base64", "texts", 0.40),
            (f"L1 hit, 32 texts, OpenAI, base64, {KEYS:,} keys", KEYS, 32, "base64", "input", 0.40),
        ):
            bodies = bodies_file(lab.folder, keys, texts, encoding, field=field)
            report.at_least(f"{name}: of bare ASGI", against_bare(lab, gateway, name, bodies, report), bound)
        beside_large(lab, gateway, report)


def against_bare(lab: Lab, gateway: Gateway, name: str, bodies: Path, report: Report) -> float:
    gateway.must_hold(bodies)
    path = path_of(first_line(bodies))
    with lab.bare(gateway, bodies) as bare:
        pairs = lab.alternate(
            lambda: gateway.answering("l1", lambda: lab.wrk(gateway, 16, bodies, 1, path, script=LUA_FROM_FILE)),
            lambda: lab.wrk(bare, 16, bodies, 1, path, script=LUA_FROM_FILE),
        )
        report.rows.append(Row.of(name, "bare ASGI, same bytes", pairs))
    return report.rows[-1].judged()


def beside_large(lab: Lab, gateway: Gateway, report: Report) -> None:
    """Single hits, one at a time, while one caller asks for many cached texts without pause."""
    single, large = bodies_file(lab.folder, KEYS, 1), bodies_file(lab.folder, KEYS, LARGE_TEXTS, at_least=24)
    gateway.must_hold(large)
    large_rates: list[float] = []

    def alone() -> Measured:
        return lab.own_figures("probe", gateway.port, lab.seconds, single, core=lab.load_core)

    def crowded() -> Measured:
        with lab.wrk_child(
            gateway, 1, lab.seconds + OUTLAST_S, large, 1, path_of(first_line(large)), script=LUA_FROM_FILE
        ).start(PIPE) as load:
            measured = alone()
            printed, _ = load.communicate()
        large_rates.append(wrk_figures(printed, gateway).rate)
        return measured

    crowd, peace = (Measured.median(runs) for runs in zip(*lab.alternate(crowded, alone), strict=True))
    # no ratio: how many a second is up to the probe's own pauses
    report.rows.append(Row(f"{ONE_L1_HIT}, one at a time, beside {LARGE_TEXTS:,} texts", crowd, "alone", peace))
    name = f"p99 in ms of single hits beside {median(large_rates):.0f} requests/s of {LARGE_TEXTS:,} texts"
    report.at_most(name, crowd.p99_ms, 20)


def l2_hits(lab: Lab, stub: Child, report: Report) -> None:
    """Target 2: nothing in L1, everything in a real Redis."""
    with (
        lab.redis() as redis,
        lab.gateway(
            stub, EMBEDDING_CACHE_SIZE=0, REDIS_ENABLED=True, REDIS_HOST=LOOPBACK, REDIS_PORT=redis.port
        ) as gateway,
    ):
        give_up_at = time.monotonic() + 60
        while gateway.fill(L2_KEYS) < L2_KEYS:  # entries are written behind the replies, and dropped if that lags
            if time.monotonic() > give_up_at:
                raise BenchError("the entries do not reach Redis")
        bodies = bodies_file(lab.folder, L2_KEYS, 1)
        gateway.must_hold(bodies)
        path = path_of(first_line(bodies))
        pairs = lab.alternate(
            lambda: gateway.answering("l2", lambda: lab.wrk(gateway, 64, bodies, 1, path, script=LUA_FROM_FILE)),
            lambda: lab.own_figures("redis-get", redis.port, lab.seconds, core=lab.server_core),
        )
        row = Row.of("L2 hit, 1 text, 64 connections", "redis-py asyncio alone, same GETs", pairs)
    report.rows.append(row)
    report.at_least("L2 hit: of redis-py alone", row.judged(), 0.25)
    for l1 in (one for one in report.rows if one.name == ONE_L1_HIT):  # none if this alone was wanted
        report.at_least("L2 hit: of our L1 rate", Row.of("", "", [(row.measured, l1.measured)]).judged(), 0.5)


def misses(lab: Lab, stub: Child, report: Report) -> None:
    """Target 3: the gateway's own cost of a text that no cache has."""
    with lab.gateway(stub) as gateway:
        load = lambda: lab.wrk(gateway, 64, time.time_ns(), script=LUA_NEW_TEXTS)  # noqa: E731 - a name for one line
        runs = [gateway.answering("misses", load) for _ in range(lab.repeats)]
    report.rows.append(Row("miss, 1 text, 64 connections, replica of zero cost", Measured.median(runs)))
    report.at_least("misses: texts/s", report.rows[-1].measured.rate, 1000)
    report.at_most("misses: gateway CPU ms a text", report.rows[-1].measured.cpu_ms, 0.5)


def memory(lab: Lab, stub: Child, report: Report) -> None:
    """Target 4: what a full L1 takes, and whether new keys without end take more."""
    with lab.gateway(stub) as gateway:
        gateway.embed(body(range(1)))
        before = gateway.rss_bytes()

        def note(name: str) -> None:
            l1 = gateway.stats()["l1"]
            grown = gateway.rss_bytes() - before
            report.memory.append(Memory(name, l1["size"], l1["bytes"] / 1e6, grown / 1e6))

        gateway.fill(KEYS)
        note(f"filled with {KEYS:,} texts")
        gateway.fill(KEYS)
        note("each read again")
        gateway.fill(lab.churn, first=KEYS)
        note(f"after {lab.churn:,} new texts")
    *full, churned = report.memory
    report.at_most(f"MB that {KEYS:,} x 384 take", max(one.grown_mb for one in full), 108)
    report.at_most(f"MB after {lab.churn:,} new texts", churned.grown_mb, 108)
    report.at_most(f"L1 entries after {lab.churn:,} new texts", churned.entries, KEYS)


SCENARIOS = {"l1": l1_hits, "l2": l2_hits, "misses": misses, "memory": memory}


# --- output ---


def markdown(report: Report) -> str:
    """Tables as GitHub renders them."""
    lines = [", ".join(f"{name} {value}" for name, value in report.around.items()), ""]
    if report.rows:
        head = "requests/s | p50 ms | p99 ms | CPU ms"
        lines += [
            f"| Scenario | {head} | reference | {head} | ratio | by CPU |",
            f"|---|{NUMBERS}---|{NUMBERS}--:|--:|",
        ]
        lines += map(_row, report.rows)
        lines += ["", NOTE, ""]
    if report.memory:
        lines += ["| Memory | entries | L1 counts, MB | process grew, MB |", "|---|--:|--:|--:|"]
        lines += [f"| {m.name} | {m.entries:,} | {m.l1_mb:.1f} | {m.grown_mb:.1f} |" for m in report.memory] + [""]
    lines += ["| Target | measured | |", "|---|--:|---|"]
    lines += [f"| {t.what} | {_figure(t.measured)} | {'✓' if t.met else '✗'} |" for t in report.targets]
    return "\n".join([*lines, "", "That none of it costs correctness is for `scripts/test` to show."])


def _row(row: Row) -> str:
    theirs = _cells(row.beside) if row.beside else " | | | "
    ratios = f"{row.ratio:.2f} | {row.cpu_ratio:.2f}" if row.ratio else " | "
    return f"| {row.name} | {_cells(row.measured)} | {row.reference} | {theirs} | {ratios} |"


def _cells(run: Measured) -> str:
    mark = " †" if 0 < run.busy < BUSY_SHARE else ""
    cpu = f"{run.cpu_ms:.3f}" if run.cpu_ms else ""
    return f"{run.rate:,.0f}{mark} | {run.p50_ms:.2f} | {run.p99_ms:.2f} | {cpu}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"  # noqa: PLR2004 - three digits are as many as are true


def parse_options() -> argparse.Namespace:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--seconds", type=int, default=4, help="of one run (default 4)")
    options.add_argument("--repeats", type=int, default=3, help="of each run (default 3)")
    options.add_argument("--quick", action="store_true", help="1 x 2 s, to see that it works; no figures to keep")
    options.add_argument("--churn", type=int, default=200_000, help="new texts through a full L1 (default 200,000)")
    options.add_argument("--server-core", type=int, default=0, help="for what is measured")
    options.add_argument("--load-core", type=int, default=1, help="for wrk, Redis and the replica")
    options.add_argument("--only", choices=list(SCENARIOS), action="append", help="may be repeated")
    options.add_argument("--json", action="store_true", help="machine-readable instead of tables")
    return options.parse_args()


def run(options: argparse.Namespace) -> Report:
    cores = {options.server_core, options.load_core}
    if len(cores) < 2 or not cores <= os.sched_getaffinity(0):  # noqa: PLR2004 - one for each side
        raise BenchError(f"needs two cores of {sorted(os.sched_getaffinity(0))}: see --server-core, --load-core")
    if options.quick:
        options.seconds, options.repeats = 2, 1
    report = Report(surroundings() | {"runs": f"{options.repeats} x {options.seconds} s"})
    os.sched_setaffinity(0, {options.load_core})
    with tempfile.TemporaryDirectory(prefix="hot-path-") as folder:
        lab = Lab(Path(folder), options.server_core, options.load_core, options.seconds, options.repeats, options.churn)
        with lab.stub() as stub:
            for name in options.only or SCENARIOS:
                sys.stderr.write(f"{name} ...\n")
                SCENARIOS[name](lab, stub, report)
    return report


def main() -> int:
    options = parse_options()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # unwinds: children are ended, files removed
    try:
        report = run(options)
    except BenchError as problem:
        sys.stderr.write(f"hot_path: {problem}\n")
        return 2
    print(json.dumps(asdict(report), indent=1) if options.json else markdown(report))
    return 0 if all(target.met for target in report.targets) else 1


if __name__ == "__main__":
    sys.exit(main())
