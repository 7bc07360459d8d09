"""What the compilers make of a launch, for devices that need not be here: registers, spills, memory, instructions.

Reads NVIDIA machine code with the tools that triton brings, AMD's from its assembly. A spill shows as a stack frame
and LDL/STL instructions: the LOCAL field of the resource usage stays 0 even where there are hundreds.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from promptmux_kernels.triton_ops.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Device:
    """What bounds the blocks that one multiprocessor holds."""

    shared_bytes: int
    """Of one multiprocessor, for all its blocks."""
    shared_per_block: int
    reserved_per_block: int
    warps: int
    registers_per_warp_slot: int
    """Registers per thread that all resident warps of one scheduler share, and the number of schedulers."""
    schedulers: int
    register_step: int


DEVICES = {
    "sm_80": Device(167936, 166912, 1024, 64, 512, 4, 8),
    "sm_90": Device(233472, 232448, 1024, 64, 512, 4, 8),
    "sm_100": Device(233472, 232448, 1024, 64, 512, 4, 8),
    "gfx942": Device(65536, 65536, 0, 32, 512, 4, 8),
}


@dataclass(frozen=True)
class Compiled:
    """One kernel on one target. `instructions` counts mnemonics with the modifiers that matter."""

    registers: int
    stack_bytes: int
    spills: int
    shared_bytes: int
    blocks_per_processor: int
    instructions: Counter[str]

    @property
    def matrix(self) -> dict[str, int]:
        return self._picked(r"HMMA|HGMMA|UTCHMMA|v_mfma")

    @property
    def asynchronous(self) -> dict[str, int]:
        return self._picked(r"LDGSTS|UTMALDG")

    @property
    def loads(self) -> dict[str, int]:
        return self._picked(r"LDG\b|LDG\.|(global|buffer)_load")

    def _picked(self, pattern: str) -> dict[str, int]:
        return {name: count for name, count in sorted(self.instructions.items()) if re.match(pattern, name)}


def compile_launch(launch: Launch, where: str) -> Compiled:
    kernel = triton.compile(
        _source(launch),
        target=TARGETS[where],
        options={"num_warps": launch.config.warps, "num_stages": launch.config.stages, "enable_fp_fusion": True},
    )
    read = _read_amd if where == "gfx942" else _read_nvidia
    registers, stack, spills, instructions = read(kernel)
    shared = kernel.metadata.shared
    blocks = blocks_per_processor(DEVICES[where], registers, launch.config.warps, shared)
    return Compiled(registers, stack, spills, shared, blocks, instructions)


def variant(launch: Launch) -> str:
    """What triton would compile for: launches of one variant share one compiled kernel."""
    source = _source(launch)
    parts = (source.signature, source.constants, sorted(source.attrs), launch.config.warps, launch.config.stages)
    return f"{launch.kernel.fn.__name__} {parts}"


def _source(launch: Launch) -> ASTSource:
    """The launch's kernel, specialised as the launch would: pointers and integers known to be multiples of 16."""
    signature, constants, attributes = {}, {}, {}
    kernel = launch.kernel
    for index, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr:
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        signature[parameter.name] = _type(value)
        address = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(address, int) and address % 16 == 0 and not parameter.do_not_specialize:
            attributes[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


_ELEMENTS = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _ELEMENTS[value.dtype]
    return "i32" if isinstance(value, int) else "fp32"


Reading = tuple[int, int, int, Counter[str]]
"""Registers, stack bytes, spilled values or instructions, instructions."""


def _read_nvidia(kernel: Any) -> Reading:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", file.name)
        code = _tool("nvdisasm", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    instructions = sass_instructions(code)
    spills = sum(count for name, count in instructions.items() if name in ("LDL", "STL"))
    return int(found[1]), int(found[2]), spills, instructions


def sass_instructions(code: str) -> Counter[str]:
    """Mnemonics of NVIDIA machine code; of loads from memory the width is kept."""
    found: Counter[str] = Counter()
    for line in re.findall(r"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", code, re.MULTILINE):
        name, *modifiers = line.split(".")
        width = [m for m in modifiers if m in ("64", "128")] if name in ("LDG", "LDGSTS") else []
        found[".".join([name, *width])] += 1
    return found


def _tool(name: str, *arguments: str) -> str:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([tool, *arguments], capture_output=True, text=True, check=True).stdout


def _read_amd(kernel: Any) -> Reading:
    code = kernel.asm["amdgcn"]

    def noted(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", code)
        assert found, key
        return int(found[1])

    spills = noted("vgpr_spill_count") + noted("sgpr_spill_count")
    instructions = Counter(re.findall(r"^\s+([a-z]\w+)", code, re.MULTILINE))
    return noted("vgpr_count"), noted("private_segment_fixed_size"), spills, instructions


def blocks_per_processor(device: Device, registers: int, warps: int, shared: int) -> int:
    """Blocks that fit at once, by registers, warps and shared memory."""
    step = device.register_step
    per_scheduler = device.registers_per_warp_slot // max(step, -(-registers // step) * step)
    by_registers = min(per_scheduler * device.schedulers, device.warps) // warps
    by_shared = device.shared_bytes // max(1, shared + device.reserved_per_block)
    return min(by_registers, by_shared, 32)
