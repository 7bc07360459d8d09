"""The CPU path's measurements: every op and stage, beside the machine's own rates and the released form.

Owns what is compared with what, and the targets. All ratios are within one run and one element type: bfloat16 where the
CPU multiplies it, float32 elsewhere, or as asked.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from promptmux_kernels import Rows, SharedBias, gelu_norm, norm_add_norm, prefix_attention, use_form
from promptmux_server.backbone.config import BackboneConfig
from promptmux_server.backbone.encoder import EncoderOutput, EncoderRow, ImageTokens
from promptmux_server.bench import workload as w
from promptmux_server.bench.clock import Timing, measure, sample
from promptmux_server.bench.released import ReleasedForm

GEMM_SIDE = 2048
STREAM_BYTES = 512 << 20
"""Read at once to measure bandwidth: beyond any cache."""


@dataclass(frozen=True)
class Row:
    """One line of the table: `gflops` counts useful arithmetic, ratios are released / ours."""

    op: str
    ms: float
    clean: bool
    gflops: float | None = None
    share_of_gemm: float | None = None
    ratio_tuned: float | None = None
    ratio_shipped: float | None = None
    error: float | None = None
    target: str = ""
    met: bool | None = None


@dataclass(frozen=True)
class Released:
    """Seconds of the released form, under one allocator: one layer's attention, the encoder, a batch of captions."""

    attention: Timing
    encoder: Timing
    captions: Timing


class CpuBench:
    """Measures one configuration; `quick` takes one sample of each, for a test that it runs at all."""

    def __init__(
        self,
        config: BackboneConfig,
        dtype: torch.dtype,
        *,
        batch: int = 8,
        pixels: int = w.IMAGE_PX,
        quick: bool = False,
    ) -> None:
        self.config, self.dtype, self._batch, self._quick = config, dtype, batch, quick
        self._models = w.build_models(config, dtype)
        self._pixels = w.pictures(config, batch, dtype, pixels)
        self._lengths = w.repeated(w.PROMPT_LENGTHS, batch)

    @cached_property
    def _images(self) -> list[ImageTokens]:
        return self._models.packed.image_tokens(self._pixels)

    @cached_property
    def _rows(self) -> list[EncoderRow]:
        return w.encoder_rows(self.config, self._images, self._batch)

    @cached_property
    def _row_lengths(self) -> list[int]:
        return [len(row.source) + row.grid[0] * row.grid[1] for row in self._rows]

    @cached_property
    def _encoded(self) -> EncoderOutput:
        return self._models.packed.encode(self._rows, w.prompt_batch(self.config, self._lengths, self.dtype))

    @cached_property
    def gemm_gflops(self) -> float:
        """G: the rate of one square product in this element type."""
        x, y = (torch.randn(GEMM_SIDE, GEMM_SIDE).to(self.dtype) for _ in range(2))
        return 2 * GEMM_SIDE**3 / self._time(lambda: torch.nn.functional.linear(x, y)).seconds / 1e9

    @cached_property
    def bandwidth_gbs(self) -> float:
        """How fast all threads together read memory."""
        data = torch.ones(STREAM_BYTES // 4)
        return STREAM_BYTES / self._time(data.sum).seconds / 1e9

    def released(self) -> Released:
        """The released form under this process's allocator."""
        form = self._released_form()
        encoder = self._time(lambda: form.encode(self._rows), samples=3)
        captions = self._time(self._released_captions(form), samples=2)
        return Released(self._time(self._released_attention(form)), encoder, captions)

    def rows(self, tuned: Released, shipped: Released | None) -> Iterator[Row]:
        """Every line of the table, measured as it is asked for."""
        yield self._attention(tuned, shipped)
        yield from self._elementwise()
        stem, encoder, memory = self._stem(), self._encoder(tuned, shipped), self._memory()
        yield from (stem, encoder, memory, self._prefill(stem, encoder, memory))
        yield self._one_prompt(encoder)
        for batch in (1, 32):
            yield self._step(batch)
        yield self._captions(tuned, shipped)

    # -- ops ------------------------------------------------------------------------------------------------------

    def _attention(self, tuned: Released, shipped: Released | None) -> Row:
        q, k, v, bias = self._attention_inputs()
        prompts = w.prompt_batch(self.config, self._lengths, self.dtype).layer(0)
        layout = Rows.packed(self._row_lengths)

        def attend(parts: Sequence[Tensor] = (q, k, v)) -> Tensor:
            return prefix_attention(
                *parts,
                rows=layout,
                prompts=prompts,
                bias=bias,
                scale=self._models.packed.encoder.scale,
                head_scale=torch.ones(self.config.heads),
                causal=False,
            )[0]

        timing = self._time(attend)
        with use_form("reference"):
            expected = attend([x.float() for x in (q, k, v)])
        error = (attend().float() - expected).abs().max()
        flops = w.attention_flops(self.config, self._row_lengths, self._lengths)
        row = self._row("attention, one encoder layer", timing, flops, error=float(error))
        return self._compared(
            row, tuned.attention, shipped.attention if shipped else None, least=5.0, least_shipped=12.0
        )

    def _elementwise(self) -> Iterator[Row]:
        d, tokens = self.config.d_model, sum(self._row_lengths)
        x, y, wide = (torch.randn(tokens, n).to(self.dtype) for n in (d, d, self.config.ffn_dim))
        affine, wide_affine = (
            (torch.ones(n, dtype=self.dtype), torch.zeros(n, dtype=self.dtype)) for n in (d, self.config.ffn_dim)
        )
        calls: dict[str, Callable[[], object]] = {
            "norm + add + norm": lambda: norm_add_norm(x, y, affine, affine, 1e-5),
            "GELU + norm": lambda: gelu_norm(wide, wide_affine, 1e-5),
        }
        for name, call in calls.items():
            ours = self._time(call)
            with use_form("batched"):
                plain = self._time(call)
            yield Row(name, ours.seconds * 1e3, ours.clean, ratio_tuned=plain.seconds / ours.seconds)

    # -- stages of a request --------------------------------------------------------------------------------------

    def _stem(self) -> Row:
        timing = self._time(lambda: self._models.packed.image_tokens(self._pixels), samples=3)
        row = self._row("stem and image projection", timing, w.image_flops(self._models.packed, self._pixels))
        return replace(row, target=">= 0.75 G", met=(row.share_of_gemm or 0.0) >= 0.75)

    def _encoder(self, tuned: Released, shipped: Released | None) -> Row:
        prompts = w.prompt_batch(self.config, self._lengths, self.dtype)
        timing = self._time(lambda: self._models.packed.encode(self._rows, prompts), samples=3)
        states, padding = self._released_form().encode(self._rows)
        expected = torch.cat([state[~hidden] for state, hidden in zip(states, padding, strict=True)]).float()
        error = (self._encoded.states.float() - expected).abs().max() / expected.abs().max()
        flops = w.encoder_flops(self.config, self._row_lengths, self._lengths)
        row = self._row("encoder without stem", timing, flops, error=float(error))
        row = self._compared(row, tuned.encoder, shipped.encoder if shipped else None)
        if self.dtype == torch.float32:
            return replace(row, target=">= 1.6x released", met=(row.ratio_tuned or 0.0) >= 1.6)
        return replace(row, target=">= 0.70 G", met=(row.share_of_gemm or 0.0) >= 0.70)

    def _memory(self) -> Row:
        timing = self._time(lambda: self._models.packed.remember(self._encoded), samples=3)
        return self._row("cross K/V and packing", timing, w.memory_flops(self.config, self._row_lengths))

    def _prefill(self, *parts: Row) -> Row:
        """The three stages' sum: they run one after another."""
        ms = sum(part.ms for part in parts)
        flops = sum(part.ms * (part.gflops or 0.0) * 1e6 for part in parts)
        row = self._row("prefill, per request", Timing(ms / 1e3, 0, all(part.clean for part in parts)), flops)
        over = 1.0 / (row.share_of_gemm or 1.0)
        return replace(row, ms=ms / self._batch, target=f"<= 1.25x floor ({over:.2f}x)", met=over <= 1.25)

    def _one_prompt(self, mixed: Row) -> Row:
        """The same rows, all with one prompt; as much arithmetic as the mixture has, to within 3 %."""
        length = round(sum(self._lengths) / len(self._lengths))
        lengths = [length] * self._batch
        prompts = w.prompt_batch(self.config, lengths, self.dtype)
        timing = self._time(lambda: self._models.packed.encode(self._rows, prompts), samples=3)
        row = self._row("encoder, one prompt for all", timing, w.encoder_flops(self.config, self._row_lengths, lengths))
        slower = (row.gflops or 0.0) / (mixed.gflops or 1.0) - 1.0
        return replace(row, target=f"mixed <= 3 % slower ({100 * slower:+.1f} %)", met=slower <= 0.03)

    def _step(self, batch: int) -> Row:
        """A decoding step with the search: decoder, vocabulary, beams' bookkeeping."""
        rows = w.encoder_rows(self.config, self._images, batch)
        running = w.caption_batch(self._models.packed, rows, w.repeated(w.PROMPT_LENGTHS, batch))
        running.step()
        timing = sample((running.step for _ in range(w.STEPS - 3)), samples=1 if self._quick else w.STEPS - 3)
        floor_s = w.step_bytes(self.config, self.dtype) / self.bandwidth_gbs / 1e9
        times = timing.seconds / floor_s
        row = Row(f"decode step, beam 5, batch {batch}, per request", timing.seconds * 1e3 / batch, timing.clean)
        note = f"({times:.2f}x weights / bandwidth)"
        if batch > 1:
            return replace(row, target=note)
        return replace(row, target=f"<= 1.6x {note}", met=times <= 1.6)

    def _captions(self, tuned: Released, shipped: Released | None) -> Row:
        """Whole requests, pixels to beams."""

        def answer() -> None:
            images = self._models.packed.image_tokens(self._pixels)
            rows = w.encoder_rows(self.config, images, self._batch)
            running = w.caption_batch(self._models.packed, rows, self._lengths)
            while running.live_rows:
                running.step()

        timing = self._time(answer, samples=2)
        row = Row("caption request, 16 steps, per request", timing.seconds * 1e3 / self._batch, timing.clean)
        return self._compared(row, tuned.captions, shipped.captions if shipped else None, least=3.5, per=self._batch)

    # -- the released form ----------------------------------------------------------------------------------------

    def _released_form(self) -> ReleasedForm:
        kinds = sorted(set(self._lengths))
        pairs = w.prompt_pairs(self.config, self._lengths, self.dtype)
        return ReleasedForm(self._models.plain, [pairs[kinds.index(n)] for n in self._lengths])

    def _released_attention(self, form: ReleasedForm) -> Callable[[], object]:
        _, padding = form.embed(self._rows)
        absolute = form.absolute_bias(self._rows)
        shape = (*padding.shape, self.config.heads, self.config.head_dim)
        q, k, v = (torch.randn(shape).to(self.dtype).transpose(1, 2) for _ in range(3))
        return lambda: form.attention(0, q, k, v, form.layer_bias(0, absolute, self._rows), padding)

    def _released_captions(self, form: ReleasedForm) -> Callable[[], object]:
        def answer() -> None:
            images = self._models.plain.image_tokens(self._pixels)
            form.caption(w.encoder_rows(self.config, images, self._batch), beam=w.BEAM, steps=w.STEPS)

        return answer

    # -- lines ----------------------------------------------------------------------------------------------------

    def _attention_inputs(self) -> tuple[Tensor, Tensor, Tensor, SharedBias]:
        generator = torch.Generator().manual_seed(3)
        shape = (sum(self._row_lengths), self.config.heads, self.config.head_dim)
        q, k, v = (torch.randn(shape, generator=generator).to(self.dtype) for _ in range(3))
        table = self._models.packed.encoder.biases(self._rows[0].grid, 32)[0]
        return q, k, v, SharedBias((table,), (0,) * self._batch)

    def _time(self, call: Callable[[], object], samples: int = 5) -> Timing:
        if self._quick:
            return sample([call], 1)
        return measure(call, samples=samples)

    def _row(self, op: str, timing: Timing, flops: float, error: float | None = None) -> Row:
        gflops = flops / timing.seconds / 1e9
        return Row(op, timing.seconds * 1e3, timing.clean, gflops, gflops / self.gemm_gflops, error=error)

    def _compared(
        self,
        row: Row,
        tuned: Timing,
        shipped: Timing | None,
        *,
        least: float = 0.0,
        least_shipped: float = 0.0,
        per: int = 1,
    ) -> Row:
        """The row beside the released form's time under both allocators."""
        ratio = tuned.seconds * 1e3 / per / row.ms
        as_shipped = shipped.seconds * 1e3 / per / row.ms if shipped else None
        wanted = [f">= {least:g}x released"] if least else []
        wanted += [f">= {least_shipped:g}x as shipped"] if least_shipped else []
        met = ratio >= least and (as_shipped is None or as_shipped >= least_shipped) if wanted else row.met
        clean = row.clean and tuned.clean and (shipped is None or shipped.clean)
        target = ", ".join(wanted) or row.target
        return replace(row, clean=clean, ratio_tuned=ratio, ratio_shipped=as_shipped, target=target, met=met)
