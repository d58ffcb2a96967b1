"""The command line of `embedding-warm`."""

from __future__ import annotations

import dataclasses
from argparse import ArgumentParser, ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedding_service.tools.client.options import (
    Parser,
    add_api_key,
    http_url,
    positive_count,
    positive_seconds,
    read_api_key,
)
from embedding_service.tools.warm.output import OUTPUTS

if TYPE_CHECKING:
    from collections.abc import Sequence

_EPILOG = """
input:
  text    one text a line, UTF-8; blank lines are skipped
  jsonl   one JSON value a line: a string, or an object that has the text under --field
  The format is taken from the name (.txt .jsonl .ndjson), else from the first line. FILE may be - for standard input.
  A line that cannot be read is named and counted as failed; the run goes on (--strict: it stops).

output (--out):
  x.npy     float32 [texts, dimension]; row i is text i, blank lines not counted; the row of a failed text is NaN.
            Read it with numpy.load(x, mmap_mode="r").
  x.jsonl   {"line": n, "embedding": [...]} in the order of FILE; a failed text has null and an "error".
  Written to x.part, which becomes x when all is done.

resuming:
  Progress is kept beside FILE (or in --state) and removed by a run that comes to the end. After Ctrl-C, a crash or an
  outage, the same command goes on where it stopped. A changed FILE or other settings start over, as --restart does.

examples:
  %(prog)s corpus.txt
  %(prog)s articles.jsonl --field body --out articles.npy
  zcat corpus.gz | %(prog)s - --json

exit code: 0 all texts done, 1 some failed or the service stopped answering, 2 usage, 130 interrupted.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    file: str
    format: str | None
    field: str
    strict: bool
    url: str
    api_key: str | None = dataclasses.field(repr=False)
    model: str | None
    prompt_name: str | None
    ttl_s: int | None
    priority: str
    batch: int
    concurrency: int
    timeout_s: float
    patience_s: float
    out: Path | None
    dimensions: int | None
    state: Path | None
    restart: bool
    quiet: bool
    json: bool

    def request_fields(self) -> dict[str, Any]:
        """Returns all fields of a request except its texts.

        Without --out the vectors are not read, so only one component of each is asked for: the service computes and
        caches the whole vector whatever it sends back, and neither side spends time on digits.
        """
        dimensions = self.dimensions if self.out else 1
        given = {
            "model_id": self.model,
            "prompt_name": self.prompt_name,
            "cache_ttl_seconds": self.ttl_s,
            "dimensions": dimensions,
        }
        return {name: value for name, value in given.items() if value is not None}

    def identity(self) -> dict[str, Any]:
        """Returns what must be equal for a run to go on where another stopped."""
        out = str(self.out.resolve()) if self.out else None
        return self.request_fields() | {"url": self.url, "format": self.format, "field": self.field, "out": out}


def parse_arguments(arguments: Sequence[str] | None, *, program: str) -> Settings:
    parser = Parser(
        prog=program,
        description="Send the texts of FILE through the embedding service, so that its caches know them.",
        epilog=_EPILOG,
    )
    _add_input(parser)
    _add_service(parser)
    _add_result(parser)
    given = parser.parse_args(arguments)
    given.api_key = read_api_key(parser, given.api_key)
    settings = Settings(**vars(given))
    if settings.dimensions and not settings.out:
        parser.error("--dimensions shapes what --out writes: name --out too")
    if settings.file == "-" and settings.state:
        parser.error("standard input cannot be resumed: leave --state out, or name a file")
    written = [path.resolve() for path in (settings.out, settings.state) if path]
    if len({Path(settings.file).resolve(), *written}) <= len(written):
        parser.error("FILE, --out and --state must be different files")
    return settings


def _add_input(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("input")
    group.add_argument("file", metavar="FILE", help="texts, or - for standard input")
    group.add_argument("--format", choices=["text", "jsonl"], help="instead of detecting it")
    group.add_argument(
        "--field",
        default="text",
        metavar="NAME",
        help="the field of each JSON object that holds the text (default: %(default)s)",
    )
    group.add_argument("--strict", action="store_true", help="stop at the first text that fails")


def _add_service(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("service")
    group.add_argument(
        "--url", type=http_url, default="http://localhost:8888", help="the gateway (default: %(default)s)"
    )
    add_api_key(group)
    group.add_argument("--model", metavar="ID", help="a model of /models (default: the service's)")
    group.add_argument("--prompt-name", metavar="NAME", help="one of the model's own prompts")
    group.add_argument(
        "--ttl",
        dest="ttl_s",
        type=positive_count,
        metavar="SECONDS",
        help="lifetime in the cache (default: the service's)",
    )
    group.add_argument(
        "--priority",
        choices=["bulk", "interactive"],
        default="bulk",
        help="the lane of this load (default: %(default)s, which runs behind interactive requests)",
    )
    group.add_argument(
        "--batch", type=positive_count, default=32, metavar="N", help="texts in a request (default: %(default)s)"
    )
    group.add_argument(
        "--concurrency", type=positive_count, default=4, metavar="N", help="requests at a time (default: %(default)s)"
    )
    group.add_argument(
        "--timeout",
        dest="timeout_s",
        type=positive_seconds,
        default=60.0,
        metavar="S",
        help="limit for one request (default: 60)",
    )
    group.add_argument(
        "--patience",
        dest="patience_s",
        type=positive_seconds,
        default=120.0,
        metavar="S",
        help="how long a busy or absent service is tried again before the run stops (default: 120)",
    )


def _add_result(parser: ArgumentParser) -> None:
    group = parser.add_argument_group("result")
    group.add_argument("--out", type=_output, metavar="PATH", help="write the vectors: x.npy or x.jsonl")
    group.add_argument("--dimensions", type=positive_count, metavar="N", help="components to write (default: all)")
    group.add_argument("--state", type=Path, metavar="PATH", help="progress file (default: FILE.warm_cache.json)")
    group.add_argument("--restart", action="store_true", help="begin at the first line, whatever earlier runs did")
    group.add_argument("--quiet", action="store_true", help="no progress bar")
    group.add_argument("--json", action="store_true", help="print the final line as one JSON object")


def _output(text: str) -> Path:
    path = Path(text)
    if path.suffix not in OUTPUTS:
        raise ArgumentTypeError(f"{text!r} must end in {' or '.join(OUTPUTS)}")
    if not path.parent.is_dir() or path.is_dir():
        raise ArgumentTypeError(f"{text!r} is no place for a file")
    return path
