"""The errors of the gateway: those that both processes share (`embedding_common.errors`), and one of its own."""

from __future__ import annotations

from embedding_common.errors import (
    BodyTooLarge,
    ClientGone,
    DeadlineExceeded,
    EmptyInput,
    Forbidden,
    InferenceFailed,
    InvalidRequest,
    MalformedBody,
    Overloaded,
    Problem,
    RequestTimeout,
    Unauthorized,
    Unavailable,
    UnknownModel,
    UnknownPath,
    WrongMethod,
)

__all__ = [
    "BodyTooLarge",
    "ClientGone",
    "DeadlineExceeded",
    "EmptyInput",
    "Forbidden",
    "InferenceFailed",
    "InvalidRequest",
    "MalformedBody",
    "Overloaded",
    "Problem",
    "RequestTimeout",
    "StartOver",
    "Unauthorized",
    "Unavailable",
    "UnknownModel",
    "UnknownPath",
    "WrongMethod",
]


class StartOver(Exception):
    """A flight ended for a reason that is not its waiters' own: each of them may look up and claim once more.

    `problem` is what a waiter tells its caller if this happens to it twice.
    """

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.message)
        self.problem = problem
