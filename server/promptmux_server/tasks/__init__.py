"""Task kinds: from what a user sends to what the model reads, and from what it writes to a typed answer."""

from promptmux_server.tasks.decode import decode_outcome
from promptmux_server.tasks.encode import EncodedItem, encode_item
from promptmux_server.tasks.outputs import AnswerOutput, BoxOutput, CaptionOutput, LabelOutput, Output, TextOutput
from promptmux_server.tasks.spec import TaskSpec

__all__ = [
    "AnswerOutput",
    "BoxOutput",
    "CaptionOutput",
    "EncodedItem",
    "LabelOutput",
    "Output",
    "TaskSpec",
    "TextOutput",
    "decode_outcome",
    "encode_item",
]
