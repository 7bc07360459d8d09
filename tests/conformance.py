"""Does this backbone compute what the released OFA computes? `python tests/conformance.py DIR`

Checks every `NAME.backbone.safetensors` with its `NAME.cases.*`, and `hf/`, found in DIR against outputs of the
released model, through the loader, prompt file, forward pass, decoding and loss that the server and the trainer use,
in float32 with every form of the ops, and again as a CPU serves them: weights packed, and in bfloat16. One line of JSON
per case and check; exit status 1 if any check misses.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))

from fairseq_arguments import params_from_fairseq
from promptmux_kernels import PromptBatch, pack_prompts, use_form
from promptmux_kernels.dispatch import Form
from promptmux_prompts import Manifest, Prompt, PromptShape, read_prompt, write_prompt
from promptmux_prompts.importers.ofa import fold_generator, split_table
from promptmux_server.backbone.assemble import assemble
from promptmux_server.backbone.config import BOS, PAD
from promptmux_server.backbone.encoder import EncoderRow
from promptmux_server.backbone.model import OFA
from promptmux_server.backbone.weights import load_backbone
from promptmux_server.engine.decoding import make_search
from promptmux_server.engine.prompt_table import PromptPools
from promptmux_server.engine.runner import Work, closed_batch
from promptmux_server.tasks.decoding import DecodingParams, Outcome
from promptmux_server.training.batch import Cursor, TrainingBatch
from promptmux_server.training.forward import Example, supervised_logits
from promptmux_server.training.loss import label_smoothed_loss
from promptmux_server.training.methods import DeepPrompts
from promptmux_server.training.passes import backward
from promptmux_server.training.recipe import ComputeRecipe, PromptRecipe, StepRecipe
from promptmux_server.training.run import Run

SEARCHES = ("greedy", "beam5", "beam4_lp0.6_norep2", "beam5_unnorm_temp0.7", "trie_beam3")
SMOOTHING = 0.1

BFLOAT16_TOLERANCE = 0.03
"""Of states and logits, over their largest element, when weights and activations are bfloat16.

A layer rounds about ten times (products, norms, sums), each by at most 2**-9 of what it rounds, 2**-9 / sqrt(3) in the
mean; pre-norm layers add to what they inherit, so that the errors of n layers walk at random: sqrt(10 n) * 2**-9 /
sqrt(3) = 0.008 for the golden files' n = 5. Four times that, for the largest of thousands of elements; measured: 0.007
to 0.016.
"""

Sides = dict[str, tuple[Tensor, Tensor]]
"""Prompt K and V (L, H, P, D) of "encoder" and "decoder"."""


@dataclass(frozen=True)
class Check:
    """One comparison: `error` is in the unit of `tolerance`, as the golden README states it."""

    file: str
    case: str
    form: str
    check: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # False for NaN


class Golden:
    """One backbone and the cases that were computed with it; `packed` as a CPU serves it."""

    def __init__(self, folder: Path, name: str, dtype: torch.dtype = torch.float32, *, packed: bool = False) -> None:
        loaded = load_backbone(folder / f"{name}.backbone.safetensors")
        self.name = name
        self.config = loaded.config
        self.fingerprint = loaded.fingerprint
        self.dtype, self.packed = dtype, packed
        self.model = assemble(loaded, dtype=dtype, packed=packed)
        self.tensors = load_file(folder / f"{name}.cases.safetensors")
        described = json.loads((folder / f"{name}.cases.json").read_text())
        self.cases: dict[str, dict[str, Any]] = described["cases"]
        self.answers: list[list[int]] = described["answers"]
        self.rows = self.tensors["src_tokens"].shape[0]

    def texts(self, key: str) -> list[tuple[int, ...]]:
        """The rows of an id matrix without their padding."""
        return [tuple(token for token in row if token != PAD) for row in self.tensors[key].tolist()]

    def generator(self, case: str) -> dict[str, Tensor]:
        """The case's prompt tensors under their fairseq names, float32."""
        prefix = f"{case}/prompt/"
        return {name[len(prefix) :]: value.float() for name, value in self.tensors.items() if name.startswith(prefix)}

    def sides(self, generator: dict[str, Tensor]) -> Sides:
        """Fold what fairseq stores into K and V per layer; an absent side has length 0."""
        config = self.config
        sides = {}
        for side, layers in (("encoder", config.encoder_layers), ("decoder", config.decoder_layers)):
            stem = f"{side}.{side}_prompt_encoder."
            own = {name[len(stem) :]: value for name, value in generator.items() if name.startswith(stem)}
            table = fold_generator(own) if own else torch.zeros(0, layers * 2 * config.d_model)
            sides[side] = split_table(table, layers, config.heads)
        return sides

    def prompt_file(self, case: str) -> Prompt:
        """The case's prompt after a round trip through the prompt file format."""
        sides = self.sides(self.generator(case))
        config = self.config
        shape = PromptShape(config.encoder_layers, config.decoder_layers, config.heads, config.head_dim)
        manifest = Manifest.minimal(
            name="golden",
            backbone_name=config.name,
            fingerprint=self.fingerprint,
            encoder_length=sides["encoder"][0].shape[2],
            decoder_length=sides["decoder"][0].shape[2],
        )
        prompt = Prompt.build(manifest, *sides["encoder"], *sides["decoder"])
        return read_prompt(write_prompt(prompt), shape=shape, fingerprint=self.fingerprint, dtype=self.dtype)

    def encoder_rows(self, case: str) -> list[EncoderRow]:
        sources = self.texts("src_tokens")
        if self.cases[case]["spec"].get("image") is False:
            return [EncoderRow(source) for source in sources]
        images = self.model.image_tokens(self.tensors["patch_images"].float())
        shown = self.tensors["patch_masks"].tolist()
        return [EncoderRow(s, i if m else None) for s, i, m in zip(sources, images, shown, strict=True)]


def relative(found: Tensor, expected: Tensor) -> float:
    """max |found - expected| over max |expected|; the golden tolerances are stated so."""
    return float((found - expected).abs().max() / expected.abs().max())


def unpadded(tensor: Tensor, padding: Tensor) -> Tensor:
    """(B, T, ...) and its padding mask (B, T) -> the real rows, one after another."""
    return torch.cat([row[~mask] for row, mask in zip(tensor, padding, strict=True)])


def check_case(golden: Golden, case: str, form: str) -> Iterator[Check]:
    def check(name: str, error: float, tolerance: float) -> Check:
        return Check(golden.name, case, form, name, error, tolerance)

    exact = golden.dtype == torch.float32
    with torch.no_grad():
        pools = PromptPools(golden.config, golden.dtype, torch.device("cpu"))
        prompts = pools.batch([pools.store(golden.prompt_file(case))] * golden.rows)
        rows = golden.encoder_rows(case)
        encoded = golden.model.encode(rows, prompts.encoder)
        states = unpadded(golden.tensors[f"{case}/encoder_out"], golden.tensors[f"{case}/encoder_padding_mask"])
        tolerance = 2e-4 if exact else BFLOAT16_TOLERANCE
        yield check("encoder_out", relative(encoded.states.float(), states), tolerance)
        taught = golden.model.teach(golden.texts("prev_output_tokens"), golden.model.remember(encoded), prompts.decoder)
        logits = unpadded(golden.tensors[f"{case}/logits"], golden.tensors["prev_output_tokens"] == PAD)
        yield check("logits", relative(golden.model.logits(taught).float(), logits), tolerance)
        if not exact:
            return
        for search in SEARCHES:
            missed, worst = check_search(golden, case, search, rows, prompts)
            yield check(f"{search} tokens", missed, 0)
            yield check(f"{search} scores", worst, 1e-3)
        scores = candidate_scores(golden, rows, prompts)
        yield check("allcand_scores", float((scores - golden.tensors[f"{case}/allcand_scores"]).abs().max()), 1e-3)
    if not golden.packed:  # packed weights are for serving
        yield from (check(name, error, tolerance) for name, error, tolerance in check_training(golden, case))


def decode(
    golden: Golden, rows: Sequence[EncoderRow], prompts: Any, params: DecodingParams, trie: bool
) -> list[Outcome]:
    """Run one search for every row in one batch."""
    candidates = tuple(tuple(answer) for answer in golden.answers) if trie else None
    works = [Work(row.source, (BOS,), row.image, make_search(params, candidates=candidates)) for row in rows]
    batch = closed_batch(golden.model, works, prompts)
    while batch.live_rows:
        batch.step()
    return [work.search.outcome() for work in works]


def check_search(
    golden: Golden, case: str, search: str, rows: Sequence[EncoderRow], prompts: Any
) -> tuple[float, float]:
    """(rows whose best hypothesis has other tokens, largest score difference of the best hypotheses)."""
    expected = golden.cases[case][search]
    params = params_from_fairseq(expected["args"], constrained=search.startswith("trie"))
    outcomes = decode(golden, rows, prompts, params, trie=search.startswith("trie"))
    missed, worst = 0, 0.0
    for outcome, hypotheses in zip(outcomes, expected["hypotheses"], strict=True):
        best = outcome.hypotheses[0]
        missed += list(best.tokens) != hypotheses[0]["tokens"]
        worst = max(worst, abs(best.score - hypotheses[0]["score"]))
    return float(missed), worst


def candidate_scores(golden: Golden, rows: Sequence[EncoderRow], prompts: Any) -> Tensor:
    outcomes = decode(golden, rows, prompts, DecodingParams(method="candidates"), trie=True)
    return torch.tensor([outcome.candidate_scores for outcome in outcomes])


def check_training(golden: Golden, case: str) -> Iterator[tuple[str, float, float]]:
    """Loss, likelihood and the prompts' gradients through the trainer's own forward pass and loss."""
    generator = {name: value.requires_grad_() for name, value in golden.generator(case).items()}
    sides = golden.sides(generator)
    rows = golden.encoder_rows(case)
    inputs = golden.texts("prev_output_tokens")
    examples = [
        Example(row.source, (BOS,), text[1:], index if row.image else None)
        for index, (row, text) in enumerate(zip(rows, inputs, strict=True))
    ]
    images = [row.image for row in rows]
    packed: list[PromptBatch] = [pack_prompts([sides[side]], [0] * golden.rows) for side in ("encoder", "decoder")]
    logits, targets = supervised_logits(golden.model, examples, images, *packed)
    loss = label_smoothed_loss(logits, targets, smoothing=SMOOTHING)
    expected = golden.cases[case]
    total, nll = expected[f"loss_sum_eps{SMOOTHING}"], expected["nll_sum"]
    yield "tokens", float(abs(loss.tokens - expected["ntokens"])), 0
    yield "loss", abs(float(loss.total.detach()) / total - 1), 1e-4
    yield "nll", abs(float(loss.nll.detach()) / nll - 1), 1e-4
    if generator:
        loss.mean.backward()
    for name, value in generator.items():
        assert value.grad is not None
        yield f"grad {name}", relative(value.grad, golden.tensors[f"{case}/grad/{name}"]), 1e-3


def check_training_together(golden: Golden, form: str) -> Iterator[Check]:
    """The prompts of all cases as runs of one batch: each gradient is that of the case alone."""
    runs = []
    for case in golden.cases:
        generator = golden.generator(case)
        if generator:
            method = DeepPrompts(golden.model, prompt_recipe(golden, case), seed=0)
            for name, parameter in method.parameters.items():
                parameter.data.copy_(generator[released_name(name)])
            runs.append(Run(case, method, StepRecipe(steps=1, smoothing=SMOOTHING), GoldenBatch(golden, case)))
    for run, loss in zip(runs, backward([(run, run.take()) for run in runs], ComputeRecipe()), strict=True):
        expected = golden.cases[run.name][f"loss_sum_eps{SMOOTHING}"]
        yield Check(golden.name, run.name, form, "loss in one batch", abs(loss.total / expected - 1), 1e-4)
        for name, parameter in run.method.parameters.items():
            assert parameter.grad is not None
            error = relative(parameter.grad / loss.tokens, golden.tensors[f"{run.name}/grad/{released_name(name)}"])
            yield Check(golden.name, run.name, form, f"grad in one batch {name}", error, 1e-3)


def prompt_recipe(golden: Golden, case: str) -> PromptRecipe:
    """What a case's generator is; without dropout, as the gradients were computed."""
    generator, lengths = golden.generator(case), {}
    for side in ("encoder", "decoder"):
        table = generator.get(released_name(f"{side}.embedding.weight"))
        lengths[f"{side}_length"] = 0 if table is None else len(table)
    hidden = [tensor for name, tensor in generator.items() if name.endswith("trans.0.bias")]
    return PromptRecipe(
        **lengths,
        generator="mlp" if hidden else "table",
        generator_width=len(hidden[0]) if hidden else None,
        dropout=0.0,
    )


def released_name(name: str) -> str:
    """A prompt parameter's name in the released trainer's checkpoints."""
    side, _, rest = name.partition(".")
    return f"{side}.{side}_prompt_encoder.{rest}"


class GoldenBatch:
    """A case's rows as training data."""

    def __init__(self, golden: Golden, case: str) -> None:
        rows, inputs = golden.encoder_rows(case), golden.texts("prev_output_tokens")
        shown = {index: row.image for index, row in enumerate(rows) if row.image}
        examples = [
            Example(row.source, (BOS,), text[1:], list(shown).index(index) if index in shown else None)
            for index, (row, text) in enumerate(zip(rows, inputs, strict=True))
        ]
        self._batch = TrainingBatch(examples, list(shown.values()))

    def take(self, cursor: Cursor) -> tuple[TrainingBatch, Cursor]:
        return self._batch, cursor


def check_transformers_directory(folder: Path, form: Form) -> Iterator[Check]:
    """A directory as published for transformers: encoder output and logits, no prompts."""
    model: OFA = assemble(load_backbone(folder), dtype=torch.float32)
    case = load_file(folder / "case.safetensors")
    with torch.no_grad():
        images = model.image_tokens(case["patch_images"].float())
        sources = [tuple(t for t in row if t != PAD) for row in case["src_tokens"].tolist()]
        encoded = model.encode([EncoderRow(s, i) for s, i in zip(sources, images, strict=True)])
        n_images = images[0].tokens.shape[0]
        text_padding = case["src_tokens"] == PAD
        padding = torch.cat([torch.zeros(len(sources), n_images, dtype=torch.bool), text_padding], dim=1)
        states = unpadded(case["encoder_out"], padding)
        yield Check("hf", "case", form, "encoder_out", relative(encoded.states, states), 2e-4)
        texts = [tuple(t for t in row if t != PAD) for row in case["prev_output_tokens"].tolist()]
        logits = model.logits(model.teach(texts, model.remember(encoded)))
        expected = unpadded(case["logits"], case["prev_output_tokens"] == PAD)
        yield Check("hf", "case", form, "logits", relative(logits, expected), 2e-4)


def run(folder: Path) -> Iterator[Check]:
    """Every check of every golden file in a folder."""
    forms: tuple[Form, ...] = ("cpu", "batched", "reference")
    for path in sorted(folder.glob("*.backbone.safetensors")):
        name = path.name.removesuffix(".backbone.safetensors")
        golden = Golden(folder, name)
        for form in forms:
            with use_form(form):
                for case in golden.cases:
                    yield from check_case(golden, case, form)
                yield from check_training_together(golden, form)
        for dtype in (torch.float32, torch.bfloat16):
            served = Golden(folder, name, dtype, packed=True)
            with use_form("cpu"):
                for case in served.cases:
                    yield from check_case(served, case, f"cpu, packed, {dtype}".replace("torch.", ""))
    if (folder / "hf").is_dir():
        for form in forms:
            with use_form(form):
                yield from check_transformers_directory(folder / "hf", form)


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python tests/conformance.py DIR   (DIR holds NAME.backbone.safetensors and NAME.cases.*)")
        return 2
    count = missed = 0
    for check in run(Path(arguments[0])):
        count, missed = count + 1, missed + (not check.passed)
        print(json.dumps({**asdict(check), "passed": check.passed}))
    print(json.dumps({"checks": count, "missed": missed}))
    return 1 if missed or not count else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
