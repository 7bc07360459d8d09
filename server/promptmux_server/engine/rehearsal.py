"""A prompt's rehearsal before it is served: does it make a difference, and does it answer its canaries as expected?

It plays from pools of its own and in batches of its own, so that it takes no page, no memory and no product from
requests; one pass of the model at a time, for whoever owns the model to fit in between its own. Shapes cannot tell an
encoder's prompt from a decoder's, nor a prompt that is read from one that is not: numbers can.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from promptmux_prompts import Canary, Prompt
from promptmux_server.backbone.config import EOS
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.engine.decoding import NonFiniteLogits, Search, Step, make_search
from promptmux_server.engine.decoding.protocol import check_finite
from promptmux_server.engine.prompt_table import NO_PROMPT, Pages, PromptPools, Residence, pool_bytes
from promptmux_server.engine.runner import Work, closed_batch
from promptmux_server.engine.scenes import Fits, Scene, canaries, greedy, question
from promptmux_server.errors import CanaryFailed, PromptNonfinite
from promptmux_server.tasks import TaskSpec
from promptmux_server.tasks.decoding import Hypothesis, Outcome

NEAR_PLACES = 0.02
"""Of a picture's side, by which places of a canary may differ: two of 128 bins, twenty of 1,000."""
SHOWN_TOKENS = 32
"""Of either side of a difference that is reported."""

Passes = Generator[None, None, None]
"""Each step is one pass of the model."""


class Rehearsal:
    """One prompt's. Making it prepares its inputs, on any thread; what its generators do belongs on the model's."""

    def __init__(
        self, model: OFA, tokenizer: Tokenizer, prompt: Prompt, spec: TaskSpec, fits: Fits = lambda slots, tokens: True
    ) -> None:
        """Raises PromptRefused for a task that could not be asked its canaries, or anything."""
        self._model, self._prompt, self._params = model, prompt, greedy(spec)
        self._question, self._canaries = question(spec, tokenizer, fits), canaries(spec, tokenizer, fits)
        need = Pages.of(prompt.encoder_key.shape[2], prompt.decoder_key.shape[2])
        self._budget = pool_bytes(model.config, model.dtype, max(need.encoder, need.decoder))

    def passes(self) -> Passes:
        """The whole of it; raises CanaryFailed, PromptNonfinite, or what the device raises."""
        pools, home = self._own_pools()
        if home != NO_PROMPT:
            yield from self._check_effect(pools, home)
        for index, scene in enumerate(self._canaries):
            got = (yield from self._written(scene, pools, home)).tokens
            if not self._alike(got, scene.expected):
                raise _differs(index, scene.expected, got)

    def _alike(self, got: tuple[int, ...], expected: tuple[int, ...]) -> bool:
        """Whether the same was written. Places may lie a little apart: between neighbouring bins the publisher's
        element type and product form decide, not the prompt."""
        first, most = self._model.config.first_bin_id, NEAR_PLACES * (self._model.config.num_bins - 1)
        same = (a == b or (min(a, b) >= first and abs(a - b) <= most) for a, b in zip(got, expected, strict=False))
        return len(got) == len(expected) and all(same)

    def written(self) -> list[Hypothesis]:
        """What the model writes for each canary's input, whatever was expected; on this thread, at once."""
        pools, home = self._own_pools()
        return [_finished(self._written(scene, pools, home)) for scene in self._canaries]

    def _own_pools(self) -> tuple[PromptPools, Residence]:
        pools = PromptPools(self._model.config, self._model.dtype, self._model.device, self._budget)
        return pools, pools.store(self._prompt)

    def _check_effect(self, pools: PromptPools, home: Residence) -> Passes:
        """With and without the prompt, in products of the same shape: what differs is the prompt's doing."""
        with_it, without = _FirstLogits(), _FirstLogits()
        yield from self._run(self._question, with_it, pools, home)
        yield from self._run(self._question, without, pools, NO_PROMPT)
        difference = float((with_it.logits - without.logits).abs().max())
        if difference <= torch.finfo(self._model.dtype).eps * float(without.logits.abs().max()):
            message = "The prompt makes no difference: the backbone says the same without it."
            raise CanaryFailed(message, details={"reason": "no_effect"})

    def _written(self, scene: Scene, pools: PromptPools, home: Residence) -> Generator[None, None, Hypothesis]:
        search = make_search(self._params, prefix=scene.item.prefix_ids)
        yield from self._run(scene, search, pools, home)
        return search.outcome().hypotheses[0]

    def _run(self, scene: Scene, search: Search, pools: PromptPools, home: Residence) -> Passes:
        """One search, from the picture to its end."""
        image = None
        if scene.pixels is not None:
            [image] = self._model.image_tokens(scene.pixels[None])
            yield
        work = Work(scene.item.source_ids, scene.item.prefix_ids, image, search, alone=True)
        batch = closed_batch(self._model, [work], pools.batch([home]))
        while batch.live_rows:
            yield
            batch.step()
        for error in batch.take_failed().values():
            if isinstance(error, NonFiniteLogits):
                raise PromptNonfinite("With this prompt the backbone's numbers are not finite.") from error
            raise error
        yield


class _FirstLogits:
    """A search that only looks at the logits (1, V) behind the decoder's prefix."""

    width, most_tokens, tokens = 1, 0, None

    def __init__(self) -> None:
        self.logits = torch.empty(0)

    def advance(self, logits: Tensor) -> Step | None:
        check_finite(logits)
        self.logits = logits
        return None

    def outcome(self) -> Outcome:
        return Outcome(())


def record_canaries(
    model: OFA, tokenizer: Tokenizer, prompt: Prompt, inputs: Sequence[Mapping[str, str]], most: int | None = None
) -> Prompt:
    """The prompt with canaries: inputs of `text`, `premise` and `image`, and what the model writes for them now.

    With `most` only so many, those whose least likely token is likeliest: where two answers are almost as good as each
    other, a server with another element type may give the other one. For publishers. Manifest and digest are new: it is
    another version than the prompt without them.
    """
    asked = replace(prompt.manifest, canary=tuple(Canary(tokens=(EOS,), **given) for given in inputs))
    with torch.no_grad():
        written = Rehearsal(model, tokenizer, prompt, TaskSpec.from_manifest(asked, model.config)).written()
    found = list(zip(written, inputs, strict=True))
    if most is not None:
        found = sorted(found, key=lambda each: -min(each[0].positional_scores))[:most]
    told = tuple(Canary(tokens=hypothesis.tokens, **given) for hypothesis, given in found)
    sides = (prompt.encoder_key, prompt.encoder_value, prompt.decoder_key, prompt.decoder_value)
    return Prompt.build(replace(asked, canary=told), *sides)


def _finished(run: Generator[None, None, Hypothesis]) -> Hypothesis:
    while True:
        try:
            next(run)
        except StopIteration as end:
            result: Hypothesis = end.value
            return result


def _differs(index: int, expected: tuple[int, ...], got: tuple[int, ...]) -> CanaryFailed:
    return CanaryFailed(
        f"Canary {index} is answered otherwise than its publisher saw; `details` holds both token lists.",
        details={"index": index, "expected": list(expected[:SHOWN_TOKENS]), "got": list(got[:SHOWN_TOKENS])},
    )
