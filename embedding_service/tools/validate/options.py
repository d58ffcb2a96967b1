"""The command line of `embedding-validate`, and the targets that a system must meet."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from embedding_service.tools.client.options import (
    Parser,
    add_api_key,
    http_url,
    positive_count,
    positive_seconds,
    read_api_key,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_LATENCY_MS = 2000.0
MIN_SUCCESS = 0.95
MIN_HIT_RATE = 0.50
MIN_COSINE = 0.999  # a text computed again in another batch differs in its last digits, never by more

# the parser formats this text with %, so each percent sign stands twice
_EPILOG = f"""
targets:
  health             200 and "healthy"
  one request        under {MAX_LATENCY_MS:.0f} ms, a text that was never sent before
  concurrent load    over {MIN_SUCCESS:.0%}% answered
  repeated load      over {MIN_HIT_RATE:.0%}% from the cache; the service's counters agree; the vectors are the same
  replicas           each one answered; none is down

examples:
  %(prog)s
  %(prog)s --requests 200 --concurrency 32 --json
  %(prog)s --learn-url http://storage:8080/api     the same load through a storage server

exit code: 0 every target met, 1 some target missed, 2 usage, 130 interrupted.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    url: str
    stats_url: str
    learn_url: str | None
    backend: str
    replicas: int
    requests: int
    concurrency: int
    texts: int
    timeout_s: float
    api_key: str | None = field(repr=False)
    json: bool


def parse_arguments(arguments: Sequence[str] | None, *, program: str) -> Settings:
    parser = Parser(
        prog=program,
        description="Check a running embedding system against its targets.",
        epilog=_EPILOG,
    )
    where = parser.add_argument_group("where")
    where.add_argument(
        "--url", type=http_url, default="http://localhost:8888", help="the gateway (default: %(default)s)"
    )
    where.add_argument(
        "--stats-url",
        type=http_url,
        default="http://localhost:9999",
        help="HAProxy's statistics (default: %(default)s)",
    )
    where.add_argument(
        "--learn-url", type=http_url, metavar="URL", help="send the load as POST URL/learn to a storage server instead"
    )
    add_api_key(where)
    where.add_argument("--backend", default="ml-base", metavar="NAME", help="HAProxy's backend (default: %(default)s)")
    load = parser.add_argument_group("load")
    load.add_argument(
        "--replicas",
        type=positive_count,
        default=3,
        metavar="N",
        help="replicas that must take part (default: %(default)s)",
    )
    load.add_argument(
        "--requests", type=positive_count, default=60, metavar="N", help="requests in the load (default: %(default)s)"
    )
    load.add_argument(
        "--concurrency", type=positive_count, default=12, metavar="N", help="requests at a time (default: %(default)s)"
    )
    load.add_argument(
        "--texts", type=positive_count, default=8, metavar="N", help="texts in a request (default: %(default)s)"
    )
    load.add_argument(
        "--timeout",
        dest="timeout_s",
        type=positive_seconds,
        default=30.0,
        metavar="SECONDS",
        help="limit for one request (default: 30)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the report")
    given = parser.parse_args(arguments)
    given.api_key = read_api_key(parser, given.api_key)
    return Settings(**vars(given))
