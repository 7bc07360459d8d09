"""From a sample to a training example: the tokens that the server would read for it, and those it should answer.

Everything is the task's own: its instruction, its cleaning of texts, its answer set, its bins for boxes.
"""

from __future__ import annotations

from promptmux_server.backbone.tokenizer import Tokenizer
from promptmux_server.errors import InvalidParameter
from promptmux_server.tasks import TaskSpec, encode_item
from promptmux_server.tasks.boxes import Box, box_to_bins
from promptmux_server.tasks.trie import Trie
from promptmux_server.training.data.fields import best_of
from promptmux_server.training.data.pictures import Size
from promptmux_server.training.data.sample import Defect, Sample
from promptmux_server.training.forward import Example

OVERHANG_PIXELS = 1.0
"""How far a box may leave its picture, by somebody's rounding; it is clipped, because there are no symbols beyond."""


class SampleEncoder:
    """Samples of one task as examples."""

    def __init__(self, spec: TaskSpec, tokenizer: Tokenizer) -> None:
        self.spec, self._tokenizer = spec, tokenizer
        self._answer_of = {label: answer for answer, label in reversed([*(spec.manifest.labels or {}).items()])}
        possible = spec.manifest.answers
        self._possible = frozenset(possible or ())
        self.answers = None if possible is None else Trie([tokenizer.encode(f" {answer}") for answer in possible])
        """The closed answer set that confines the loss, as it confines the server."""
        self.identity = spec.manifest.to_json()
        """All that decides what an example holds, besides the sample."""

    def example(self, sample: Sample, image: int | None = None, size: Size | None = None) -> Example:
        """The example about picture number `image` of its batch, which is `size` large. Raises Defect."""
        if (sample.picture is not None) != self.spec.takes_image:
            wanted = "needs a picture" if self.spec.takes_image else "takes no picture"
            raise Defect(f"the task {wanted}, as its manifest says", sample.entry)
        try:
            item = encode_item(self.spec, self._tokenizer, sample.text, sample.premise)
        except InvalidParameter as error:
            raise Defect(error.message.rstrip("."), sample.entry) from error
        target, confidence = self._target(sample, size)
        longest = max(len(item.source_ids), len(item.prefix_ids) + len(target))
        if longest > self.spec.config.max_positions:
            most = self.spec.config.max_positions
            raise Defect(f"has {longest} tokens, and the backbone reads {most}: shorten its texts", sample.entry)
        return Example(item.source_ids, item.prefix_ids, target, image, confidence)

    def _target(self, sample: Sample, size: Size | None) -> tuple[tuple[int, ...], float]:
        if isinstance(sample.target, str):
            text, confidence = self._text(sample, sample.target)
            return tuple(self._tokenizer.encode(f" {text}")), confidence
        assert size is not None, "a task that answers with boxes looks at pictures"
        return self._bins(sample.target, size, sample.entry), sample.confidence

    def _text(self, sample: Sample, target: str) -> tuple[str, float]:
        """What is learned: the target itself, a label's answer, or the best answer that the task can give."""
        if self.spec.kind == "label":
            target = self._answer_of.get(target, target)
        if not self._possible or target in self._possible:
            return target, sample.confidence
        possible = {text: worth for text, worth in sample.references.items() if text in self._possible}
        if not possible:
            raise Defect(
                "its target is none of the task's answers: add it to them, or leave the line out", sample.entry
            )
        return best_of(possible)

    def _bins(self, box: Box, size: Size, entry: str | None) -> tuple[int, ...]:
        x0, y0, x1, y1 = box
        width, height = size
        if min(x0, y0) < -OVERHANG_PIXELS or x1 > width + OVERHANG_PIXELS or y1 > height + OVERHANG_PIXELS:
            raise Defect("its box leaves the picture: give corners in pixels of the picture as it is stored", entry)
        within = (max(x0, 0.0), max(y0, 0.0), min(x1, float(width)), min(y1, float(height)))
        bins = box_to_bins(within, *size, self.spec.image_size, self.spec.config)
        return tuple(self.spec.config.first_bin_id + value for value in bins)
