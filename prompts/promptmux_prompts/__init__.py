"""Prompt files: what they hold, how they are read and written, what refuses them. Needs torch and safetensors only."""

from promptmux_prompts.directory import Refusal, prompt_path, scan_directory
from promptmux_prompts.errors import (
    BlobCorrupt,
    InvalidName,
    InvalidPromptFile,
    NameNotFound,
    PromptBackboneMismatch,
    PromptDigestMismatch,
    PromptFileError,
    PromptNonfinite,
    PromptShapeMismatch,
    RegistryFull,
    StorageFailed,
    StorageFull,
    StoreError,
    VersionMismatch,
    VersionNotFound,
)
from promptmux_prompts.format import Prompt, PromptShape, load_prompt, read_prompt, write_prompt
from promptmux_prompts.manifest import ImageInput, Kind, Manifest
from promptmux_prompts.records import ABSENT, Absent, Expected, Head, VersionRecord
from promptmux_prompts.store import Store
from promptmux_prompts.upload import Upload

__all__ = [
    "ABSENT",
    "Absent",
    "BlobCorrupt",
    "Expected",
    "Head",
    "ImageInput",
    "InvalidName",
    "InvalidPromptFile",
    "Kind",
    "Manifest",
    "NameNotFound",
    "Prompt",
    "PromptBackboneMismatch",
    "PromptDigestMismatch",
    "PromptFileError",
    "PromptNonfinite",
    "PromptShape",
    "PromptShapeMismatch",
    "Refusal",
    "RegistryFull",
    "StorageFailed",
    "StorageFull",
    "Store",
    "StoreError",
    "Upload",
    "VersionMismatch",
    "VersionNotFound",
    "VersionRecord",
    "load_prompt",
    "prompt_path",
    "read_prompt",
    "scan_directory",
    "write_prompt",
]
