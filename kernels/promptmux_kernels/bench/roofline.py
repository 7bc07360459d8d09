"""What the ops cost on paper: FLOPs and bytes from shapes, and the least time in which a device can do them.

Counts assume what the kernels do: nothing padded, prompts and cross-attention keys read once per request whatever the
beams, one bias table per image grid and layer for the whole batch. Knows no tensor.
"""

from __future__ import annotations

from dataclasses import dataclass

ELEMENT_BYTES = 2
"""bfloat16 weights and activations, float16 bias tables."""


@dataclass(frozen=True)
class Machine:
    name: str
    flops_per_second: float
    bytes_per_second: float

    def floor_us(self, cost: Cost) -> float:
        return max(cost.flops / self.flops_per_second, cost.bytes / self.bytes_per_second) * 1e6


H100 = Machine("H100", 798e12, 3.0e12)
"""Rates measured with dense bfloat16 products and copies."""


@dataclass(frozen=True)
class Model:
    """An OFA size; the vision stem is counted once per picture of 480 px."""

    name: str
    d_model: int
    heads: int
    layers: int
    """Encoder layers; the decoder has as many."""
    ffn_dim: int
    stem_flops: float
    stem_parameters: float
    vocab_size: int = 59457
    image_features: int = 1024


BASE = Model("OFA-base", 768, 12, 6, 3072, 64.195e9, 27.5e6)
LARGE = Model("OFA-large", 1024, 16, 12, 4096, 98.287e9, 43.1e6)


@dataclass(frozen=True)
class Load:
    """One kind of request: picture patches, text tokens, prompt positions, beams, steps."""

    patches: int = 900
    text: int = 30
    prompt: int = 64
    beams: int = 5
    steps: int = 16

    @property
    def tokens(self) -> int:
        return self.patches + self.text


@dataclass(frozen=True)
class Cost:
    """Of one op over all layers and a whole batch."""

    op: str
    flops: float
    bytes: float


def prefill(model: Model, load: Load, batch: int) -> list[Cost]:
    """Picture and text to cross-attention keys, op by op."""
    d, layers, n, p = model.d_model, model.layers, load.tokens, load.prompt
    tokens = batch * n

    def linear(op: str, inputs: int, outputs: int, rows: int, times: int) -> Cost:
        weights, activations = inputs * outputs, rows * (inputs + outputs)
        return Cost(op, times * 2.0 * rows * weights, times * (weights + activations) * ELEMENT_BYTES)

    bias = model.heads * n * n
    heads = batch * (4 * n + 2 * p) * d  # q, k, v in, the result out, the prompt's K and V
    stem = (model.stem_parameters + batch * load.patches * model.image_features) * ELEMENT_BYTES
    return [
        Cost("vision stem", batch * model.stem_flops, stem),
        linear("image projection", model.image_features, d, batch * load.patches, 1),
        linear("QKV", d, 3 * d, tokens, layers),
        Cost("prefix_attention", layers * 4.0 * batch * n * (n + p) * d, layers * (bias + heads) * ELEMENT_BYTES),
        linear("attention out", d, d, tokens, layers),
        _norms("norm_add_norm", 4, tokens * d, layers),
        linear("FFN up", d, model.ffn_dim, tokens, layers),
        _norms("gelu_norm", 2, tokens * model.ffn_dim, layers),
        linear("FFN down", model.ffn_dim, d, tokens, layers),
        linear("cross K/V", d, 2 * d, tokens, layers),
    ]


def decode_step(model: Model, load: Load, batch: int) -> list[Cost]:
    """One token of every beam at the middle of the answer, op by op."""
    d, layers, rows = model.d_model, model.layers, batch * load.beams
    history = load.steps / 2

    def linear(op: str, parameters: float) -> Cost:
        return Cost(op, 2.0 * rows * parameters, parameters * ELEMENT_BYTES)

    own = batch * layers * 2 * d * (load.prompt + load.beams * history)
    cross = batch * layers * 2 * d * load.tokens
    bias = model.heads * load.tokens * 4  # one line of one float32 table for all layers and beams
    return [
        linear("linears", layers * (6 * d * d + 2 * d * model.ffn_dim)),
        Cost(
            "prefix_decode_attention",
            layers * 4.0 * rows * (load.prompt + history) * d,
            own * ELEMENT_BYTES,
        ),
        Cost("cross_decode_attention", layers * 4.0 * rows * load.tokens * d, cross * ELEMENT_BYTES + bias),
        _norms("norm_add_norm", 4, rows * d, 2 * layers),
        _norms("gelu_norm", 2, rows * model.ffn_dim, layers),
        Cost("write_cache", 0.0, layers * 4 * rows * d * ELEMENT_BYTES),
        linear("vocabulary", model.vocab_size * d),
    ]


def _norms(op: str, passes: int, elements: int, times: int) -> Cost:
    """About ten FLOPs an element: bytes decide."""
    return Cost(op, times * 10.0 * elements, times * passes * elements * ELEMENT_BYTES)


@dataclass(frozen=True)
class Line:
    """A row of the printed table."""

    model: str
    phase: str
    batch: int
    op: str
    gflop: float
    megabytes: float
    floor_us: float

    @property
    def floor_us_per_request(self) -> float:
        return self.floor_us / self.batch


def table(machine: Machine = H100, load: Load | None = None, batches: tuple[int, ...] = (1, 8, 32)) -> list[Line]:
    """Every op of both phases and sizes; a step is one of `load.steps`."""
    load = load or Load()
    return [
        Line(model.name, phase, batch, cost.op, cost.flops / 1e9, cost.bytes / 1e6, machine.floor_us(cost))
        for model in (BASE, LARGE)
        for batch in batches
        for phase, costs in (("prefill", prefill), ("step", decode_step))
        for cost in costs(model, load, batch)
    ]
