"""Where a benchmark's result goes: one line of JSON to the terminal, and to the end of the file `BENCH_OUT` if set."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path


def write_line(result: Mapping[str, object]) -> None:
    line = json.dumps(result)
    print(line, flush=True)
    if path := os.environ.get("BENCH_OUT"):
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(line + "\n")
