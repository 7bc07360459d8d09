"""Why a prompt file or a change of the store is refused, as two trees with stable codes. Knows nothing of HTTP.

PromptFileError               invalid_prompt_file
├── InvalidPromptFile         invalid_prompt_file        not a well-formed prompt file
├── PromptShapeMismatch       prompt_shape_mismatch      tensors of another model size, or other than the manifest says
├── PromptNonfinite           prompt_nonfinite           NaN, Inf or absurd values after the cast to the serving type
├── PromptDigestMismatch      prompt_digest_mismatch     not the content that was announced
└── PromptBackboneMismatch    prompt_backbone_mismatch   trained for another backbone

StoreError                    storage_failed
├── InvalidName               invalid_parameter          no name that a prompt may have
├── NameNotFound              prompt_not_found           nothing was published under the name, or it was deleted
├── VersionNotFound           version_not_found          never published, or no longer kept
├── VersionMismatch           version_mismatch           the name stands for another version than the caller expected
├── RegistryFull              registry_full              as many names as the store may hold
├── StorageFull               storage_full               no room on the disk; nothing has changed
├── StorageFailed             storage_failed             the disk failed; the old version stands
└── BlobCorrupt               prompt_quarantined         stored bytes are not those that were written
"""

from __future__ import annotations

from typing import ClassVar


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


class StoreError(Exception):
    """Root of the store's tree; the message says what to do, names no path and echoes no input."""

    code: ClassVar[str] = "storage_failed"


class InvalidName(StoreError):
    """No name that a prompt may have."""

    code = "invalid_parameter"


class NameNotFound(StoreError):
    """Nothing was published under this name, or it was deleted."""

    code = "prompt_not_found"


class VersionNotFound(StoreError):
    """This version was never published, or is no longer kept."""

    code = "version_not_found"


class VersionMismatch(StoreError):
    """The name stands for another version than the caller expected; nothing has changed."""

    code = "version_mismatch"


class RegistryFull(StoreError):
    """The store holds as many names as it may."""

    code = "registry_full"


class StorageFull(StoreError):
    """The disk has no room left; nothing has changed."""

    code = "storage_full"


class StorageFailed(StoreError):
    """The disk failed; the change did not happen and the old version stands."""

    code = "storage_failed"


class BlobCorrupt(StoreError):
    """What is stored is not what was written: a blob, a version's record or a name's HEAD."""

    code = "prompt_quarantined"
