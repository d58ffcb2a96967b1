"""`python -m ml_base.prepare`: convert and test the models of this environment, so that a replica starts in seconds.

It is for image builds, and for a machine before its first start: what is slow is done once, and kept in
ML_BASE_CACHE_DIR.
"""

from __future__ import annotations

from embedding_common import command_line
from ml_base.__main__ import PROGRAM, start


def main() -> None:
    """Exits with 2 and one line for each wrong variable, or with 1 and one line if a model cannot be had."""
    settings = start(
        "python -m ml_base.prepare", "Converts and tests the models of ML_BASE_MODELS, so that a replica starts fast."
    )
    from ml_base import wiring  # noqa: PLC0415 - takes a second: a mistake or --help is answered without it
    from ml_base.models.loading import ModelUnavailableError  # noqa: PLC0415 - likewise

    try:
        sources = wiring.resolve_all(settings)
        load = wiring.loader(settings, wiring.set_up(settings, sources))
        for source in sources:
            load(source)
    except ModelUnavailableError as reason:
        command_line.end(PROGRAM, command_line.EXIT_FAILED, reason)


if __name__ == "__main__":
    main()
