"""A job of several processes, as those do it that do not lead: they pass their rows, and write no file.

The leader runs the `Job`, and hands out where it stands; from there on all take the same steps, because each of them is
made of the same sums.
"""

from __future__ import annotations

import json
from collections.abc import Callable

from safetensors.torch import load as parse_tensors
from safetensors.torch import save as serialise_tensors

from promptmux_server.training.cohort import Cohort
from promptmux_server.training.job_config import JobConfig
from promptmux_server.training.job_parts import method_of
from promptmux_server.training.material import Material
from promptmux_server.training.ranks import Ranks
from promptmux_server.training.run import Run, RunState
from promptmux_server.training.validation import OpenBackbone


def share_state(ranks: Ranks, state: RunState) -> RunState:
    """The leader's state, whatever the others bring; raises PeerLost."""
    tensors = {name: tensor.cpu().contiguous() for name, tensor in state.tensors.items()}
    handed = parse_tensors(ranks.hand_out(serialise_tensors(tensors)))
    return RunState(handed, json.loads(ranks.hand_out(json.dumps(state.numbers).encode())))


def follow(config: JobConfig, backbone: OpenBackbone, ranks: Ranks, stop: Callable[[], bool] = lambda: False) -> Run:
    """Learn beside the leader, until its end or until any process is told to stop; answers where the run stands.

    Raises PeerLost, TrainingConfigError, DataError, and whatever the run fails of.
    """
    with Material(config, backbone, ranks) as material:
        run = material.start(config.task.name, method_of(config, backbone), config.steps)
        run.restore(share_state(ranks, run.state()))
        cohort = Cohort(config.compute)
        if not run.finished:
            cohort.join(run)
        while cohort.runs:
            advance = cohort.advance()
            for failure in advance.failed:
                raise failure.error
            if advance.steps and ranks.agree(stop()) and not run.finished:
                ranks.agree(True)  # the leader has kept its checkpoint
                break
    return run
