"""What a refusal says in the native dialect: its status, its JSON body, and how it names a mistake."""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import orjson
from pydantic import BaseModel

from embedding_common import errors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from pydantic import ValidationError

    from embedding_common.contract import ModelCard

_QUOTED_CHARS = 24  # a refusal may quote a word, never a text


class ErrorReply(BaseModel):
    """What every 4xx and 5xx of this dialect looks like."""

    error: str
    error_type: str
    field: str | None = None
    limit: int | float | str | None = None
    value: int | float | str | None = None
    request_id: str | None = None


STATUS: dict[type[errors.Problem], tuple[int, str]] = {
    errors.MalformedBody: (400, "Validation"),
    errors.Unauthorized: (401, "Unauthorized"),
    errors.Forbidden: (403, "Forbidden"),
    errors.UnknownPath: (404, "Validation"),
    errors.WrongMethod: (405, "Validation"),
    errors.RequestTimeout: (408, "Timeout"),
    errors.EmptyInput: (422, "Empty"),
    errors.InvalidRequest: (422, "Validation"),
    errors.BodyTooLarge: (413, "Validation"),
    errors.UnknownModel: (404, "Validation"),
    errors.Overloaded: (429, "Overloaded"),
    errors.Unavailable: (503, "Unhealthy"),
    errors.DeadlineExceeded: (504, "Timeout"),
    errors.InferenceFailed: (500, "Backend"),
}
"""The status and the `error_type` of each problem. The types are those of text-embeddings-inference on this route."""


def error_body(
    problem: errors.Problem,
    request_id: str,
    *,
    table: Mapping[type[errors.Problem], tuple[int, str]] = STATUS,
    field_names: Mapping[str, str] = MappingProxyType({}),
) -> tuple[int, bytes]:
    """Returns the status and the JSON of a refusal.

    A dialect whose refusals have the same fields passes its own table, and the names that our fields have there.
    """
    status, error_type = table[type(problem)]
    message, field = rename_field(problem, field_names)
    reply = ErrorReply(
        error=message,
        error_type=error_type,
        field=field,
        limit=problem.limit,
        value=problem.value,
        request_id=request_id,
    )
    return status, reply.model_dump_json(exclude_none=True).encode()


def rename_field(problem: errors.Problem, field_names: Mapping[str, str]) -> tuple[str, str | None]:
    """Returns message and field with the name that another dialect gives the field: `texts[3]` may be `input[3]`."""
    field = problem.field
    root, bracket, rest = (field or "").partition("[")
    if root not in field_names:
        return problem.message, field
    renamed = field_names[root] + bracket + rest
    names_field = problem.message.startswith(f"{field}:")
    return (renamed + problem.message[len(field or "") :] if names_field else problem.message), renamed


def translate(invalid: ValidationError) -> errors.Problem:
    """Returns the first mistake that pydantic found in a body as a problem that names field, limit and value."""
    first = invalid.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return errors.MalformedBody(f"body: {first['msg']}", field="body")
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])[1:] or "body"
    limit = next(
        (str(first["ctx"][key]) for key in ("ge", "le", "min_length", "expected") if key in first.get("ctx", {})), None
    )
    value = describe(first["input"]) if first["type"] != "missing" else "nothing"
    message = f"{field}: {first['msg'][0].lower()}{first['msg'][1:]}, got {value}"
    return errors.InvalidRequest(message, field=field, limit=limit, value=value)


def describe(value: Any) -> str:
    """Returns a value as a refusal may show it: numbers and flags as they are, longer things by kind and size."""
    if value is None or isinstance(value, bool | int | float):
        return orjson.dumps(value).decode()[:40] if not isinstance(value, int) else str(value)[:40].lower()
    if isinstance(value, str):
        return repr(value) if len(value) <= _QUOTED_CHARS else f"a string of {len(value)} characters"
    if isinstance(value, list):
        return f"a list of {len(value)}"
    return "an object"


def check_dimensions(dimensions: int | None, card: ModelCard) -> None:
    """Raises `InvalidRequest` if the model has fewer components than asked for."""
    if dimensions is not None and dimensions > card.dimension:
        raise errors.InvalidRequest(
            f"dimensions: {card.id} has {card.dimension}, got {dimensions}",
            field="dimensions",
            limit=card.dimension,
            value=dimensions,
        )


def check_model(model_id: str | None, served: list[str]) -> str:
    """Returns the id of the model that answers. Raises `UnknownModel`."""
    if model_id is None:
        return served[0]
    if model_id not in served:
        known = ", ".join(served)
        raise errors.UnknownModel(
            f"model_id: {model_id[:80]!r} is not served here; available: {known}",
            field="model_id",
            limit=known,
            value=model_id[:80],
        )
    return model_id


def refuse_truncated(index: int, tokens: int, card: ModelCard) -> errors.InvalidRequest:
    """Returns the refusal of a text that `truncate: false` forbids to cut."""
    return errors.InvalidRequest(
        f"texts[{index}]: {tokens} tokens, at most {card.max_tokens} with truncate=false",
        field=f"texts[{index}]",
        limit=card.max_tokens,
        value=tokens,
    )
