"""One training run: a method's parameters with their optimiser, schedule, chance and place in the data.

Owns when a step is complete and what it does; how its rows are computed, alone or among others, is `cohort`'s business.
A run's whole state is tensors and JSON values (`RunState`), and what follows from it is the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from promptmux_server.errors import TrainingDiverged
from promptmux_server.training.batch import Batches, Cursor, TrainingBatch
from promptmux_server.training.chance import Chance
from promptmux_server.training.loss import NO_LOSS, Loss, LossNumbers, label_smoothed_loss
from promptmux_server.training.methods.method import Method
from promptmux_server.training.ranks import ALONE, Ranks
from promptmux_server.training.recipe import StepRecipe

BETAS = (0.9, 0.999)
EPSILON = 1e-8

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""What the optimiser remembers of a parameter, under its own names."""


@dataclass(frozen=True)
class RunState:
    """A run between two steps. Tensors are copies; `numbers` is a JSON object."""

    tensors: dict[str, Tensor]
    numbers: dict[str, Cursor]

    def kind(self, kind: str) -> dict[str, Tensor]:
        """By parameter's name: "parameter", "average", or one of MOMENTS; empty if the run had none of that kind."""
        prefix = f"{kind}/"
        return {key.removeprefix(prefix): value for key, value in self.tensors.items() if key.startswith(prefix)}

    def values(self) -> dict[str, Tensor]:
        """What the run had learned and was scored as, whatever its recipe is now: see `Run.values`."""
        return self.kind("average") or self.kind("parameter")


@dataclass(frozen=True)
class StepReport:
    """What one step did; `step` counts from 1, `loss` and `nll` are means over the tokens learned from."""

    run: str
    step: int
    loss: float
    nll: float
    tokens: int
    learning_rate: float
    gradient_norm: float


@dataclass(frozen=True)
class Part:
    """A run's share of one pass: a batch, and what is drawn for it."""

    batch: TrainingBatch
    chance: Chance


@dataclass
class _Underway:
    """A step whose batches are being taken: where the next one lies, how many were taken, their losses so far."""

    ahead: Cursor
    parts: int = 0
    sums: LossNumbers = NO_LOSS


class Run:
    """Parameters under training, and all that decides what the next step makes of them."""

    def __init__(self, name: str, method: Method, recipe: StepRecipe, data: Batches, ranks: Ranks = ALONE) -> None:
        """With `ranks` of several processes, `data` are this one's share of the rows."""
        self.name, self.method, self.recipe, self.step = name, method, recipe, 0
        self._data, self._ranks = data, ranks
        self._cursor: Cursor = None
        self._optimizer = torch.optim.AdamW(
            method.parameters.values(), recipe.learning_rate, BETAS, EPSILON, recipe.weight_decay
        )
        self._average = {} if recipe.average_decay is None else _copies(method.parameters)
        self._underway = _Underway(None)

    @property
    def finished(self) -> bool:
        return self.step >= self.recipe.steps

    def values(self) -> dict[str, Tensor]:
        """What has been learned: the moving average if the recipe asks for one, else the parameters."""
        return self._average or {name: parameter.detach() for name, parameter in self.method.parameters.items()}

    def saved(self) -> dict[str, Tensor]:
        """What a file of the adaptation holds now."""
        return self.method.saved(self.values())

    def take(self) -> Part:
        """The next batch of the step under way."""
        underway = self._underway
        batch, underway.ahead = self._data.take(underway.ahead)
        chance = Chance(self.recipe.seed, self.step, underway.parts, self._ranks.number, self._ranks.count)
        part = Part(batch, chance)
        underway.parts += 1
        return part

    def loss(self, logits: Tensor, targets: Tensor, batch: TrainingBatch) -> Loss:
        """The loss of this run's own rows."""
        allowed, confidence = batch.allowed(logits.shape[1]), batch.confidence()
        return label_smoothed_loss(
            logits,
            targets,
            smoothing=self.recipe.smoothing,
            allowed=None if allowed is None else allowed.to(logits.device),
            confidence=None if confidence is None else confidence.to(logits.device),
            drop_worst=self.recipe.dropped(self.step),
        )

    def absorb(self, loss: LossNumbers) -> StepReport | None:
        """Count a batch whose gradient has been added; with the step's last one, take the step and report it.

        Raises TrainingDiverged, and leaves the parameters as they were, where loss or gradient is not finite.
        """
        loss = self._ranks.add_losses(loss)
        if not math.isfinite(loss.total):
            raise TrainingDiverged(self.name, self.step + 1, "loss")
        self._underway.sums = sums = self._underway.sums.plus(loss)
        if self._underway.parts < self.recipe.accumulation:
            return None
        parameters = list(self.method.parameters.values())
        self._ranks.add_gradients(parameters)
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.div_(sums.tokens)
        norm = float(nn.utils.clip_grad_norm_(parameters, self.recipe.clip_norm))
        if not math.isfinite(norm):
            raise TrainingDiverged(self.name, self.step + 1, "gradient")
        return self._take_step(sums, norm)

    def _take_step(self, sums: LossNumbers, norm: float) -> StepReport:
        rate = self.recipe.rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._optimizer.step()
        for name, average in self._average.items():
            average.lerp_(self.method.parameters[name].detach(), 1.0 - (self.recipe.average_decay or 0.0))
        self.step += 1
        report = StepReport(
            self.name, self.step, sums.total / sums.tokens, sums.nll / sums.tokens, sums.tokens, rate, norm
        )
        self._cursor = self._underway.ahead
        self.rewind()
        return report

    def rewind(self) -> None:
        """Stand behind the last whole step, whatever was done of the next one."""
        self._underway = _Underway(self._cursor)
        self._optimizer.zero_grad(set_to_none=True)

    def state(self) -> RunState:
        """The run behind its last whole step."""
        tensors = {f"parameter/{name}": value for name, value in _copies(self.method.parameters).items()}
        tensors |= {f"average/{name}": value.clone() for name, value in self._average.items()}
        for name, parameter in self.method.parameters.items():
            for moment, value in self._optimizer.state.get(parameter, {}).items():
                tensors[f"{moment}/{name}"] = value.clone()
        return RunState(tensors, {"step": self.step, "cursor": self._cursor})

    @torch.no_grad()
    def restore(self, state: RunState) -> None:
        """Go on from a state of a run with the same method and data, be it of another recipe.

        An average that the other recipe did not ask for begins at the parameters.
        """
        parameters, moments = state.kind("parameter"), {kind: state.kind(kind) for kind in MOMENTS}
        for name, parameter in self.method.parameters.items():
            parameter.copy_(parameters[name])
            # The optimiser counts its steps on the host, wherever the parameter is.
            self._optimizer.state[parameter] = {
                kind: moments[kind][name].to("cpu" if kind == "step" else parameter.device, copy=True)
                for kind in MOMENTS
                if name in moments[kind]
            }
        averages = state.kind("average") or parameters
        for name, average in self._average.items():
            average.copy_(averages[name])
        step = state.numbers["step"]
        assert isinstance(step, int)
        self.step, self._cursor = step, state.numbers["cursor"]
        self.rewind()


def _copies(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}
