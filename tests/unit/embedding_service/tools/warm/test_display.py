"""Progress without `rich`: lines on standard error."""

from __future__ import annotations

from typing import TYPE_CHECKING

from embedding_service.tools.warm import display
from embedding_service.tools.warm.output import Progress

if TYPE_CHECKING:
    import pytest

HALF = Progress(offset_bytes=500, texts=1200, cached=300)


def test_a_line_tells_texts_share_rate_and_hits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(display, "LINE_EVERY_S", 0.0)
    display.LineDisplay(total_bytes=1000).update(HALF, 2345.6)
    display.LineDisplay(total_bytes=None).update(HALF, 2345.6)
    assert capsys.readouterr().err.splitlines() == [
        "1,200 texts (50%), 2,346 texts/s, 25.0% from cache",
        "1,200 texts, 2,346 texts/s, 25.0% from cache",
    ]


def test_lines_come_seconds_apart(capsys: pytest.CaptureFixture[str]) -> None:
    lines = display.LineDisplay(total_bytes=1000)
    for _ in range(100):
        lines.update(HALF, 1.0)
    assert capsys.readouterr().err == ""
