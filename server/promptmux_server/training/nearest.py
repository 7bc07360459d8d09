"""Which of many prompts lie nearest to a task: those from which its first steps learn best.

    d(c) = mean over s = 1 .. PROBES of the nll per target token of the task's batch s, under the prompt that s - 1
           steps of the task's own training have made of c

The first term is how well c does the task as it is, the others how fast its gradients lead towards it: a prompt that
writes other words may do badly at first and be two steps away. All candidates take their steps in shared passes. It is
the first rung of successive halving (Jamieson and Talwalkar 2016) over beginnings, in the place where prompt
transfer compares embeddings (Vu et al. 2022, section 3), which need a prompt of the new task to compare with.
"""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from promptmux_prompts import Prompt
from promptmux_server.errors import TrainingDiverged
from promptmux_server.training.cohort import Cohort
from promptmux_server.training.recipe import ComputeRecipe
from promptmux_server.training.run import Run

log = logging.getLogger(__name__)

PROBES = 4
"""Steps that every candidate takes."""
TOGETHER = 16
"""Candidates that are in memory at a time, with their optimisers."""

Probe = Callable[[Prompt], Run]
"""A run of `PROBES` steps that begins at a prompt, on the task's data from their beginning; named by its digest."""


@dataclass(frozen=True)
class Near:
    """A candidate, and how far it lies from the task: nats per token, less is nearer."""

    prompt: Prompt
    distance: float


def nearest(candidates: Iterable[Prompt], k: int, probe: Probe, compute: ComputeRecipe) -> list[Near]:
    """The `k` nearest, the nearest first; fewer if there are fewer. Raises what the task's data raise.

    Contents that stand under several names count once; who diverges is left out, with a word in the log.
    """
    best: list[Near] = []
    different = _different(candidates)
    while group := list(islice(different, TOGETHER)):
        best = heapq.nsmallest(k, [*best, *_probed(group, probe, compute)], key=lambda near: near.distance)
    return best


def _different(candidates: Iterable[Prompt]) -> Iterator[Prompt]:
    known = set[str]()
    for prompt in candidates:
        if prompt.digest not in known:
            known.add(prompt.digest)
            yield prompt


def _probed(group: Sequence[Prompt], probe: Probe, compute: ComputeRecipe) -> list[Near]:
    cohort = Cohort(compute)
    losses: dict[str, list[float]] = {prompt.digest: [] for prompt in group}
    for prompt in group:
        cohort.join(probe(prompt))
    while cohort.runs:
        advance = cohort.advance()
        for report in advance.steps:
            losses[report.run].append(report.nll)
        for failure in advance.failed:
            if not isinstance(failure.error, TrainingDiverged):
                raise failure.error
            log.warning("A prompt is left out as a beginning: %s", failure.error.message)
            del losses[failure.run.name]
    return [Near(prompt, sum(losses[prompt.digest]) / PROBES) for prompt in group if prompt.digest in losses]
