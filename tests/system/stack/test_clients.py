"""Other people's clients, as they are, against the running stack: each gets the vectors of SentenceTransformer."""

from __future__ import annotations

import contextlib
import http.client
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from local_stack.stack import LocalStack

from tests.system.stack.client import Client, encode, fresh_texts, paragraphs
from tests.system.stack.client_programs import javascript, python, python_openai_1
from tests.system.stack.running import running

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from tests.system.stack.client_programs import Program

pytestmark = [pytest.mark.stack, pytest.mark.timeout(600)]

TEXTS = ["hello world", "", "Grüße, 世界 🌍", "two  spaces\nand a line", *paragraphs(30)]
LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.9995}
IN_FLOAT32 = ["openai", "openai floats", "langchain token ids", "huggingface_hub", "node openai"]

PROGRAMS: dict[str, Callable[[], Program]] = {
    "openai": lambda: python("openai"),
    "openai floats": lambda: python("openai-floats"),
    "openai without v1": lambda: python("openai-without-v1"),
    "openai 1": lambda: python_openai_1("openai"),
    "openai 1 floats": lambda: python_openai_1("openai-floats"),
    "langchain token ids": lambda: python("langchain-openai"),
    "langchain strings": lambda: python("langchain-openai-strings"),
    "huggingface_hub": lambda: python("huggingface-hub"),
    "huggingface_hub at embed": lambda: python("huggingface-hub-embed"),
    "node openai": lambda: javascript("openai"),
    "node openai floats": lambda: javascript("openai-floats"),
    "node langchain": lambda: javascript("langchain"),
}


@pytest.fixture(scope="module")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalStack]:
    """In the dtype that the environment or the replicas choose, or in the one that a test asks for."""
    dtype: str | None = getattr(request, "param", None)
    env = {} if dtype is None else {"ML_BASE_DTYPE": dtype}
    with running(LocalStack(state_dir=tmp_path_factory.mktemp("stack"), env=env)) as stack:
        yield stack


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> NDArray[np.float32]:
    return encode(TEXTS, tmp_path_factory.mktemp("reference"))


def least_cosine(stack: LocalStack, program: str, expected: NDArray[np.float32]) -> float:
    vectors = np.array(PROGRAMS[program]().ask(stack.url, TEXTS)["vectors"], np.float32)
    assert vectors.shape == expected.shape
    return float((vectors * expected).sum(axis=1).min())


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_client_gets_the_vectors_of_sentence_transformers(
    stack: LocalStack, client: Client, expected: NDArray[np.float32], program: str
) -> None:
    dtype = client.send("GET", "/models").json()["models"][0]["card"]["dtype"]
    assert least_cosine(stack, program, expected) > LEAST_COSINE[dtype]


def test_one_text_is_computed_once_whoever_asks(stack: LocalStack, client: Client) -> None:
    [text] = fresh_texts(1)
    before = client.cache_stats()["total"]
    for program in PROGRAMS.values():
        program().ask(stack.url, [text])
    after = client.cache_stats()["total"]
    assert after["misses"] - before["misses"] == 1
    assert after["requests"] - before["requests"] >= len(PROGRAMS)


def post(client: Client, path: str, body: Any) -> Any:
    reply = client.send("POST", path, json=body)
    assert reply.status_code == 200, reply.text[:500]
    return reply.json()


def test_2048_texts_work_in_every_dialect_and_2049_are_openais_limit(client: Client) -> None:
    texts = [f"{n}" for n in range(2049)]
    assert len(post(client, "/v1/embeddings", {"input": texts[:2048]})["data"]) == 2048
    refused = client.send("POST", "/v1/embeddings", json={"input": texts})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input")
    assert len(post(client, "/embed", {"inputs": texts})) == 2049
    assert len(post(client, "/embed", {"texts": texts})["embeddings"]) == 2049


@pytest.mark.parametrize(("path", "field"), [("/v1/embeddings", "input"), ("/", "inputs"), ("/embed", "texts")])
def test_a_body_of_20_mb_works(client: Client, path: str, field: str) -> None:
    texts = [f"{n} " + "long text " * 10_000 for n in range(200)]  # 20 MB, cut to the model's 256 tokens each
    reply = client.send("POST", path, json={field: texts})
    assert reply.status_code == 200
    assert reply.headers["x-truncated"] == "200"


def test_agno_asks_for_more_dimensions_than_the_model_has_and_is_told_how_many(client: Client) -> None:
    reply = client.send("POST", "/v1/embeddings", json={"input": ["a"], "dimensions": 1536})
    assert reply.status_code == 400
    assert "has 384, got 1536" in reply.json()["error"]["message"]


def test_weaviate_without_a_content_type(client: Client) -> None:
    raw = b'{"text":"hello","dims":0,"vector":null,"error":"","config":{"pooling_strategy":"","task_type":"passage"}}'
    reply = client._http.build_request("POST", f"{client._stack.url}/vectors", content=raw)
    del reply.headers["content-type"]
    answer = client._http.send(reply).json()
    assert (answer["text"], answer["dim"], len(answer["vector"])) == ("hello", 384, 384)


def test_dify_asks_for_information_and_sends_no_model(client: Client) -> None:
    info = client.send("GET", "/info").json()
    assert info["model_type"] == {"embedding": {"pooling": "mean"}}
    assert len(post(client, "/v1/embeddings", {"input": ["ping"]})["data"][0]["embedding"]) == 384


def test_librechat_posts_to_the_bare_url(client: Client) -> None:
    assert len(post(client, "", {"inputs": ["hello", "world"]})) == 2


def test_open_webui_sends_a_field_of_its_own_and_an_empty_key(stack: LocalStack) -> None:
    body = b'{"input": ["hello"], "model": "text-embedding-3-small", "prefix": "query: "}'
    with contextlib.closing(http.client.HTTPConnection("127.0.0.1", stack.ports.gateway)) as connection:
        connection.request("POST", "/v1/embeddings", body, {"authorization": "Bearer "})  # httpx refuses to send it
        assert connection.getresponse().status == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "kind"),
    [
        ("/v1/embeddings", b'{"input":[]}', 400, dict),
        ("/v1/embeddings", b'{"input":[""]}', 200, None),
        ("/v1/embeddings", b'{"input":', 400, dict),
        ("/v1/embeddings", b'{"input":"a","model":"none-such"}', 404, dict),
        ("/embed", b'{"inputs":[]}', 400, str),
        ("/embed", b'{"inputs":[""]}', 200, None),
        ("/embed", b'{"inputs":', 400, str),
        ("/embed", b'{"inputs":"a","model":"none-such"}', 404, str),
        ("/vectors", b'{"text":7}', 422, str),
    ],
)
def test_an_error_is_a_string_or_an_object_by_route(
    client: Client, path: str, body: bytes, status: int, kind: type | None
) -> None:
    reply = client.send("POST", path, content=body)
    assert reply.status_code == status
    assert kind is None or isinstance(reply.json()["error"], kind)


def test_tokens_are_the_models_own(client: Client) -> None:
    [tokens] = post(client, "/tokenize", {"inputs": "hello wörld"})
    assert [token["text"] for token in tokens] == ["[CLS]", "hello", "wörld", "[SEP]"]
    assert [token["special"] for token in tokens] == [True, False, False, True]
    assert (tokens[2]["start"], tokens[2]["stop"]) == (6, 11)


# last, so that the stack of all others is started once
@pytest.mark.parametrize("stack", ["float32"], indirect=True)
@pytest.mark.parametrize("program", IN_FLOAT32)
def test_in_float32_a_client_gets_vectors_as_near_as_rounding_lets_them(
    stack: LocalStack, expected: NDArray[np.float32], program: str
) -> None:
    assert least_cosine(stack, program, expected) > LEAST_COSINE["float32"]
