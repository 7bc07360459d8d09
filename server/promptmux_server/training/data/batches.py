"""A task's training data as a run takes them: batches of examples with their pictures, from any cursor on."""

from __future__ import annotations

from promptmux_server.errors import DataError
from promptmux_server.training.batch import Cursor, TrainingBatch
from promptmux_server.training.data.encode import SampleEncoder
from promptmux_server.training.data.pictures import UnreadablePicture
from promptmux_server.training.data.sample import Defect, Sample
from promptmux_server.training.data.stream import Stream
from promptmux_server.training.feature_segment import SeenPicture
from promptmux_server.training.forward import Example
from promptmux_server.training.seeing import Pixels, PreparedPicture, Stem

Viewed = SeenPicture | PreparedPicture


class FileBatches:
    """`training.batch.Batches` of a stream: `rows` samples a batch, or this worker's share of them."""

    def __init__(
        self,
        stream: Stream,
        encoder: SampleEncoder,
        stem: Stem | Pixels,
        rows: int,
        *,
        worker: int = 0,
        workers: int = 1,
    ) -> None:
        """Of several workers each takes every so-manieth sample; their cursors are the same."""
        self._stream, self._encoder, self._stem = stream, encoder, stem
        self._rows, self._worker, self._workers = rows, worker, workers

    def take(self, cursor: Cursor) -> tuple[TrainingBatch, Cursor]:
        """The batch at a cursor, and the cursor behind it. Raises DataError naming the sample that cannot be read."""
        start = self._stream.number(cursor)
        examples, seen = [], []
        for number in range(start + self._worker, start + self._rows, self._workers):
            sample = self._stream.sample(number)
            picture = self._see(sample, number)
            if picture is not None:
                seen.append(picture.image)
            examples.append(self._example(sample, number, len(seen) - 1, picture))
        return TrainingBatch(examples, seen, self._encoder.answers), self._stream.cursor(start + self._rows)

    def _see(self, sample: Sample, number: int) -> Viewed | None:
        if sample.picture is None:
            return None
        try:
            return self._stem.see(sample.picture, number)
        except UnreadablePicture as error:
            place = self._stream.where(number, sample.entry)
            raise DataError(f"{place}: {error}. `promptmux data check --pictures` finds all such lines.") from error

    def _example(self, sample: Sample, number: int, image: int, picture: Viewed | None) -> Example:
        try:
            if picture is None:
                return self._encoder.example(sample)
            return self._encoder.example(sample, image, (picture.width, picture.height))
        except Defect as defect:
            place = self._stream.where(number, sample.entry)
            raise DataError(f"{place}: {defect.reason}. The data were changed since they were checked.") from defect
