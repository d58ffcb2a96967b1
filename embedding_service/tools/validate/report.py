"""Verdicts on targets, printed one by one for a person or as one JSON object at the end."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True)
class Check:
    """The verdict on one target. `passed` is None if there was nothing to judge; the run can still pass."""

    name: str
    passed: bool | None
    measured: str
    target: str
    details: Sequence[str] = ()
    figures: dict[str, Any] = field(default_factory=dict)


class Report:
    """The checks so far. It prints each as soon as it is known, unless a JSON object at the end is asked for."""

    def __init__(self, *, as_json: bool) -> None:
        self.checks: list[Check] = []
        self._as_json = as_json
        self._marks = _marks()

    def say(self, line: str = "") -> None:
        if not self._as_json:
            print(line, flush=True)

    def add(self, check: Check) -> None:
        self.checks.append(check)
        self.say(f"  {self._marks[check.passed]} {check.name:<18} {check.measured:<46} target: {check.target}")
        for detail in check.details:
            self.say(f"      {detail}")

    @property
    def passed(self) -> bool:
        return bool(self.checks) and all(check.passed is not False for check in self.checks)

    def finish(self, *, seconds: float, interrupted: bool) -> None:
        met = sum(check.passed is True for check in self.checks)
        missed = sum(check.passed is False for check in self.checks)
        if self._as_json:
            checks = {check.name.replace(" ", "_"): _as_json(check) for check in self.checks}
            verdict = {"passed": self.passed and not interrupted, "interrupted": interrupted, "seconds": seconds}
            print(orjson.dumps(verdict | {"checks": checks}).decode())
            return
        word = "INTERRUPTED" if interrupted else "PASSED" if self.passed else "FAILED"
        self.say(f"\n{word}: {met} met, {missed} missed, {len(self.checks) - met - missed} not judged; {seconds:.1f} s")


def _as_json(check: Check) -> dict[str, Any]:
    fields = {"passed": check.passed, "measured": check.measured, "target": check.target}
    return fields | {"details": list(check.details)} | check.figures


def _marks() -> dict[bool | None, str]:
    try:
        "✓✗·".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return {True: "ok  ", False: "FAIL", None: "--  "}
    return {True: "✓", False: "✗", None: "·"}
