"""Reads HAProxy's figures, and judges by them whether each replica took part."""

from __future__ import annotations

import csv
from dataclasses import dataclass

from embedding_service.tools.validate.load import Refused
from embedding_service.tools.validate.report import Check


@dataclass(frozen=True, slots=True)
class Server:
    """One row of HAProxy's table.

    `answered` counts 2xx replies. `sessions` is HAProxy's `stot`, which also counts requests that were sent to a dead
    server and then repeated on another one. Neither counts health checks.
    """

    name: str
    status: str
    answered: int
    sessions: int

    @property
    def is_up(self) -> bool:
        return self.status.startswith(("UP", "no check"))

    @property
    def is_down(self) -> bool:
        return self.status.startswith("DOWN")

    @property
    def is_empty_slot(self) -> bool:
        """Whether DNS has never filled this slot of `server-template`, so that it is no replica."""
        return self.status == "MAINT (resolution)" and self.sessions == 0


def parse_servers(table: str, backend: str) -> dict[str, Server]:
    """Returns the servers of one backend in HAProxy's `/stats;csv`. Raises `Refused` if there is no such backend."""
    rows = [row for row in csv.DictReader(table.removeprefix("# ").splitlines()) if row.get("pxname") == backend]
    if not rows:
        raise Refused(f"no backend {backend!r} in HAProxy's figures")
    servers = [row for row in rows if row["svname"] not in {"BACKEND", "FRONTEND"}]
    return {row["svname"]: _server(row) for row in servers}


def _server(row: dict[str, str]) -> Server:
    return Server(row["svname"], row["status"], int(row.get("hrsp_2xx") or 0), int(row.get("stot") or 0))


def judge_replicas(before: dict[str, Server], after: dict[str, Server], *, expected: int) -> Check:
    """Passes if at least `expected` replicas answered, among them all that are up, and if no replica is down."""
    shares = {name: _answered_since(before.get(name), server) for name, server in after.items()}
    took_part = [name for name, count in shares.items() if count > 0]
    idle = [name for name, server in after.items() if server.is_up and shares[name] == 0]
    down = [name for name, server in after.items() if server.is_down]
    aside = {name: s.status for name, s in after.items() if not (s.is_up or s.is_down or s.is_empty_slot)}
    total = sum(shares.values())
    details = [f"{name}: {shares[name]} requests, {shares[name] / total:.0%}" for name in took_part]
    details += [f"{name}: {after[name].status}, {shares[name]} requests" for name in down]
    details += [f"{name}: {status}, {shares[name]} requests" for name, status in aside.items()]
    details += [f"{name}: {after[name].status}, but answered nothing" for name in idle]
    missing = expected - sum(not server.is_empty_slot for server in after.values())
    if missing > 0:
        details.append(f"{missing} more expected, but HAProxy knows of no such server")
    measured = f"{len(took_part)} of {max(expected, len(took_part))} took part"
    stopped = [*down, *aside]
    return Check(
        "replicas",
        len(took_part) >= expected and not down and not idle,
        measured + (f"; not in service: {', '.join(stopped)}" if stopped else ""),
        f"all {expected} take part, none down",
        details,
        {"expected": expected, "requests": shares, "down": down, "idle": idle, "out_of_rotation": aside},
    )


def _answered_since(before: Server | None, after: Server) -> int:
    """Returns the replies since `before`. A lower count means that HAProxy was restarted and counts from zero."""
    if before is None or after.answered < before.answered:
        return after.answered
    return after.answered - before.answered
