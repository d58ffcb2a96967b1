"""README's request, sent by curl as it stands there to a stack that runs."""

from __future__ import annotations

import subprocess
from typing import TYPE_CHECKING, Any

import orjson
import pytest

from tests.support.documents import ROOT, curl, shown_reply

if TYPE_CHECKING:
    from local_stack.stack import LocalStack

    from tests.system.stack.client import Client

pytestmark = [pytest.mark.stack, pytest.mark.timeout(300)]

DOCUMENT = ROOT / "README.md"
SHOWN_AT = "http://localhost:8888"


def ask(url: str) -> dict[str, Any]:
    command = [word.replace(SHOWN_AT, url) for word in curl(DOCUMENT)]
    assert command != curl(DOCUMENT), "README's request goes to another address"
    reply: dict[str, Any] = orjson.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return reply


def test_the_readmes_request_gets_the_readmes_answer(stack: LocalStack, client: Client) -> None:
    assert client.send("POST", "/cache/clear").status_code == 200  # other tests of this stack send the same text
    shown = shown_reply(DOCUMENT)
    first, second = ask(stack.url), ask(stack.url)
    for reply in (first, second):
        assert list(reply) == list(shown)
        assert [reply[field] for field in ("dimension", "model", "batch_size")] == [
            shown[field] for field in ("dimension", "model", "batch_size")
        ]
        # bfloat16, where the CPU multiplies it, differs from float32 by less than this
        assert reply["embeddings"][0][:2] == pytest.approx(shown["embeddings"][0], abs=2e-3)
    assert (first["cached_count"], second["cached_count"]) == (0, 1), "README says so"
