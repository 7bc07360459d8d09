"""The compiled CPU form: find or build the library that holds the C++ ops, once per process.

Owns compiler flags, the cache directory and the decision that this machine cannot have the compiled form. `python -m
promptmux_kernels.native` builds ahead of time; otherwise the first call does. Knows nothing of what the ops compute.
"""

from __future__ import annotations

import logging
from functools import cache

import torch

from promptmux_kernels.native.build import BuildError, capability, find_or_build

log = logging.getLogger(__name__)


@cache
def library_loaded() -> bool:
    """Load `torch.ops.promptmux_cpu`; False, said once in the log, where this machine cannot have it."""
    level = capability()
    if level is None:
        log.warning("CPU kernels: this CPU has no AVX2 with FMA; plain PyTorch is used instead")
        return False
    try:
        torch.ops.load_library(str(find_or_build(level)))
    except (BuildError, OSError) as error:
        log.warning("CPU kernels: %s; plain PyTorch is used instead", error)
        return False
    return True
