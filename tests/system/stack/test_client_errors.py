"""Every refusal of every dialect, as the real clients read it: the exception they raise, and what it says.

The refusals are the gateway's own; a server behind them refuses as each request tells it to.
"""

from __future__ import annotations

import socket
import threading
from typing import TYPE_CHECKING, Any

import orjson
import pytest
import uvicorn

from embedding_common.http import edge
from embedding_service.api import routes, serving
from embedding_service.api.dialects import openai, tei
from embedding_service.errors import Problem
from tests.system.stack.client_programs import javascript, python, python_openai_1

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from starlette.types import Receive, Scope, Send

    from tests.system.stack.client_programs import Program

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

PROBLEMS = {kind.__name__: kind for kind in Problem.__subclasses__()}
# OpenAI's clients, in both languages, have a class for some statuses; the rest are their base class
CLASSES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "InternalServerError",
    504: "InternalServerError",
}
OPENAIS: dict[str, tuple[Callable[[], Program], str]] = {
    "openai": (lambda: python("errors-of-openai"), "APIStatusError"),
    "openai 1": (lambda: python_openai_1("errors-of-openai"), "APIStatusError"),
    "langchain": (lambda: python("errors-of-langchain-openai-strings"), "APIStatusError"),
    "node openai": (lambda: javascript("errors-of-openai"), "APIError"),
}


async def refuse(scope: Scope, receive: Receive, send: Send) -> None:
    """Raises the problem that the first text names."""
    request = orjson.loads(await edge.read_body(scope, receive, limit_bytes=10_000))
    if "inputs" in request:
        scope["state"][serving.REFUSALS] = tei.error_body
    given = request.get("inputs") or request["input"]
    name = given if isinstance(given, str) else given[0]
    raise PROBLEMS[name](f"texts[3]: refused, {name}", field="texts[3]", limit=1, value=2)


class Steady:
    """A process that is never told to stop."""

    draining = False


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    endpoint = edge.guarded(refuse, refusals_of=routes.refusals_of)
    app = edge.Edge(
        endpoint,
        direct={"/v1/embeddings": endpoint, "/embed": endpoint},
        observe=lambda *_: None,
        process=Steady(),
    )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = uvicorn.Server(uvicorn.Config(app, lifespan="off", log_config=None))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


def raised(program: Program, url: str) -> dict[str, Any]:
    return dict(zip(PROBLEMS, program.ask(url, list(PROBLEMS)), strict=True))


@pytest.mark.parametrize("client", OPENAIS)
def test_openais_clients_raise_the_class_of_the_status_with_our_words(url: str, client: str) -> None:
    program, rest = OPENAIS[client]
    told = raised(program(), url)
    for name, kind in PROBLEMS.items():
        status, _, _ = openai.STATUS[kind]
        assert (told[name]["class"], told[name]["status"]) == (CLASSES.get(status, rest), status), name
        assert f"input[3]: refused, {name}" in told[name]["message"]


def test_huggingface_hub_raises_the_status_with_our_words(url: str) -> None:
    told = raised(python("errors-of-huggingface-hub-embed"), url)
    for name, kind in PROBLEMS.items():
        status, _ = tei.STATUS[kind]
        assert told[name]["status"] == status, name
        assert f"inputs[3]: refused, {name}" in told[name]["message"]
