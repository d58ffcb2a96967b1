"""`python -m ml_base.prepare`: convert and test the models of this environment, so that a replica starts in seconds.

For image builds, and before the first start on a machine: what is slow is done once, and kept in ML_BASE_CACHE_DIR.
"""

from __future__ import annotations

import logging
import sys

from ml_base import wiring
from ml_base.config import ConfigError, read_environment
from ml_base.models.loading import ModelUnavailableError


def main() -> None:
    try:
        settings = read_environment()
    except ConfigError as wrong:
        sys.exit(f"ml-base: {wrong}")
    logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    try:
        sources = wiring.resolve_all(settings)
        load = wiring.loader(settings, wiring.set_up(settings, sources))
        for source in sources:
            load(source)
    except ModelUnavailableError as trouble:
        sys.exit(f"ml-base: {trouble}")


if __name__ == "__main__":
    main()
