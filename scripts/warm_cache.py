#!/usr/bin/env python3
"""`embedding-warm` from a clone of the repository, in any folder: see embedding_service/tools/warm."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

try:
    from embedding_service.tools.warm.__main__ import command
except ModuleNotFoundError as missing:  # started with a Python that is not the project's
    sys.stderr.write(
        f"warm_cache.py: no module {missing.name} here: run it with the Python of the project's environment\n"
    )
    sys.exit(2)

if __name__ == "__main__":
    command("warm_cache.py")
