"""Prompt files: what they hold, how they are read and written, what refuses them. Needs torch and safetensors only."""

from promptmux_prompts.canary import Canary
from promptmux_prompts.directory import Refusal, Seed, read_seeds
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
from promptmux_prompts.format import Prompt, PromptShape, load_manifest, load_prompt, read_prompt, write_prompt
from promptmux_prompts.manifest import ImageInput, Kind, Manifest
from promptmux_prompts.records import ABSENT, Absent, Expected, Head, VersionRecord
from promptmux_prompts.store import Store
from promptmux_prompts.upload import Upload

__all__ = [
    "ABSENT",
    "Absent",
    "BlobCorrupt",
    "Canary",
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
    "Seed",
    "StorageFailed",
    "StorageFull",
    "Store",
    "StoreError",
    "Upload",
    "VersionMismatch",
    "VersionNotFound",
    "VersionRecord",
    "load_manifest",
    "load_prompt",
    "read_prompt",
    "read_seeds",
    "write_prompt",
]
