"""Prompts from other programs' files."""
