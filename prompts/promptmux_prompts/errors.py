"""Why a prompt file is refused, as one tree with stable codes. Knows nothing of HTTP.

ImportRefused                 import_refused             another program's file that cannot become a prompt file

PromptFileError               invalid_prompt_file
├── InvalidPromptFile         invalid_prompt_file        not a well-formed prompt file
├── PromptShapeMismatch       prompt_shape_mismatch      tensors of another model size, or other than the manifest says
├── PromptNonfinite           prompt_nonfinite           NaN, Inf or absurd values after the cast to the serving type
├── PromptDigestMismatch      prompt_digest_mismatch     not the content that was announced
└── PromptBackboneMismatch    prompt_backbone_mismatch   trained for another backbone
"""

from __future__ import annotations

from typing import ClassVar


class ImportRefused(Exception):
    """Another program's file that holds no deep prompts, or none that can be had; the message says what to do.

    It stands alone because no server reads foreign files.
    """

    code: ClassVar[str] = "import_refused"


class PromptFileError(Exception):
    """Root of the tree; the message says what is wrong and names no path."""

    code: ClassVar[str] = "invalid_prompt_file"


class InvalidPromptFile(PromptFileError):
    """Not a well-formed prompt file."""


class PromptShapeMismatch(PromptFileError):
    """Tensors of another model size, or of other lengths than the manifest says."""

    code = "prompt_shape_mismatch"


class PromptNonfinite(PromptFileError):
    """NaN, Inf or absurdly large values, once cast to the type they would be served in."""

    code = "prompt_nonfinite"


class PromptDigestMismatch(PromptFileError):
    """The content is not what was announced."""

    code = "prompt_digest_mismatch"


class PromptBackboneMismatch(PromptFileError):
    """The prompt was trained for another backbone."""

    code = "prompt_backbone_mismatch"
