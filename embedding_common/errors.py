"""Every problem that a caller can be told of, on one screen. Each dialect maps them to statuses by a table."""

from __future__ import annotations


class Problem(Exception):
    """The base of all problems. Its message goes to the caller and names field, limit, value, never a text or key."""

    def __init__(
        self,
        message: str,
        *,
        field: str | None = None,
        limit: float | str | None = None,
        value: float | str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.limit = limit
        self.value = value
        self.retry_after_s = retry_after_s


class MalformedBody(Problem):
    """The body is not JSON, or not UTF-8, or speaks two dialects at once."""


class InvalidRequest(Problem):
    """A field is missing, of the wrong type, or outside its limits."""


class EmptyInput(Problem):
    """There is no text to embed."""


class UnknownPath(Problem):
    """No route answers at this path."""


class WrongMethod(Problem):
    """The path takes other methods; `limit` names them."""


class Unauthorized(Problem):
    """A key is needed, and none, or a wrong one, was given."""


class Forbidden(Problem):
    """The key is valid, but does not open this."""


class RequestTimeout(Problem):
    """The caller took too long to send its request."""


class BodyTooLarge(Problem):
    """The request has more bytes, or needs more work, than can ever fit."""


class UnknownModel(Problem):
    """`model_id` names no model that is served here."""


class Overloaded(Problem):
    """There is no room now; the same request may fit after `retry_after_s` seconds."""


class Unavailable(Problem):
    """Nothing can be computed now: the model loads, the process drains, or no replica is up."""


class DeadlineExceeded(Problem):
    """The caller's own time limit, or the limit of one upstream call, passed before the answer was there."""


class InferenceFailed(Problem):
    """The model, or the replica that runs it, failed while it computed."""


class ClientGone(Exception):
    """The caller hung up before there was an answer, so no answer is sent."""
