"""Fault points: silent unless armed, and exact about which passing they spoil."""

from __future__ import annotations

import errno
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from promptmux_prompts.faults import FaultInjected, arm, disarm, fault


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    disarm()


def test_an_unarmed_point_does_nothing() -> None:
    fault("publish.blob_synced")


@pytest.mark.parametrize(("kind", "number"), [("eio", errno.EIO), ("enospc", errno.ENOSPC)])
def test_a_point_fails_as_a_disk_does(kind: str, number: int) -> None:
    arm(f"publish.blob_synced:{kind}")
    fault("publish.blob_renamed")
    with pytest.raises(OSError, match=r".") as failed:
        fault("publish.blob_synced")
    assert failed.value.errno == number


def test_a_number_fires_at_that_passing_alone() -> None:
    arm("a:raise:2")
    fault("a")
    with pytest.raises(FaultInjected):
        fault("a")
    fault("a")


def test_without_a_number_every_passing_fires() -> None:
    arm("a:raise")
    for _ in range(3):
        with pytest.raises(FaultInjected):
            fault("a")


def test_wildcards_count_the_points_they_stand_for() -> None:
    arm("publish.*:raise:2")
    fault("publish.a")
    fault("delete.a")
    with pytest.raises(FaultInjected, match=r"publish\.b"):
        fault("publish.b")


def test_a_delay_waits() -> None:
    arm("a:delay_30")
    started = time.monotonic()
    fault("a")
    assert time.monotonic() - started >= 0.03


def test_kill_leaves_no_time_for_anything() -> None:
    program = (
        "from promptmux_prompts.faults import arm, fault; "
        "arm('a:kill'); print('armed', flush=True); fault('a'); print('on')"
    )
    died = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert (died.returncode, died.stdout) == (-9, "armed\n"), died.stderr


@pytest.mark.parametrize(
    "spec",
    ["", "a", "a:", ":kill", "a:explode", "a:kill:", "a:kill:x", "a:delay_", "a:delay_x", "a:delay", "a:kill:1:2"],
)
def test_what_is_not_understood_is_refused(spec: str) -> None:
    with pytest.raises(ValueError, match="point:kind"):
        arm(spec)
