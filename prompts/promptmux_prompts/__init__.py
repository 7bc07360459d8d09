"""Prompt files: what they hold, how they are read and written, what refuses them. Needs torch and safetensors only."""

from promptmux_prompts.directory import Refusal, prompt_path, scan_directory
from promptmux_prompts.errors import (
    InvalidPromptFile,
    PromptBackboneMismatch,
    PromptDigestMismatch,
    PromptFileError,
    PromptNonfinite,
    PromptShapeMismatch,
)
from promptmux_prompts.format import Prompt, PromptShape, load_prompt, read_prompt, write_prompt
from promptmux_prompts.manifest import ImageInput, Kind, Manifest

__all__ = [
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
    "load_prompt",
    "prompt_path",
    "read_prompt",
    "scan_directory",
    "write_prompt",
]
