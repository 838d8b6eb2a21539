"""From a `.cu` file to one text without includes of our own.

CuPy's disk cache and NVRTC's program name do not see what `#include` pulls in, so an edited header would silently
reuse an old binary. The headers of kernels_cu/include are therefore expanded here, each once a translation unit, with
`#line` directives so that compile errors still name the right file and line. System includes stay.
"""

from __future__ import annotations

import re
from functools import cache
from importlib.resources import files

_INCLUDE = re.compile(r'^\s*#include\s+"([\w.]+)"')


@cache
def expand(file: str) -> str:
    """The text of kernels_cu/`file` with its own headers expanded.

    Raises:
        FileNotFoundError: no such kernel file, or a header that it names is missing.
    """
    return "".join(_expand(file, set()))


def _expand(file: str, seen: set[str]) -> list[str]:
    root = files("edgellm_cupy.kernels_cu")
    resource = root / "include" / file if file.endswith(".cuh") else root / file
    lines = [f'#line 1 "{file}"\n']
    for number, line in enumerate(resource.read_text(encoding="utf-8").splitlines(), start=1):
        if match := _INCLUDE.match(line):
            if match[1] not in seen:
                seen.add(match[1])
                lines += _expand(match[1], seen)
                lines.append(f'#line {number + 1} "{file}"\n')
            else:
                lines.append("\n")
        elif line.strip() == "#pragma once":
            lines.append("\n")
        else:
            lines.append(line + "\n")
    return lines
