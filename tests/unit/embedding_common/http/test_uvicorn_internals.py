"""Canary: each name of uvicorn, public or not, that the HTTP edge rests on.

pyproject.toml pins uvicorn to one minor release. When the pin is raised, these tests say which name has changed and
which file to read again; the tests of that file then say whether it still works.
"""

from __future__ import annotations

import asyncio
import inspect
import re
import sys
from typing import Any

import httptools
import pytest
import uvicorn
from uvicorn.protocols.http import flow_control, httptools_impl
from uvicorn.server import ServerState

from embedding_common.http.limits import LimitedProtocol, Limits
from embedding_common.http.server import configure

HTTP = "embedding_common/http"
PROTOCOL, LIMITS, SERVER = f"{HTTP}/protocol.py", f"{HTTP}/limits.py", f"{HTTP}/server.py"

# method or function -> its parameters, and the file that overrides or calls it
SIGNATURES: list[tuple[Any, str, list[str], str]] = [
    (httptools_impl.HttpToolsProtocol, "connection_made", ["self", "transport"], PROTOCOL),
    (httptools_impl.HttpToolsProtocol, "connection_lost", ["self", "exc"], PROTOCOL),
    (httptools_impl.HttpToolsProtocol, "data_received", ["self", "data"], PROTOCOL),
    (httptools_impl.HttpToolsProtocol, "on_headers_complete", ["self"], PROTOCOL),
    (httptools_impl.HttpToolsProtocol, "on_message_complete", ["self"], PROTOCOL),
    (httptools_impl.HttpToolsProtocol, "_should_upgrade", ["self"], PROTOCOL),
    (httptools_impl.HttpToolsProtocol, "handle_websocket_upgrade", ["self"], PROTOCOL),
    (httptools_impl.HttpToolsProtocol, "_start_asgi_task", ["self", "cycle", "app"], PROTOCOL),
    (httptools_impl.HttpToolsProtocol, "_unset_keepalive_if_required", ["self"], PROTOCOL),
    (httptools_impl.HttpToolsProtocol, "timeout_keep_alive_handler", ["self"], PROTOCOL),
    (httptools_impl.HttpToolsProtocol, "shutdown", ["self"], PROTOCOL),
    (httptools_impl.HttpToolsProtocol, "send_400_response", ["self", "msg"], LIMITS),
    (httptools_impl.RequestResponseCycle, "send", ["self", "message"], PROTOCOL),
    (httptools_impl.RequestResponseCycle, "receive", ["self"], PROTOCOL),
    (flow_control.FlowControl, "__init__", ["self", "transport"], PROTOCOL),
    (flow_control.FlowControl, "pause_reading", ["self"], PROTOCOL),
    (flow_control.FlowControl, "resume_reading", ["self"], PROTOCOL),
    (uvicorn.Server, "handle_exit", ["self", "sig", "frame"], SERVER),
    (uvicorn.Server, "on_tick", ["self", "counter"], SERVER),
    (uvicorn.Server, "run", ["self", "sockets"], SERVER),
]

# what a connection has once it is made -> the file that reads or sets it
CONNECTION_ATTRIBUTES = {
    "transport": PROTOCOL,
    "flow": PROTOCOL,
    "pipeline": PROTOCOL,
    "cycle": PROTOCOL,
    "scope": PROTOCOL,
    "headers": PROTOCOL,
    "loop": PROTOCOL,
    "timeout_keep_alive": PROTOCOL,
    "timeout_keep_alive_task": f"{PROTOCOL} and {LIMITS}",
}

# what a request has while it runs -> the file that reads or sets it
CYCLE_ATTRIBUTES = {
    "scope": PROTOCOL,
    "transport": PROTOCOL,
    "body": PROTOCOL,
    "more_body": f"{PROTOCOL} and {LIMITS}",
    "keep_alive": PROTOCOL,
    "disconnected": PROTOCOL,
    "response_started": f"{PROTOCOL} and {LIMITS}",
    "response_complete": f"{PROTOCOL} and {LIMITS}",
    "waiting_for_100_continue": PROTOCOL,
    "default_headers": PROTOCOL,
    "message_event": f"{PROTOCOL} and {LIMITS}",
    "on_response": PROTOCOL,
}

REQUEST = b"POST /a?b=c HTTP/1.1\r\nhost: x\r\ncontent-length: 5\r\n\r\n"


class Transport:
    """What a connection asks of its transport."""

    def __init__(self) -> None:
        self.written = b""

    def get_extra_info(self, name: str) -> None:
        return None

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.written += data

    def close(self) -> None:
        return

    def pause_reading(self) -> None:
        return

    def resume_reading(self) -> None:
        return


async def never(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.Event().wait()


def connection() -> Any:
    config = uvicorn.Config(never, http=httptools_impl.HttpToolsProtocol, interface="asgi3", log_config=None)
    made = httptools_impl.HttpToolsProtocol(config=config, server_state=ServerState(), app_state={})
    made.connection_made(Transport())  # type: ignore[arg-type]
    return made


def changed(what: str, file: str) -> str:
    return f"uvicorn {uvicorn.__version__}: {what} has changed or gone; {file} rests on it"


def test_the_pin_holds_one_minor_release() -> None:
    installed = ".".join(uvicorn.__version__.split(".")[:2])
    assert installed == "0.54", (
        f"uvicorn {installed} is installed: read {HTTP} again, then raise this and pyproject.toml"
    )


@pytest.mark.parametrize(("owner", "name", "parameters", "file"), SIGNATURES)
def test_what_is_overridden_or_called_takes_what_it_took(
    owner: type, name: str, parameters: list[str], file: str
) -> None:
    method = getattr(owner, name, None)
    assert callable(method), changed(f"{owner.__name__}.{name}", file)
    assert list(inspect.signature(method).parameters) == parameters, changed(f"{owner.__name__}.{name}", file)


async def test_the_parser_calls_back_and_the_connection_has_what_is_read_of_it() -> None:
    made = connection()
    made.data_received(REQUEST + b"hello")
    for name, file in CONNECTION_ATTRIBUTES.items():
        assert hasattr(made, name), changed(f"HttpToolsProtocol.{name}", file)
    assert made.url == b"/a?b=c", changed("HttpToolsProtocol.url", PROTOCOL)
    assert made.cycle.scope is made.scope, changed("HttpToolsProtocol.cycle of the request that is read", PROTOCOL)
    missing = {"method", "http_version", "raw_path", "query_string", "headers", "path", "state"} - made.scope.keys()
    assert not missing, changed(f"the scope's {missing}", f"{PROTOCOL} and {LIMITS}")
    for name, file in CYCLE_ATTRIBUTES.items():
        assert hasattr(made.cycle, name), changed(f"RequestResponseCycle.{name}", file)
    assert (bytes(made.cycle.body), made.cycle.more_body) == (b"hello", False), changed("the body", PROTOCOL)
    assert len(made.tasks) == 1, changed("HttpToolsProtocol.tasks", SERVER)
    for task in made.tasks:
        task.cancel()


async def test_a_request_behind_the_one_in_hand_waits_in_the_pipeline() -> None:
    made = connection()
    made.data_received((REQUEST + b"hello") * 2)
    assert (len(made.pipeline), made.flow.read_paused) == (1, True), changed("HttpToolsProtocol.pipeline", PROTOCOL)
    for task in made.tasks:
        task.cancel()


async def test_an_upgrade_is_handled_where_its_exception_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    class Upgrading(httptools_impl.HttpToolsProtocol):
        def _should_upgrade(self) -> bool:
            return True

        def handle_websocket_upgrade(self) -> None:
            seen.append(sys.exc_info()[1])

    config = uvicorn.Config(never, http=Upgrading, interface="asgi3", log_config=None)
    made = Upgrading(config=config, server_state=ServerState(), app_state={})
    made.connection_made(Transport())  # type: ignore[arg-type]
    made.data_received(b"GET / HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
    assert [type(error) for error in seen] == [httptools.HttpParserUpgrade], changed("the upgrade", PROTOCOL)


def test_a_reply_begins_with_a_line_of_this_table() -> None:
    line = getattr(httptools_impl, "STATUS_LINE", {}).get(200)
    assert line == b"HTTP/1.1 200 OK\r\n", changed("httptools_impl.STATUS_LINE", f"{PROTOCOL} and {LIMITS}")


def test_a_cycle_asks_of_its_transport_no_more_than_an_outlet_has() -> None:
    source = inspect.getsource(httptools_impl.RequestResponseCycle)
    asked = set(re.findall(r"self\.transport\.(\w+)", source))
    assert asked <= {"write", "is_closing", "close"}, changed(
        f"what a request asks of its transport: {asked}", PROTOCOL
    )


async def test_flow_control_has_the_flags_that_are_read() -> None:
    flow = flow_control.FlowControl(Transport())  # type: ignore[arg-type]
    for name in ("read_paused", "write_paused"):
        assert getattr(flow, name, None) is False, changed(f"FlowControl.{name}", PROTOCOL)


def test_the_server_has_what_draining_reads_and_sets() -> None:
    config = configure(never, Limits())
    assert issubclass(config.http, LimitedProtocol), changed("Config.http", SERVER)  # type: ignore[arg-type]
    assert hasattr(config, "timeout_graceful_shutdown"), changed("Config.timeout_graceful_shutdown", SERVER)
    server = uvicorn.Server(config)
    for name in ("started", "should_exit", "force_exit"):
        assert getattr(server, name, None) is False, changed(f"Server.{name}", SERVER)
    for name in ("connections", "tasks", "default_headers"):
        assert hasattr(server.server_state, name), changed(f"ServerState.{name}", f"{SERVER} and {PROTOCOL}")
    assert "self.servers" in inspect.getsource(uvicorn.Server.startup), changed("Server.servers", SERVER)
    pauses = re.findall(r"asyncio\.sleep\(([\d.]+)\)", inspect.getsource(uvicorn.Server.main_loop))
    assert pauses == ["0.1"], changed("the time between two ticks", SERVER)
