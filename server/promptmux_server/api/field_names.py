"""Field paths that are safe to show: built from names this server knows and list positions, never from input."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import BaseModel

from promptmux_server.api import schemas

UNION_TAGS = frozenset({"body", "one", "many"})
"""Parts that pydantic adds to a location and that no caller wrote."""


def _names(models: Iterable[object]) -> frozenset[str]:
    return frozenset(
        name
        for model in models
        if isinstance(model, type) and issubclass(model, BaseModel)
        for name in model.model_fields
    )


KNOWN = _names(vars(schemas).values())


def known_path(location: Sequence[str | int]) -> str | None:
    """`("body", "many", "items", 3, "task")` -> `items[3].task`; parts that are not ours are left out."""
    path = ""
    for part in location:
        if isinstance(part, int):
            path += f"[{part}]"
        elif part in KNOWN and part not in UNION_TAGS:
            path += f".{part}" if path else part
    return path or None
