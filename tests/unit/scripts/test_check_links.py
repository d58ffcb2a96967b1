"""The link checker finds what a reader would click in vain, and nothing else."""

from __future__ import annotations

from typing import TYPE_CHECKING

import check_links
import pytest

if TYPE_CHECKING:
    from pathlib import Path

DOCUMENT = """# The first heading: `code` & more

## Twice

```sh
# no heading
[no link](absent.md)
```
"""


@pytest.fixture
def document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(check_links, "ROOT", tmp_path)
    (tmp_path / "other.md").write_text("# Elsewhere\n")
    return tmp_path / "document.md"


@pytest.mark.parametrize(
    "target",
    [
        "other.md",
        "other.md#elsewhere",
        "#twice",
        "#the-first-heading-code--more",
        "https://example.org/x",
        "./other.md",
    ],
)
def test_a_link_that_leads_somewhere_is_no_finding(document: Path, target: str) -> None:
    document.write_text(f"{DOCUMENT}\n[text]({target})\n")
    assert check_links.broken_links(document) == []


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("absent.md", "no such file"),
        ("absent.md#elsewhere", "no such file"),
        ("other.md#absent", "no such heading"),
        ("#no-heading", "no such heading"),
    ],
)
def test_a_link_that_leads_nowhere_is_named_with_the_reason(document: Path, target: str, reason: str) -> None:
    document.write_text(f"{DOCUMENT}\n[text]({target})\n")
    assert check_links.broken_links(document) == [f"document.md: {target}: {reason}"]
