"""Two workers share two cores, so every worker computes on one thread; Triton kernels are interpreted on the CPU."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("RAYON_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel is defined, so before the first import

import torch

torch.set_num_threads(1)
