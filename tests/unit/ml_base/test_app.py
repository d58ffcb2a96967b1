from __future__ import annotations

import asyncio
import json
import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import pytest

from embedding_common import native
from embedding_common.contract import BINARY_TYPE, Embedded, Lane, ModelList, Tokenized
from ml_base.app import Replica, create_app
from ml_base.config import Settings
from ml_base.machine.threads import Threads
from ml_base.metrics import Metrics
from ml_base.models.loading import ModelUnavailableError
from ml_base.models.models import Models
from tests.support.model_server import (
    BATCH_TOKENS,
    CARD,
    POISON,
    FakeBackend,
    FakeLoader,
    loaded,
    server,
    sources,
    until,
    vector_of,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

SECRET = "diary"


class Served:
    """A replica over a fake model, and a client in the same process."""

    def __init__(self, backend: FakeBackend, loader: FakeLoader, client: httpx.AsyncClient, replica: Replica) -> None:
        self.backend = backend
        self.loader = loader
        self.client = client
        self.replica = replica

    async def post(self, path: str, body: Any, key: str = "") -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return await self.client.post(path, content=json.dumps(body).encode(), headers=headers)

    async def embed(self, body: Any, **headers: str) -> httpx.Response:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        return await self.client.post("/embed", content=content, headers=names)

    def count(self, name: str, **labels: str) -> float | None:
        return self.replica.metrics.registry.get_sample_value(name, labels)


def settings_of(**environment: Any) -> Settings:
    return Settings(**{"INSTANCE_ID": "r1", **environment})


def replica_of(backend: FakeBackend, load: FakeLoader, **environment: Any) -> Replica:
    """`fake-model` over `backend`, and `second`, which is loaded when it is asked for."""
    settings, metrics = settings_of(**environment), Metrics()
    models = Models(
        sources(CARD.id, "second"),
        preloaded={CARD.id: loaded(backend, batch_tokens=settings.max_batch_tokens or BATCH_TOKENS)},
        load=load,
        serve=server(max_queue_texts=settings.max_queue_texts, observer=metrics),
        observer=metrics,
        unload_after_s=0,
    )
    return Replica(settings, models, metrics, Threads(1, "a test"))


@asynccontextmanager
async def serving(*, held: bool = False, loading_held: bool = False, **environment: Any) -> AsyncIterator[Served]:
    backend = FakeBackend(held=held)
    loader = FakeLoader(held=loading_held)
    replica = replica_of(backend, loader, **environment)
    app = create_app(replica)
    transport = httpx.ASGITransport(app=app)
    async with replica.models, httpx.AsyncClient(transport=transport, base_url="http://test") as client:
        yield Served(backend, loader, client, replica)


async def test_a_json_reply_has_unit_vectors_in_order_and_all_that_the_contract_names() -> None:
    async with serving(SUTRA_EDITION="other") as served:
        reply = await served.embed({"texts": ["abc", "b", "cd"]})
    assert reply.status_code == 200
    assert reply.headers["x-model-fingerprint"] == CARD.fingerprint
    body = reply.json()
    expected = np.stack([vector_of(text) for text in ("abc", "b", "cd")])
    assert np.allclose(body.pop("embeddings"), expected / np.linalg.norm(expected, axis=1, keepdims=True))
    assert body.pop("processing_time_ms") >= 0
    assert body == {"dimension": 4, "model": "fake-model", "cached_count": 0, "edition": "other", "batch_size": 3}


async def test_normalize_false_and_dimensions_are_respected() -> None:
    async with serving() as served:
        reply = await served.embed({"texts": ["abc"], "normalize": False, "dimensions": 2})
    assert reply.json()["embeddings"] == [vector_of("abc")[:2].tolist()]


async def test_a_binary_reply_is_the_models_own_output_whatever_else_is_asked() -> None:
    async with serving() as served:
        request = {"texts": ["abc", "d" * 9], "normalize": True, "dimensions": 2, "truncate": False}
        reply = await served.embed(request, accept=f"{BINARY_TYPE}, application/json;q=0.5")
    assert reply.headers["content-type"] == BINARY_TYPE
    embedded = Embedded.from_bytes(reply.content, texts=2)
    assert np.array_equal(embedded.vectors, [vector_of("abc"), vector_of("d" * 8)])
    assert (embedded.tokens.tolist(), embedded.truncated.tolist()) == ([3, 9], [False, True])
    assert embedded.card == CARD


async def test_prompt_and_direction_matter_in_both_replies() -> None:
    async with serving() as served:
        request = {"texts": ["abcdefgh"], "prompt_name": "query", "truncation_direction": "left", "normalize": False}
        as_json = (await served.embed(request)).json()["embeddings"]
        as_binary = Embedded.from_bytes((await served.embed(request, accept=BINARY_TYPE)).content, texts=1)
    assert np.array_equal(as_json, as_binary.vectors)
    assert np.array_equal(as_json, [vector_of("abcdefgh")])


@pytest.mark.parametrize(
    ("body", "headers", "status", "field"),
    [
        (b"", {}, 400, "body"),
        (b"{", {}, 400, "body"),
        (b'{"texts":["\xff"]}', {}, 400, "body"),
        (b'{"texts":["\\ud83d"]}', {}, 400, "body"),
        ({"texts": []}, {}, 422, "texts"),
        ({"texts": "a"}, {}, 422, "texts"),
        ({"texts": [3]}, {}, 422, "texts[0]"),
        ({"texts": ["a"] * 6}, {}, 422, "texts"),
        ({"texts": ["a" * 101]}, {}, 422, "texts[0]"),
        ({"texts": ["a"], "pad": "x" * 400}, {}, 413, "body"),
        ({"texts": ["a"] * 4}, {}, 413, "texts"),
        ({"texts": ["a"], "model_id": "other"}, {}, 404, "model_id"),
        ({"texts": ["a"], "cache_ttl_seconds": -1}, {}, 422, "cache_ttl_seconds"),
        ({"texts": ["a"], "dimensions": 5}, {}, 422, "dimensions"),
        ({"texts": ["a"], "prompt_name": "nope"}, {}, 422, "prompt_name"),
        ({"texts": ["a", "b" * 9], "truncate": False}, {}, 422, "texts[1]"),
        ({"texts": ["a"]}, {"x_priority": "high"}, 422, "x-priority"),
        ({"texts": ["a"]}, {"x_request_timeout_ms": "-1"}, 422, "x-request-timeout-ms"),
    ],
)
async def test_bad_input_is_refused_in_json_that_names_the_field_and_is_never_computed(
    body: Any, headers: dict[str, str], status: int, field: str
) -> None:
    limits: dict[str, Any] = {
        "MAX_TEXTS": 5,
        "MAX_TEXT_BYTES": 100,
        "MAX_BODY_BYTES": 300,
        "ML_BASE_MAX_QUEUE_TEXTS": 3,
    }
    async with serving(**limits) as served:
        reply = await served.embed(body, **headers)
        assert (reply.status_code, reply.json()["field"]) == (status, field)
        assert reply.json()["request_id"] == reply.headers["x-request-id"]
        assert served.backend.model.batches == []
        assert (await served.embed({"texts": ["a"]})).status_code == 200
        assert served.count("ml_base_requests_total", route="/embed", status=str(status)) == 1


async def test_a_text_the_model_breaks_on_is_a_500_for_its_request_and_harms_no_neighbour() -> None:
    async with serving(held=True) as served:
        first = asyncio.create_task(served.embed({"texts": ["a"]}))
        await until(lambda: len(served.backend.model.batches) == 1)
        good, bad = (asyncio.create_task(served.embed({"texts": [text]})) for text in ("good", POISON))
        await until(lambda: served.replica.models.waiting(Lane.INTERACTIVE) == 3)
        served.backend.model.finish(9)
        assert [(await task).status_code for task in (first, good, bad)] == [200, 200, 500]
        assert (await bad).json()["error_type"] == "Backend"


async def test_a_full_queue_is_a_429_that_says_when_to_come_back() -> None:
    async with serving(held=True, ML_BASE_MAX_QUEUE_TEXTS=1) as served:
        first = asyncio.create_task(served.embed({"texts": ["a"]}))
        await until(lambda: len(served.backend.model.batches) == 1)
        refused = await served.embed({"texts": ["b"]})
        assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
        served.backend.model.finish()
        assert (await first).status_code == 200


async def test_a_request_over_its_time_is_a_504_while_the_model_is_busy() -> None:
    async with serving(held=True) as served:
        reply = await served.embed({"texts": ["a"]}, x_request_timeout_ms="20")
        assert (reply.status_code, reply.json()["error_type"]) == (504, "Timeout")
        served.backend.model.finish()


async def test_the_priority_header_chooses_the_lane() -> None:
    async with serving(held=True) as served:
        task = asyncio.create_task(served.embed({"texts": ["a"]}, x_priority="bulk"))
        await until(lambda: served.replica.models.waiting(Lane.BULK) == 1)
        served.backend.model.finish()
        await task


async def test_texts_of_a_caller_that_hung_up_leave_the_queue_uncomputed() -> None:
    async with serving(held=True) as served:
        first = asyncio.create_task(served.embed({"texts": ["a"]}))
        await until(lambda: len(served.backend.model.batches) == 1)
        hang_up = asyncio.Event()
        messages = [{"type": "http.request", "body": b'{"texts":["b","c"]}', "more_body": False}]

        async def receive() -> Any:
            if messages:
                return messages.pop()
            await hang_up.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            raise AssertionError("no caller is there to read this")

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/embed",
            "headers": [],
            "query_string": b"",
            "root_path": "",
        }
        gone = asyncio.create_task(served.client._transport.app(scope, receive, send))  # type: ignore[attr-defined]
        await until(lambda: served.replica.models.waiting(Lane.INTERACTIVE) == 3)
        hang_up.set()
        await gone
        assert served.replica.models.waiting(Lane.INTERACTIVE) == 1
        served.backend.model.finish(9)
        await first
        assert served.backend.model.batches == [["a"]]
        assert served.count("ml_base_requests_total", route="/embed", status="499") == 1
        assert served.count("ml_base_texts_total", lane="interactive", outcome="dropped") == 2


async def test_health_answers_beside_a_running_batch_and_says_why_when_it_is_not_well() -> None:
    async with serving(held=True, ML_BASE_STUCK_S=0.001) as served:
        assert (await served.client.get("/health")).json() == {
            "status": "healthy", "model": "fake-model", "instance": "r1",
        }  # fmt: skip
        task = asyncio.create_task(served.embed({"texts": ["a"]}))
        await until(lambda: bool(served.replica.unhealthy()))
        stuck = await served.client.get("/health")
        assert (stuck.status_code, stuck.json()["status"]) == (503, "unhealthy")
        assert stuck.json()["reasons"] == ["inference stuck for 0 s"]
        assert (await served.client.get("/livez")).status_code == 200
        served.backend.model.finish()
        await task
        assert (await served.client.get("/health")).status_code == 200


async def test_while_draining_health_is_503_but_work_is_still_done_and_connections_close() -> None:
    async with serving() as served:
        served.replica.drain()
        health = await served.client.get("/health")
        assert (health.status_code, health.json()["reasons"]) == (503, ["draining"])
        reply = await served.embed({"texts": ["a"]})
        assert (reply.status_code, reply.headers["connection"]) == (200, "close")


async def test_models_tells_a_gateway_the_card() -> None:
    async with serving() as served:
        body = (await served.client.get("/models")).json()
    served_model = body["models"][0]
    assert body["default"] == "fake-model"
    assert served_model["card"]["fingerprint"] == CARD.fingerprint
    assert served_model["card"]["prompts"] == {"query": "ask "}
    assert (served_model["state"], body["threads"]) == ("ready", 1)
    assert body["memory_bytes"] > 1_000_000


async def test_info_shows_the_effective_configuration() -> None:
    async with serving(ML_BASE_MAX_BATCH_TOKENS=100) as served:
        body = (await served.client.get("/info")).json()
    assert (body["instance"], body["batch_tokens"], body["configuration"]["max_texts"]) == ("r1", 100, 8192)
    assert body["threads"] == {"count": 1, "reason": "a test"}


async def test_unknown_paths_and_methods_are_refused_in_the_same_shape() -> None:
    async with serving() as served:
        missing, wrong = await served.client.get("/nowhere"), await served.client.get("/embed")
    assert (missing.status_code, missing.json()["field"]) == (404, "path")
    assert (wrong.status_code, wrong.json()["field"], wrong.headers["allow"]) == (405, "method", "POST")


async def test_the_documentation_shows_the_request_the_reply_and_the_refusals() -> None:
    async with serving() as served:
        document = (await served.client.get("/openapi.json")).json()
        assert (await served.client.get("/docs")).status_code == 404  # its page would load scripts from elsewhere
    embed = document["paths"]["/embed"]["post"]
    assert embed["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/EmbedRequest")
    assert {"200", "400", "404", "413", "422", "429", "500", "503", "504"} <= set(embed["responses"])


async def test_each_embed_request_leaves_one_line_and_never_a_text(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with serving() as served:
        await served.embed({"texts": [SECRET, SECRET]}, x_request_id="rid-1")
    lines = [record.getMessage() for record in caplog.records if "rid-1" in record.getMessage()]
    assert len(lines) == 1
    assert lines[0].startswith("request_id=rid-1 texts=2 tokens=10 lane=interactive ms=")
    assert lines[0].endswith("status=200")
    assert SECRET not in caplog.text


async def test_a_large_json_reply_lets_others_in_between() -> None:
    async with serving() as served:
        reply = await served.embed({"texts": [f"{i}" for i in range(400)], "normalize": False})
    assert np.array_equal(np.array(reply.json()["embeddings"], np.float32), [vector_of(f"{i}") for i in range(400)])


async def test_its_lifespan_opens_and_closes_the_model() -> None:
    replica = replica_of(FakeBackend(), FakeLoader())
    app = create_app(replica)
    messages: asyncio.Queue[Any] = asyncio.Queue()
    sent: asyncio.Queue[Any] = asyncio.Queue()
    task = asyncio.ensure_future(app({"type": "lifespan", "state": {}}, messages.get, sent.put))
    await messages.put({"type": "lifespan.startup"})
    assert (await sent.get())["type"] == "lifespan.startup.complete"
    assert replica.unhealthy() == []
    await messages.put({"type": "lifespan.shutdown"})
    assert (await sent.get())["type"] == "lifespan.shutdown.complete"
    await task
    assert replica.unhealthy() == ["inference ended"]


async def test_model_id_chooses_the_model_and_has_it_loaded() -> None:
    async with serving() as served:
        reply = await served.embed({"texts": ["a"], "model_id": "second"})
        assert (reply.status_code, reply.json()["model"]) == (200, "second")
        binary = await served.embed({"texts": ["a"], "model_id": "second"}, accept=BINARY_TYPE)
        assert Embedded.from_bytes(binary.content, texts=1).card.id == "second"
        assert served.count("ml_base_model_info", model="second", fingerprint=CARD.fingerprint, backend="", dtype="")


async def test_health_answers_while_a_model_is_loaded_and_a_request_that_waits_keeps_to_its_time() -> None:
    async with serving(loading_held=True) as served:
        late = await served.embed({"texts": ["a"], "model_id": "second"}, x_request_timeout_ms="20")
        assert (late.status_code, late.json()["error"]) == (504, "no answer within the 0.02 s that were allowed")
        assert (await served.client.get("/health")).status_code == 200
        states = [item["state"] for item in (await served.client.get("/models")).json()["models"]]
        assert states == ["ready", "loading"]
        served.loader.finish()


async def test_a_model_that_cannot_be_loaded_is_a_503_that_says_why_and_when_to_come_back() -> None:
    async with serving() as served:
        served.loader.problem = ModelUnavailableError("model second: no memory left")
        reply = await served.embed({"texts": ["a"], "model_id": "second"})
        assert (reply.status_code, reply.json()["field"], reply.headers["retry-after"]) == (503, "model_id", "5")
        assert reply.json()["error"] == "model_id: model second: no memory left"


async def test_tokenize_shows_ids_tokens_offsets_and_which_are_special() -> None:
    async with serving() as served:
        reply = await served.post("/tokenize", {"texts": ["hi", ""]})
        bare = await served.post("/tokenize", {"texts": ["hi"], "add_special_tokens": False, "prompt_name": "query"})
    assert reply.json() == {
        "model": "fake-model",
        "texts": [
            {
                "ids": [0, 104, 105],
                "tokens": ["<s>", "h", "i"],
                "offsets": [None, [0, 1], [1, 2]],
                "special": [True, False, False],
            },
            {"ids": [0], "tokens": ["<s>"], "offsets": [None], "special": [True]},
        ],
    }
    assert bare.json()["texts"][0]["tokens"] == list("ask hi")
    assert [len(text.ids) for text in Tokenized.from_json(reply.content).texts] == [3, 1]


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        ({}, 422, "texts"),
        ({"texts": []}, 422, "texts"),
        ({"texts": ["a"] * 6}, 422, "texts"),
        ({"texts": ["a" * 101]}, 422, "texts[0]"),
        ({"texts": ["a"], "add_special_tokens": 1}, 422, "add_special_tokens"),
        ({"texts": ["a"], "prompt_name": "nope"}, 422, "prompt_name"),
        ({"texts": ["a"], "model_id": "third"}, 404, "model_id"),
    ],
)
async def test_what_cannot_be_tokenized_is_refused_in_json_that_names_the_field(
    body: Any, status: int, field: str
) -> None:
    async with serving(MAX_TEXTS=5, MAX_TEXT_BYTES=100) as served:
        reply = await served.post("/tokenize", body)
    assert (reply.status_code, reply.json()["field"]) == (status, field)


async def test_more_text_than_a_reply_could_tell_of_is_not_tokenized() -> None:
    async with serving() as served:
        reply = await served.post("/tokenize", {"texts": ["a" * (native.MAX_TOKENIZE_BYTES // 2)] * 3})
    assert (reply.status_code, reply.json()["limit"]) == (413, native.MAX_TOKENIZE_BYTES)


async def test_a_model_is_loaded_and_unloaded_by_name_and_the_reply_is_the_list() -> None:
    async with serving() as served:
        loaded_list = (await served.post("/models/load", {"model_id": "second"})).json()
        unloaded_list = (await served.post("/models/unload", {"model_id": "second"})).json()
    assert [item["state"] for item in loaded_list["models"]] == ["ready", "ready"]
    assert [item["state"] for item in unloaded_list["models"]] == ["ready", "unloaded"]
    assert unloaded_list["models"][1]["card"] == loaded_list["models"][1]["card"]


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/models/unload", {"model_id": "fake-model"}, 422),
        ("/models/unload", {"model_id": "third"}, 404),
        ("/models/load", {"model_id": "third"}, 404),
        ("/models/load", {}, 422),
        ("/models/load", {"model_id": "x" * 5000}, 413),
    ],
)
async def test_what_cannot_be_loaded_or_unloaded_is_refused(path: str, body: Any, status: int) -> None:
    async with serving() as served:
        reply = await served.post(path, body)
    assert reply.status_code == status
    assert reply.json()["field"] in {"model_id", "body"}


@pytest.mark.parametrize("path", ["/models/load", "/models/unload"])
async def test_with_admin_keys_only_they_load_and_unload(path: str) -> None:
    async with serving(ADMIN_API_KEYS="good,other") as served:
        answers = [(await served.post(path, {"model_id": "second"}, key)).status_code for key in ("", "bad", "other")]
        assert answers == [401, 401, 200]
        assert (await served.embed({"texts": ["a"]})).status_code == 200  # embedding needs none here


async def test_the_gateways_reader_understands_the_list_of_models() -> None:
    async with serving() as served:
        listed = ModelList.from_json((await served.client.get("/models")).content)
    assert [(model.id, model.state) for model in listed.models] == [("fake-model", "ready"), ("second", "unloaded")]
    assert (listed.default, listed.models[0].card, listed.models[1].card) == ("fake-model", CARD, None)


async def test_a_replica_whose_inference_never_comes_back_ends_itself() -> None:
    ended: list[int] = []
    async with serving(held=True, ML_BASE_STUCK_EXIT_S="0.05") as served:
        request = asyncio.create_task(served.embed({"texts": ["a"]}))
        watch = asyncio.create_task(served.replica.end_when_stuck(ended.append))
        await until(lambda: bool(ended))
        served.backend.model.finish()
        await request
        watch.cancel()
    assert set(ended) == {70}


async def test_a_busy_replica_lives_on() -> None:
    ended: list[int] = []
    async with serving(ML_BASE_STUCK_EXIT_S="0.05") as served:
        watch = asyncio.create_task(served.replica.end_when_stuck(ended.append))
        for _ in range(50):
            await served.embed({"texts": ["a"]})
        watch.cancel()
    assert ended == []
