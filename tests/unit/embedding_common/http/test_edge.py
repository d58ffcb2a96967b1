from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from fastapi import FastAPI

from embedding_common import errors
from embedding_common.http import edge
from embedding_common.http.protocol import WHOLE
from tests.support.raw_connection import Steady

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from starlette.types import Message, Receive, Scope, Send

    Endpoint = Callable[[Scope, Receive, Send], Awaitable[None]]


def scope_with(**headers: str) -> Scope:
    pairs = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "headers": pairs, "state": {"request_id": "rid"}, "path": "/", "method": "POST"}


def receive_of(*messages: dict[str, Any]) -> Receive:
    left = list(messages)

    async def receive() -> Message:
        return left.pop(0)

    return receive


def part(body: bytes, *, more: bool = False) -> dict[str, Any]:
    return {"type": "http.request", "body": body, "more_body": more}


GONE = {"type": "http.disconnect"}


class Sent:
    """A `send` that remembers the reply."""

    def __init__(self) -> None:
        self.messages: list[Any] = []

    async def __call__(self, message: Message) -> None:
        self.messages.append(message)

    @property
    def status(self) -> int:
        return int(self.messages[0]["status"])

    @property
    def headers(self) -> dict[bytes, bytes]:
        return dict(self.messages[0]["headers"])

    @property
    def body(self) -> bytes:
        return b"".join(message["body"] for message in self.messages[1:])


async def test_a_body_in_parts_is_put_together() -> None:
    receive = receive_of(part(b"ab", more=True), part(b"", more=True), part(b"c"))
    assert await edge.read_body(scope_with(), receive, limit_bytes=3) == b"abc"


async def test_a_declared_length_over_the_limit_is_refused_unread() -> None:
    with pytest.raises(errors.BodyTooLarge, match="at most 3 bytes, got 4"):
        await edge.read_body(scope_with(content_length="4"), receive_of(), limit_bytes=3)


async def test_a_body_that_grows_over_the_limit_is_refused_as_soon_as_it_does() -> None:
    receive = receive_of(part(b"abcd", more=True))
    with pytest.raises(errors.BodyTooLarge):
        await edge.read_body(scope_with(), receive, limit_bytes=3)


async def test_a_caller_that_hangs_up_while_sending_is_noticed() -> None:
    with pytest.raises(errors.ClientGone):
        await edge.read_body(scope_with(), receive_of(part(b"a", more=True), GONE), limit_bytes=3)


async def test_disconnected_returns_when_the_caller_hangs_up() -> None:
    await edge.disconnected(receive_of(part(b""), GONE))


async def test_a_reply_in_parts_declares_its_whole_length() -> None:
    sent = Sent()
    await edge.send_bytes(sent, 200, [b"ab", b"c"], headers=[(b"x-a", b"b")])
    assert (sent.status, sent.body) == (200, b"abc")
    assert sent.headers[b"content-length"] == b"3"
    assert sent.headers[b"x-a"] == b"b"
    assert len(sent.messages) == 2, "small parts are sent as one"


async def test_a_large_reply_goes_out_part_by_part() -> None:
    sent = Sent()
    await edge.send_bytes(sent, 200, [b"a" * edge.JOIN_BYTES, b"c"])
    assert [message.get("more_body") for message in sent.messages[1:]] == [True, False]


async def run_guarded(endpoint: Endpoint) -> Sent:
    sent = Sent()
    await edge.guarded(endpoint)(scope_with(), receive_of(), sent)
    return sent


def raising(error: Exception) -> Endpoint:
    async def endpoint(scope: Scope, receive: Receive, send: Send) -> None:
        raise error

    return endpoint


async def test_a_known_problem_is_answered_by_the_table() -> None:
    sent = await run_guarded(raising(errors.Overloaded("full", retry_after_s=2.6)))
    assert sent.status == 429
    assert sent.headers[b"retry-after"] == b"3"
    assert json.loads(sent.body) == {"error": "full", "error_type": "Overloaded", "request_id": "rid"}


async def test_a_body_that_was_not_read_closes_its_connection() -> None:
    sent = await run_guarded(raising(errors.BodyTooLarge("big")))
    assert (sent.status, sent.headers[b"connection"]) == (413, b"close")


async def test_an_unknown_failure_is_a_plain_500_and_its_detail_is_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    sent = await run_guarded(raising(ValueError("secret detail")))
    assert sent.status == 500
    assert b"secret" not in sent.body
    assert "secret detail" in caplog.text


async def test_no_answer_is_sent_once_the_caller_has_gone() -> None:
    assert (await run_guarded(raising(errors.ClientGone()))).messages == []


class Watched:
    """An Edge around a small FastAPI app, with a client and what was observed."""

    def __init__(self) -> None:
        self.observed: list[tuple[str, int, float]] = []
        self.draining = False
        app = FastAPI()

        @app.get("/hello")
        async def hello() -> dict[str, str]:
            return {"hello": "world"}

        async def raw(scope: Scope, receive: Receive, send: Send) -> None:
            await edge.send_bytes(send, 200, [scope["state"]["request_id"].encode()])

        @app.post("/raw")
        def documented() -> str:
            """What the document says."""
            raise AssertionError

        edge.answer_unknown_routes(app)
        self.app = edge.Edge(app, direct={"/raw": raw}, observe=self.observe, process=self)

    def observe(self, scope: Scope, status: int, seconds: float) -> None:
        self.observed.append((scope["path"], status, seconds))

    async def request(self, method: str, path: str, **headers: str) -> httpx.Response:
        transport = httpx.ASGITransport(app=self.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.request(method, path, headers={k.replace("_", "-"): v for k, v in headers.items()})


async def test_every_reply_carries_the_request_id_that_was_given() -> None:
    watched = Watched()
    assert (await watched.request("GET", "/hello", x_request_id="my-id/1")).headers["x-request-id"] == "my-id/1"
    assert (await watched.request("POST", "/raw", x_request_id="my-id/1")).text == "my-id/1"
    assert (await watched.request("GET", "/nowhere", x_request_id="my-id/1")).headers["x-request-id"] == "my-id/1"


@pytest.mark.parametrize("given", ["two words", "x" * 129, "tab\there"])
async def test_an_id_that_cannot_be_logged_as_it_is_gets_replaced(given: str) -> None:
    made = (await Watched().request("GET", "/hello", x_request_id=given)).headers["x-request-id"]
    assert made != given
    assert len(made) == 16


async def test_without_an_id_each_request_gets_its_own() -> None:
    watched = Watched()
    ids = {(await watched.request("GET", "/hello")).headers["x-request-id"] for _ in range(5)}
    assert len(ids) == 5


async def test_each_reply_is_observed_once_with_its_status() -> None:
    watched = Watched()
    await watched.request("GET", "/hello")
    await watched.request("GET", "/nowhere")
    assert [(path, status) for path, status, _ in watched.observed] == [("/hello", 200), ("/nowhere", 404)]


async def test_a_request_without_a_reply_is_observed_as_hung_up() -> None:
    statuses: list[int] = []

    async def silent(scope: Scope, receive: Receive, send: Send) -> None:
        return

    outermost = edge.Edge(silent, direct={}, observe=lambda _s, status, _t: statuses.append(status), process=Steady())
    await outermost(scope_with(), receive_of(), Sent())
    assert statuses == [499]


async def test_a_header_that_would_break_into_the_next_line_is_not_written_in_one_go() -> None:
    written: list[bytes] = []
    scope = scope_with() | {"extensions": {WHOLE: {"write": lambda head, _: written.append(head) or True}}}
    sender = edge._Sender(Sent(), scope, b"rid", Steady())
    assert not sender.at_once([(b"x-model", b"a\r\nset-cookie: b")], [b"body"])
    assert sender.at_once([(b"x-model", b"a")], [b"body"])
    assert written == [b"x-model: a\r\nx-request-id: rid\r\n"]


async def test_while_draining_every_reply_closes_its_connection() -> None:
    watched = Watched()
    assert "connection" not in (await watched.request("GET", "/hello")).headers
    watched.draining = True
    assert (await watched.request("GET", "/hello")).headers["connection"] == "close"


async def test_unknown_paths_and_methods_are_refused_in_json_that_names_them() -> None:
    watched = Watched()
    missing = await watched.request("GET", "/nowhere")
    assert (missing.status_code, missing.json()["field"], missing.json()["value"]) == (404, "path", "/nowhere")
    wrong = await watched.request("GET", "/raw")
    assert (wrong.status_code, wrong.json()["limit"], wrong.json()["value"]) == (405, "POST", "GET")
    assert wrong.headers["allow"] == "POST"
    assert wrong.json()["request_id"] == wrong.headers["x-request-id"]


async def test_a_line_end_behind_a_path_does_not_reach_what_only_stands_in_the_document() -> None:
    reply = await Watched().request("POST", "/raw%0A")
    assert (reply.status_code, reply.json()["field"], reply.json()["value"]) == (404, "path", "/raw\n")


async def test_a_raw_route_stands_in_the_openapi_document() -> None:
    document = (await Watched().request("GET", "/openapi.json")).json()
    assert document["paths"]["/raw"]["post"]["description"] == "What the document says."
