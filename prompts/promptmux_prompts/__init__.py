"""Prompt files: what they hold, how they are read and written, what refuses them. Needs torch and safetensors only."""

from promptmux_prompts.canary import Canary
from promptmux_prompts.directory import Refusal, Seed, read_seeds
from promptmux_prompts.errors import (
    InvalidPromptFile,
    PromptBackboneMismatch,
    PromptDigestMismatch,
    PromptFileError,
    PromptNonfinite,
    PromptShapeMismatch,
)
from promptmux_prompts.format import Prompt, PromptShape, load_manifest, load_prompt, read_prompt, write_prompt
from promptmux_prompts.manifest import ImageInput, Kind, Manifest

__all__ = [
    "Canary",
    "ImageInput",
    "InvalidPromptFile",
    "Kind",
    "Manifest",
    "Prompt",
    "PromptBackboneMismatch",
    "PromptDigestMismatch",
    "PromptFileError",
    "PromptNonfinite",
    "PromptShape",
    "PromptShapeMismatch",
    "Refusal",
    "Seed",
    "load_manifest",
    "load_prompt",
    "read_prompt",
    "read_seeds",
    "write_prompt",
]
