"""See :mod:`edgellm_cupy.bench.reporting.schema`."""

from __future__ import annotations

import sys
from pathlib import Path

from ....errors import EdgeLLMError
from . import check

_USAGE = "usage: python -m edgellm_cupy.bench.reporting.schema FILE..."


def main(files: list[str]) -> int:
    """Print what is wrong with each file; 0 nothing, 1 something, 2 wrong usage or a file that cannot be checked."""
    if not files:
        print(_USAGE, file=sys.stderr)
        return 2
    wrong = False
    try:
        for file in files:
            for fault in check(Path(file)):
                print(f"{file}: {fault}")
                wrong = True
    except EdgeLLMError as e:
        print(e, file=sys.stderr)
        return 2
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
