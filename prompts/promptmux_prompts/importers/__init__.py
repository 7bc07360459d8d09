"""Prompts from other programs' files."""

from promptmux_prompts.importers.ofa import import_ofa
from promptmux_prompts.importers.peft import import_peft
from promptmux_prompts.importers.sides import ImportedSides

__all__ = ["ImportedSides", "import_ofa", "import_peft"]
