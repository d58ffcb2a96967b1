"""One real Python client, in a process of its own: `ask.py CLIENT` reads {"url", "texts"} and writes {"vectors"}.

`ask.py errors-of-CLIENT` reads {"url", "texts"}, sends each text alone, and writes what the client raises for it.
"""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

OPENAIS_NAME = "text-embedding-3-small"


def openai(url: str, texts: list[str], **choices: Any) -> Any:
    from openai import OpenAI

    client = OpenAI(base_url=url, api_key="dummy", max_retries=0)
    reply = client.embeddings.create(model=OPENAIS_NAME, input=texts, **choices)
    assert reply.usage.total_tokens >= 2 * len(texts)
    assert [one.index for one in reply.data] == list(range(len(texts)))
    assert OPENAIS_NAME in {model.id for model in client.models.list()}
    return [one.embedding for one in reply.data]


def langchain(url: str, texts: list[str], **choices: Any) -> Any:
    from langchain_openai import OpenAIEmbeddings
    from pydantic import SecretStr

    client = OpenAIEmbeddings(base_url=url, api_key=SecretStr("dummy"), model=OPENAIS_NAME, max_retries=0, **choices)
    vectors = client.embed_documents(texts)
    assert len(client.embed_query(texts[0])) == len(vectors[0])
    return vectors


def huggingface(url: str, texts: list[str]) -> Any:
    from huggingface_hub import InferenceClient

    client = InferenceClient(model=url)
    one = client.feature_extraction(texts[0])
    assert one.shape[0] == 1
    return client.feature_extraction(texts, normalize=True, truncate=True).tolist()


CLIENTS: dict[str, Callable[[str, list[str]], Any]] = {
    "openai": lambda url, texts: openai(f"{url}/v1", texts),
    "openai-floats": lambda url, texts: openai(f"{url}/v1/", texts, encoding_format="float"),
    "openai-without-v1": openai,
    "langchain-openai": lambda url, texts: langchain(f"{url}/v1", texts),
    "langchain-openai-strings": lambda url, texts: langchain(f"{url}/v1", texts, check_embedding_ctx_length=False),
    "huggingface-hub": huggingface,
    "huggingface-hub-embed": lambda url, texts: huggingface(f"{url}/embed", texts),
}


def errors_of(client: Callable[[str, list[str]], Any], url: str, texts: list[str]) -> list[dict[str, Any]]:
    raised = []
    for text in texts:
        try:
            client(url, [text])
        except Exception as problem:  # noqa: BLE001 - which one is what the test is about
            status = getattr(getattr(problem, "response", None), "status_code", None)
            raised.append({"class": type(problem).__name__, "status": status, "message": str(problem)})
    return raised


def main() -> None:
    name = sys.argv[1]
    asked = json.load(sys.stdin)
    client = CLIENTS[name.removeprefix("errors-of-")]
    if name.startswith("errors-of-"):
        print(json.dumps(errors_of(client, asked["url"], asked["texts"])))
    else:
        print(json.dumps({"vectors": client(asked["url"], asked["texts"])}))


if __name__ == "__main__":
    main()
