"""Searches: state machines that turn logits into hypotheses, one per request. They never see the model."""

from __future__ import annotations

from collections.abc import Sequence

from promptmux_server.backbone.config import BOS
from promptmux_server.engine.decoding.beam import BeamSearch
from promptmux_server.engine.decoding.candidates import CandidateScoring
from promptmux_server.engine.decoding.protocol import NonFiniteLogits, Search, Step
from promptmux_server.engine.decoding.sample import Sampling
from promptmux_server.engine.decoding.stream import TextStream
from promptmux_server.errors import InvalidParameter
from promptmux_server.tasks.decoding import DecodingParams
from promptmux_server.tasks.trie import Trie, trie_of

__all__ = ["NonFiniteLogits", "Search", "Step", "TextStream", "Trie", "make_search"]


def make_search(
    params: DecodingParams, *, candidates: tuple[tuple[int, ...], ...] | None = None, prefix: Sequence[int] = (BOS,)
) -> Search:
    """The search that `params` ask for; `candidates` are a closed answer set's token tuples, without eos.

    Raises InvalidParameter if the parameters need an answer set and the task has none.
    """
    if candidates is None and (params.method == "candidates" or params.constrained):
        name = "method" if params.method == "candidates" else "constrained"
        raise InvalidParameter("This task has no closed answer set to choose from.", param=f"decoding.{name}")
    if params.method == "candidates":
        assert candidates is not None
        return CandidateScoring(candidates)
    trie = trie_of(candidates) if params.constrained and candidates is not None else None
    if params.method == "sample":
        return Sampling(params, trie)
    return BeamSearch(params, trie, prefix)
