"""The one place that reads torch pickles. It builds tensors only: anything that would call a function is refused."""

from __future__ import annotations

import argparse
import pickle
from pathlib import Path
from typing import Any

import torch

from promptmux_server.errors import BackboneFileError, UnsafePickle


def read_pickle(path: Path) -> Any:
    """Read a torch file of tensors, plain containers and argparse.Namespace; raises UnsafePickle, BackboneFileError."""
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "GLOBAL" in str(error):  # the opcode that names a function or class
            raise UnsafePickle(
                f"{path.name} asks to run code or build objects other than tensors; nothing of it was run. "
                "Save its state dict as safetensors instead."
            ) from error
        raise BackboneFileError(f"{path.name} is not a readable torch file") from error
    except Exception as error:  # truncated and foreign files raise almost anything
        raise BackboneFileError(f"{path.name} is not a readable torch file") from error
