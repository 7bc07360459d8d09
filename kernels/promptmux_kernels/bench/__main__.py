"""`python -m promptmux_kernels.bench`: compile every kernel for every target; print the document, then what it misses."""

from __future__ import annotations

import sys

from promptmux_kernels.bench import bars

targets = sys.argv[1:] or list(bars.TARGETS)
entries = list(bars.compile_all(targets))
sys.stdout.write(bars.document(entries))
missed = [f"{e.where} {e.case.name} {e.head_dim} {e.element}: {fault}" for e in entries for fault in bars.faults(e)]
sys.exit("\n".join(missed))
