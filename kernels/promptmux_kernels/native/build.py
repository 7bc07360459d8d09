"""Compile the C++ ops with the machine's own compiler and keep the result where only its owner can write.

A library's name holds a digest of everything it depends on: sources, flags, torch, Python. It is built in a temporary
directory and renamed into place, so that processes may race and none ever loads half a file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import torch

SOURCES = Path(__file__).parent
SHIPPED = SOURCES / "built"

FLAGS = {
    "avx2": ("-mavx2", "-mfma", "-mf16c"),
    "avx512": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"),
    "avx512_bf16": ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma", "-mf16c"),
}
"""Instruction sets the ops are built for, each with what the compiler calls it; only the last multiplies bfloat16."""

COMMON_FLAGS = ("-std=c++20", "-O3", "-fno-math-errno", "-fPIC", "-shared", "-fopenmp")

COMPILE_TIMEOUT_S = 300


class BuildError(Exception):
    """There is no library and none can be made; the message says why in one line."""


def capability() -> str | None:
    """The best of `FLAGS` that this CPU runs and torch itself uses, or None."""
    supported = torch.cpu.get_capabilities()
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return "avx512_bf16" if supported.get("avx512_bf16") else "avx512"
    return "avx2" if supported.get("avx2") and supported.get("fma3") else None


def find_or_build(level: str) -> Path:
    """Path of the library for an instruction set: shipped with the package, cached, or built now. Raises BuildError."""
    name = library_name(level)
    with suppress(OSError):  # a directory that this user may not enter is as good as none
        if is_safe(SHIPPED, name):
            return SHIPPED / name
    return build(level, cache_directory())


def ship() -> list[Path]:
    """Build for every instruction set beside the sources, for all users to read. Raises BuildError."""
    libraries = [build(level, SHIPPED) for level in FLAGS]
    SHIPPED.chmod(0o755)
    return libraries


def build(level: str, directory: Path) -> Path:
    """The library in `directory`, compiled unless it is there. Raises BuildError."""
    name = library_name(level)
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not is_safe(directory):
            raise BuildError(f"{directory} can be written by others")
        if not (directory / name).exists():
            with tempfile.TemporaryDirectory(dir=directory) as folder:
                unfinished = Path(folder, name)
                _compile(level, unfinished)
                unfinished.chmod(0o755)
                unfinished.replace(directory / name)
    except OSError as error:
        raise BuildError(f"nothing can be kept in {directory}: {error}") from error
    if not is_safe(directory, name):
        raise BuildError(f"{directory / name} can be written by others")
    return directory / name


def library_name(level: str) -> str:
    digest = hashlib.sha256()
    for part in (torch.__version__, level, *COMMON_FLAGS, *FLAGS[level]):
        digest.update(f"{part}\n".encode())
    for source in sorted(SOURCES.glob("*.h")) + sorted(SOURCES.glob("*.cpp")):
        digest.update(source.name.encode() + source.read_bytes())
    return f"promptmux_cpu-{level}-{digest.hexdigest()[:16]}.so"


def cache_directory() -> Path:
    """Where this user's libraries are kept. Raises BuildError for a user without a home."""
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise BuildError("there is no home directory to keep a library in: set XDG_CACHE_HOME") from error
    return Path(base, "promptmux", "kernels")


def is_safe(directory: Path, name: str = "") -> bool:
    """Whether a file, and the directory it lies in, belong to us or to root and nobody else can write them.

    A library is code: whoever can write it runs as the server.
    """
    for path in {directory, directory / name}:
        status = path.stat()
        if status.st_uid not in (0, os.getuid()) or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return False
    return True


def _compile(level: str, target: Path) -> None:
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        raise BuildError("there is no C++ compiler (c++ or g++) on the path")
    torch_root = Path(torch.__file__).parent
    command = [
        compiler,
        *COMMON_FLAGS,
        *FLAGS[level],
        *(f"-I{torch_root / 'include' / below}" for below in ("", "torch/csrc/api/include")),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        str(SOURCES / "library.cpp"),
        "-o",
        str(target),
        f"-L{torch_root / 'lib'}",
        "-ltorch_cpu",
        "-lc10",
    ]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"the C++ compiler did not run: {error}") from error
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[0]
        raise BuildError(f"the C++ compiler failed: {last}")
