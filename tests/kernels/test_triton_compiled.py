"""The kernels compile for devices that are not here, within their bars; bars and readers notice what they must."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from promptmux_kernels.bench.compiled import DEVICES, blocks_per_processor, sass_instructions
from shared_files import ROOT


@pytest.fixture(scope="module")
def report() -> Any:
    """Compiled in a process of its own: this one interprets."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests/triton_compile.py", "sm_90", "gfx942"],
        env={**os.environ, "TRITON_INTERPRET": "0", "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_no_kernel_misses_a_bar_on_hopper_or_cdna3(report: Any) -> None:
    assert len(report["faults"]) == 8
    assert {name: faults for name, faults in report["faults"].items() if faults} == {}


def test_a_tile_too_large_for_its_warps_is_noticed(report: Any) -> None:
    assert any(fault.startswith("spills") for fault in report["spilling"])


def test_no_batch_compiles_what_warming_up_did_not(report: Any) -> None:
    assert report["cold"] == []


def test_instructions_are_read_with_their_widths_and_without_their_predicates() -> None:
    code = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/              @!P0 LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/               @P1 LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR4][R2.64] ;
        /*0030*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0040*/             @!UP0 UTMALDG.2D [UR8], [UR4] ;
        /*0050*/                   STL.64 [R1], R2 ;
    """
    assert sass_instructions(code) == {
        "LDC": 1,
        "LDG.128": 1,
        "LDGSTS.128": 1,
        "HGMMA": 1,
        "UTMALDG": 1,
        "STL": 1,
    }


@pytest.mark.parametrize(
    ("registers", "warps", "shared_kb", "blocks"),
    [(125, 8, 64, 2), (129, 8, 64, 1), (32, 4, 0, 16), (64, 4, 112, 2), (64, 4, 114, 1)],
    ids=["registers", "one register more", "warps", "shared memory", "a little more"],
)
def test_blocks_are_bounded_by_the_scarcest_resource(registers: int, warps: int, shared_kb: int, blocks: int) -> None:
    assert blocks_per_processor(DEVICES["sm_90"], registers, warps, shared_kb * 1024) == blocks
