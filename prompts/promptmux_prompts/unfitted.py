"""Prompt files read where no backbone is at hand: every check of a served file but whether a backbone would take it.

Layers, heads and head dim are taken from the file itself, numbers stay in the type in which they are stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from promptmux_prompts.directory import Refusal
from promptmux_prompts.errors import InvalidPromptFile, PromptFileError
from promptmux_prompts.format import DTYPES, Prompt, PromptShape, read_prompt
from promptmux_prompts.header import Header, read_header

MAX_FILE_BYTES = 256 << 20
"""Twice the largest prompt of the largest OFA, in float32."""


def load_unfitted(path: Path) -> Prompt:
    """Read a prompt file whole and check it; raises OSError and what `read_prompt` raises."""
    if path.stat().st_size > MAX_FILE_BYTES:
        raise InvalidPromptFile(f"a prompt file has at most {MAX_FILE_BYTES} bytes")
    return read_unfitted(path.read_bytes())


def read_unfitted(data: bytes) -> Prompt:
    """Check and parse a prompt file; raises what `read_prompt` raises."""
    header = read_header(data)
    return read_prompt(data, shape=_shape(header), fingerprint=None, dtype=DTYPES[header.dtype])


def scan_unfitted(directory: Path) -> Iterator[Prompt | Refusal]:
    """Every prompt file of a directory, by name, one at a time; a bad one is reported and keeps no other from it."""
    for path in sorted(directory.glob("*.safetensors")):
        try:
            yield load_unfitted(path)
        except PromptFileError as error:
            yield Refusal(path.stem, error.code, str(error))
        except OSError as error:
            yield Refusal(path.stem, InvalidPromptFile.code, f"cannot be read: {error.strerror}")


def _shape(header: Header) -> PromptShape:
    """Of the backbone that the file was made for; a side that is absent has no layers."""
    nothing = (0, 1, 0, 1)
    encoder, decoder = (header.shapes.get(f"{side}.prefix.key", nothing) for side in ("encoder", "decoder"))
    present = encoder if encoder[2] else decoder
    return PromptShape(encoder[0], decoder[0], heads=present[1], head_dim=present[3])
